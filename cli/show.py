"""`coral capabilities`, `coral collectors`, `coral stop`: what an agent can do and is doing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Final

import click

from coral.cli.common import (
    ANSWER_S,
    agent_option,
    as_dict,
    echo_data,
    output_option,
    run,
)
from coral.cli.ladder import refusals, taken
from coral.cli.page import Page, yes
from coral.cli.pods import sources_sheet
from coral.client import (
    AgentClient,
    CollectorCapability,
    CollectorInfo,
    CollectorOption,
    KernelFeature,
)
from coral.views.sheet import Column, Sheet
from coral.views.text import format_age, format_amount
from coral.wire.kinds import kind_name
from coral.wire.text import safe

_COLLECTORS: Final = (
    Column("COLLECTOR", right=False),  # an id, to be copied: it is never shortened
    Column("KIND", right=False, spare=1, below=True),
    Column("SERVICE", right=False, fits=True, room=12, spare=2, below=True),
    Column("ENDS IN", spare=1, below=True),
    Column("EVENTS", spare=3, below=True),
    Column("MAPS", spare=4, below=True),
    Column("SUBSCRIBERS", right=False, wraps=True, room=48, spare=5, below=True),
)
_SUPPORT: Final = (
    Column("COLLECTOR", right=False),
    Column("HERE", right=False),
    Column("USES, OR WHY NOT", right=False, wraps=True, room=30),
)
_REFUSALS: Final = (
    Column("COLLECTOR", right=False),
    Column("STEP, OPTION", right=False),
    Column("IN USE, AND WHY NOTHING BETTER", right=False, wraps=True, room=28),
)
_OPTIONS: Final = (
    Column("OPTION", right=False),
    Column("DEFAULT", right=False),
    Column("MEANING", right=False, wraps=True, room=30),
)
_FEATURES: Final = (
    Column("KERNEL FEATURE", right=False),
    Column("HERE", right=False),
    Column("WHY NOT", right=False, wraps=True, room=30),
)


@click.command()
@click.option("--options", "with_options", is_flag=True, help="Show each collector's options, too.")
@agent_option
@output_option
def capabilities(*, address: str, output: str, with_options: bool) -> None:
    """What this agent supports, and what limits it."""
    run(_capabilities(address, output, with_options=with_options))


async def _capabilities(address: str, output: str, *, with_options: bool) -> int:
    async with AgentClient(address, timeout_s=ANSWER_S) as agent:
        answer = await agent.capabilities()
    if output != "table":
        echo_data(as_dict(answer, whole=True), output)
        return 0
    page = Page()
    page.text(
        f"agent {answer.agent_id} {answer.agent_version}, kernel {answer.kernel_version}, "
        f"libbpf {answer.libbpf_version or 'not used'}"
    )
    if answer.unsupported_reason:
        page.text(answer.unsupported_reason, "red")
    for warning in answer.warnings:
        page.text(warning, "yellow")
    page.text("")
    page.sheet(_support(answer.collectors))
    refused = _refusals(answer.collectors)
    if refused.rows:
        page.text("")
        page.sheet(refused)
    for collector in answer.collectors if with_options else ():
        page.text("")
        page.text(f"options of {kind_name(collector.kind)}", "italic")
        page.sheet(_options(collector.options))
    if answer.features:
        page.text("")
        page.sheet(_features(answer.features))
    if answer.pod_sources:
        page.text("")
        page.sheet(sources_sheet(answer.pod_sources))
    if not with_options:
        page.text("")
        page.text("`coral capabilities --options` shows the options of each collector")
    return 0


def _support(collectors: Iterable[CollectorCapability]) -> Sheet:
    sheet = Sheet(_SUPPORT)
    for collector in collectors:
        # The reasons step by step are in the next table, if it came to steps.
        why = "" if collector.supported or collector.steps else collector.reason
        sheet.add(kind_name(collector.kind), yes(collector.supported), taken(collector) or why)
    return sheet


def _refusals(collectors: Iterable[CollectorCapability]) -> Sheet:
    sheet = Sheet(_REFUSALS)
    for collector in collectors:
        if collector.supported:
            for what, why in refusals(collector):
                sheet.add(kind_name(collector.kind), what, why)
    return sheet


def _options(options: Iterable[CollectorOption]) -> Sheet:
    sheet = Sheet(_OPTIONS)
    for option in options:
        sheet.add(
            option.name, option.default_value, f"{option.description}\naccepts {option.accepts}"
        )
    return sheet


def _features(features: Iterable[KernelFeature]) -> Sheet:
    sheet = Sheet(_FEATURES)
    for feature in features:
        sheet.add(feature.name, yes(feature.available), feature.reason)
    return sheet


@click.command()
@agent_option
@output_option
def collectors(address: str, output: str) -> None:
    """The collectors that are running, and their subscribers."""
    run(_collectors(address, output))


async def _collectors(address: str, output: str) -> int:
    async with AgentClient(address, timeout_s=ANSWER_S) as agent:
        answer = await agent.collectors()
    if output != "table":
        echo_data(as_dict(answer), output)
        return 0
    page = Page()
    if not answer.collectors:
        page.text("no collector is running")
        return 0
    page.sheet(collectors_sheet(answer.collectors, time.time()))
    return 0


def collectors_sheet(collectors: Iterable[CollectorInfo], now_s: float) -> Sheet:
    """Running collectors as a table, at the Unix time NOW_S."""
    sheet = Sheet(_COLLECTORS)
    for collector in collectors:
        sheet.add(
            collector.collector_id,
            kind_name(collector.kind),
            collector.service_name,
            _ends_in(collector, now_s),
            f"{collector.produced:,}",
            f"{format_amount(collector.map_memory_bytes)}B",
            "\n".join(_subscribers(collector)) or "no subscriber",
        )
    return sheet


def _ends_in(collector: CollectorInfo, now_s: float) -> str:
    """How long its lease lasts; a continuous collector has none."""
    if collector.continuous or collector.expires_at_ns is None:
        return "never"
    left_ns = collector.expires_at_ns - now_s * 1e9
    return format_age(left_ns) if left_ns > 0 else "now"


def _subscribers(collector: CollectorInfo) -> Iterator[str]:
    for each in collector.subscribers:
        figures = [f"{each.delivered:,} delivered"]
        if each.queued_events:
            figures.append(f"{each.queued_events:,} queued")
        if each.lost:
            figures.append(f"{each.lost:,} lost")
        yield f"{each.peer.rstrip(':') or 'unknown'}: {', '.join(figures)}"


@click.command()
@agent_option
@click.argument("collector_id")
def stop(address: str, collector_id: str) -> None:
    """End a collector before its lease does."""
    run(_stop(address, collector_id))


async def _stop(address: str, collector_id: str) -> int:
    async with AgentClient(address, timeout_s=ANSWER_S) as agent:
        await agent.stop(collector_id)
    click.echo(f"{safe(collector_id)} has ended")
    return 0
