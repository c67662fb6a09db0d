"""`coral capabilities`, `coral collectors`, `coral stop`: what an agent can do and is doing."""

from __future__ import annotations

import time

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from coral.cli.common import agent_option, as_dict, echo_data, output_option, run
from coral.cli.ladder import refusals, taken
from coral.client import AgentClient
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name


@click.command()
@agent_option
@output_option
def capabilities(address: str, output: str) -> None:
    """What the agent can do on its machine, and why not more."""
    run(_capabilities(address, output))


async def _capabilities(address: str, output: str) -> int:
    async with AgentClient(address) as agent:
        answer = (await agent.capabilities()).message
    if output != "table":
        echo_data(as_dict(answer, whole=True), output)
        return 0
    console = Console()
    console.print(
        f"agent [bold]{answer.agent_id}[/] {answer.agent_version}, kernel {answer.kernel_version}, "
        f"libbpf {answer.libbpf_version or 'not used'}",
        highlight=False,
    )
    if answer.unsupported_reason:
        console.print(Text(answer.unsupported_reason, "red"))
    console.print()
    console.print(_collector_table(answer))
    refused = [
        (kind_name(collector.kind), what, why)
        for collector in answer.collectors
        if collector.supported
        for what, why in refusals(collector)
    ]
    if refused:
        console.print()
        console.print(_refusal_table(refused))
    for collector in answer.collectors:
        console.print()
        console.print(_option_table(collector))
    if answer.features:
        console.print()
        console.print(_feature_table(answer))
    return 0


def _collector_table(answer: pb.EbpfCapabilities) -> Table:
    table = _table("COLLECTOR", "HERE", "STANDS ON, OR WHY NOT")
    for collector in answer.collectors:
        # Why it cannot run is told step by step below, where it came to steps.
        why = "" if collector.supported or collector.steps else collector.reason
        table.add_row(kind_name(collector.kind), _yes(collector.supported), taken(collector) or why)
    return table


def _refusal_table(refused: list[tuple[str, str, str]]) -> Table:
    table = _table("COLLECTOR", "STEP, OPTION", "WHAT THERE IS, AND WHY NOT BETTER")
    for kind, what, why in refused:
        table.add_row(kind, what, why)
    return table


def _option_table(collector: pb.CollectorCapability) -> Table:
    table = _table("OPTION", "DEFAULT", "MEANING")
    table.title = f"options of {kind_name(collector.kind)}"
    table.title_justify = "left"
    for option in collector.options:
        meaning = Text.assemble(option.description, ("; " + option.accepts, "dim"))
        table.add_row(option.name, option.default_value, meaning)
    return table


def _feature_table(answer: pb.EbpfCapabilities) -> Table:
    table = _table("KERNEL FEATURE", "HERE", "WHY NOT")
    for feature in answer.features:
        table.add_row(feature.name, _yes(feature.available), feature.reason)
    return table


def _yes(value: bool) -> Text:
    return Text("yes", "green") if value else Text("no", "red")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    first, *others = columns
    table.add_column(first, no_wrap=True)  # a name or an id, to be copied
    for column in others:
        table.add_column(column, overflow="fold")
    return table


@click.command()
@agent_option
@output_option
def collectors(address: str, output: str) -> None:
    """The collectors at work, and who is watching them."""
    run(_collectors(address, output))


async def _collectors(address: str, output: str) -> int:
    async with AgentClient(address) as agent:
        answer = (await agent.collectors()).message
    if output != "table":
        echo_data(as_dict(answer), output)
        return 0
    console = Console()
    if not answer.collectors:
        console.print("no collector is at work")
        return 0
    table = _table("COLLECTOR", "KIND", "SERVICE", "ENDS IN", "EVENTS", "MAPS", "SUBSCRIBERS")
    for collector in answer.collectors:
        left_s = max(collector.expires_at.ToNanoseconds() / 1e9 - time.time(), 0)
        readers = [
            f"{s.peer}: {s.delivered} delivered, {s.queued_events} queued, {s.lost} lost"
            for s in collector.subscribers
        ]
        table.add_row(
            collector.collector_id,
            kind_name(collector.kind),
            collector.service_name,
            f"{left_s:.0f}s",
            str(collector.produced),
            f"{collector.map_memory_bytes / 1024:.0f} KiB",
            "\n".join(readers) or "none",
        )
    console.print(table)
    return 0


@click.command()
@agent_option
@click.argument("collector_id")
def stop(address: str, collector_id: str) -> None:
    """End a collector before its lease does."""
    run(_stop(address, collector_id))


async def _stop(address: str, collector_id: str) -> int:
    async with AgentClient(address) as agent:
        await agent.stop(collector_id)
    click.echo(f"{collector_id} has ended")
    return 0
