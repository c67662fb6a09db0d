"""`coral tap`: start a collector on a target, show what it sees, stop it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Final

import click

from coral.cli.common import EXIT_ERROR, DurationType, agent_option, output_option, run
from coral.cli.tap.display import Story, Tapped, View, view_of
from coral.cli.tap.launch import HeldCommand
from coral.client import AgentClient, AgentError, Batch, EndReason
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.names import Names
from coral.views.syscall_stats.story import SyscallStory
from coral.views.tcp_metrics.story import TcpStory

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_APART_S: Final = 0.03  # batches that are further apart are of different intervals


@dataclass(frozen=True)
class Target:
    """What to watch: a service, or what the collector's config says, or a command to start."""

    name: str
    service_name: str = ""
    config: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()


def parse_target(target: str | None, command: Sequence[str], *, host: bool) -> Target:
    """TARGET as users write it. Raises a usage error unless exactly one thing is named."""
    if (target is not None) + bool(command) + host != 1:
        raise click.UsageError(
            "name one thing to watch: a service, pid:N, cgroup:PATH, comm:NAME, --host, or a "
            "command to start after --"
        )
    if host:
        return Target("host", config={"scope": "host"})
    if command:
        config = {"from_exec": "true", "until_exit": "true"}
        return Target(
            " ".join(command),
            service_name=PurePath(command[0]).name,
            config=config,
            command=tuple(command),
        )
    assert target is not None  # noqa: S101  the count above says so
    key, colon, value = target.partition(":")
    if colon and key in ("pid", "cgroup", "comm"):
        return Target(target, config={key: value})
    return Target(target, service_name=target)


class _TapCommand(click.Command):
    """Takes what stands after `--` for a command to start, which click would not tell apart."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.obj = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] TARGET | -- COMMAND [ARG]...")


@click.command(cls=_TapCommand)
@click.argument("target", required=False)
@click.option("--host", is_flag=True, help="Watch every process of the machine.")
@click.option("--syscall-stats", is_flag=True, help="System calls: counts, errors, latency.")
@click.option("--tcp-metrics", is_flag=True, help="TCP connections: bytes, losses, failures.")
@click.option("--events", is_flag=True, help="Every single event, a line each, no figures.")
@click.option("--resolve", is_flag=True, help="Addresses of --tcp-metrics by name, where known.")
@click.option("-d", "--duration", type=DurationType(), help="How long, at most, such as 30s.")
@click.option("-i", "--interval", metavar="DURATION", help="How often figures come.  [default: 1s]")
@click.option("--include", metavar="NAMES", help="Only these system calls, comma-separated.")
@click.option("--exclude", metavar="NAMES", help="All but these system calls.")
@click.option(
    "-c",
    "--config",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other option of the collector; `coral capabilities` lists them.",
)
@agent_option
@output_option
@click.pass_context
def tap(
    ctx: click.Context,
    *,
    target: str | None,
    host: bool,
    syscall_stats: bool,
    tcp_metrics: bool,
    events: bool,
    resolve: bool,
    duration: float | None,
    interval: str | None,
    include: str | None,
    exclude: str | None,
    options: tuple[str, ...],
    address: str,
    output: str,
) -> None:
    """Watch a service, a process, a cgroup or a command, and see what it does.

    TARGET is a service's name, pid:N, cgroup:PATH or comm:NAME. A command after -- is started, and
    watched from its exec on, with what it starts itself. Ctrl-C stops the collector and prints the
    totals.
    """
    if syscall_stats == tcp_metrics:
        raise click.UsageError("name what to collect: --syscall-stats or --tcp-metrics")
    if resolve and not tcp_metrics:
        raise click.UsageError("--resolve goes with --tcp-metrics")
    wanted = parse_target(target, ctx.obj or (), host=host)
    config = dict(wanted.config)
    given = {"interval": interval, "include": include, "exclude": exclude}
    config |= {name: value for name, value in given.items() if value is not None}
    if events:
        config["mode"] = "events"
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise click.UsageError(f"--config {option}: KEY=VALUE is expected")
        config[key] = value
    kind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
    story: Story = SyscallStory()
    if tcp_metrics:
        kind = pb.EBPF_COLLECTOR_KIND_TCP_METRICS
        story = TcpStory(Names() if resolve else None)
    run(_tap(wanted, kind, config, story, duration_s=duration, address=address, output=output))


async def _tap(
    target: Target,
    kind: pb.EbpfCollectorKind,
    config: dict[str, str],
    story: Story,
    *,
    duration_s: float | None,
    address: str,
    output: str,
) -> int:
    held = await HeldCommand.start(target.command) if target.command else None
    try:
        if held:
            config["pid"] = str(held.pid)
        async with AgentClient(address) as agent:
            started = await agent.start(
                kind,
                service_name=target.service_name,
                config=config,
                duration_s=duration_s,
            )
            if not started.supported:
                click.echo(f"coral: this cannot run here: {started.error}", err=True)
                return EXIT_ERROR
            tapped = Tapped(target.name, started, story)
            try:
                view = view_of(output, tapped, config)
                end = await _follow(agent, tapped, view, held)
            finally:
                if not tapped.end:  # whatever ended this, a closed pipe for one
                    with suppress(AgentError):
                        await agent.stop(tapped.collector_id)
        view.finish()
    finally:
        if held:
            held.abandon()
    if held and not tapped.interrupted:
        status = await held.wait()
        if status:
            return status
    if tapped.interrupted:
        return 128 + tapped.interrupted
    return EXIT_ERROR if end == EndReason.FAILED else 0


async def _read(stream: AsyncIterator[Batch], tapped: Tapped, view: View) -> None:
    """Reads to the end. An interval may come in several batches, one at once after the other."""
    while True:
        coming = asyncio.ensure_future(anext(stream, None))
        try:
            await asyncio.wait([coming], timeout=_APART_S)
            if not coming.done():
                view.show()
            batch = await coming
        finally:
            coming.cancel()
        if not batch:
            return
        view.update(batch)
        tapped.add(batch)


async def _follow(
    agent: AgentClient, tapped: Tapped, view: View, held: HeldCommand | None
) -> EndReason | None:
    """Shows batches until the session's end. The first Ctrl-C stops the collector, and what it
    still had is shown too."""
    stopping: set[asyncio.Task[Any]] = set()

    def on_signal(number: int) -> None:
        tapped.interrupted = number
        stopping.add(asyncio.create_task(agent.stop(tapped.collector_id)))
        leave_signals()

    def leave_signals() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    try:
        terms = pb.EbpfEventStreamRequest(interactive=True)
        async with agent.subscribe(tapped.collector_id, terms) as stream:
            if held:
                held.release()
            await _read(stream, tapped, view)
    finally:
        leave_signals()
    await asyncio.gather(*stopping, return_exceptions=True)
    return tapped.end.reason if tapped.end else None
