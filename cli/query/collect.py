"""`coral collect`: start a collector on many agents, by their colony."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

from coral.cli.common import EXIT_ERROR, Duration, DurationType, in_users_words, run
from coral.cli.page import Page
from coral.cli.query.command import colony_options
from coral.cli.query.completion import complete_service
from coral.client import ColonyClient
from coral.mesh.v1 import ebpf_pb2 as ebpf
from coral.views.sheet import Column, Sheet
from coral.wire.kinds import kind_name

_KINDS: Final = tuple(kind_name(kind) for kind in ebpf.EbpfCollectorKind.values() if kind)
_QUESTIONS: Final = {
    "syscall_stats": "syscalls",
    "http_latency": "http",
    "cpu_profile": "profile",
    "tcp_metrics": "tcp",
}
_MOST_AGENTS: Final = 3
_RESULTS: Final = (
    Column("AGENT", right=False, wraps=True, room=12),
    Column("COLLECTOR", right=False, spare=1),
    Column("WHY NOT", right=False, wraps=True, room=30, optional=True),
)


@click.command()
@click.argument("kind", type=click.Choice(_KINDS))
@click.argument("service", required=False, shell_complete=complete_service)
@click.option(
    "-d",
    "--duration",
    type=DurationType(),
    help="How long at most, such as 30s.  [default: the agents' limits.default_duration]",
)
@click.option(
    "-c",
    "--config",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the collector; `coral capabilities --options` lists them.",
)
@click.option(
    "--on", "agents", multiple=True, metavar="AGENT", help="Only on these agents.  [default: all]"
)
@colony_options
def collect(
    *,
    kind: str,
    service: str | None,
    duration: Duration | None,
    options: tuple[str, ...],
    agents: tuple[str, ...],
    address: str,
) -> None:
    """Start a collector on every agent of a colony, which keeps what it sees.

    SERVICE is what to watch, by its name; or an option names a target, such as -c pid=1234 or
    -c scope=host.

    \b
    coral collect http_latency checkout -d 60s
    coral query http checkout --since 1m
    """
    wanted = {
        "service_name": service or "",
        "config": _config(options),
        "duration_s": duration,
        "agents": agents,
    }
    typed = {
        "kind": kind,
        "duration": f"--duration {duration.text if duration else ''}".strip(),
        **{text.partition("=")[0]: f"-c {text}" for text in options},
    }
    if not service and not options:
        typed["scope"] = "nothing to watch"
    run(_collect(address, kind, wanted, typed), typed)


async def _collect(
    address: str, kind: str, wanted: Mapping[str, Any], typed: Mapping[str, str]
) -> int:
    """Fails where no agent has started it."""
    async with ColonyClient(address) as colony:
        results = await colony.collect(kind, **wanted)
    page = Page()
    if not results:
        page.text("no agent can be reached")
        return EXIT_ERROR
    sheet = Sheet(_RESULTS)
    refused: dict[str, list[str]] = {}
    for result in results:
        if result.error:
            why = in_users_words(result.error, typed).replace("a service_name", "a SERVICE")
            refused.setdefault(why, []).append(result.agent)
        else:
            sheet.add(result.agent, result.collector_id or "-", "; ".join(result.notes))
    for why, agents in refused.items():
        sheet.add(_some(agents), "-", (why, "red"))
    page.sheet(sheet)
    if all(result.error for result in results):
        return EXIT_ERROR
    if question := _QUESTIONS.get(kind):
        words = " ".join(["coral query", question, *filter(None, [wanted["service_name"]])])
        page.text("")
        page.text(f"`{words}` shows what they see")
    return 0


def _some(agents: Sequence[str]) -> str:
    """What several agents answer alike is said once."""
    rest = len(agents) - _MOST_AGENTS
    named = ", ".join(agents[:_MOST_AGENTS])
    return f"{named} and {rest:,} more" if rest > 0 else named


def _config(options: Sequence[str]) -> Mapping[str, str]:
    """Raises a usage error."""
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise click.UsageError(f"-c {option}: KEY=VALUE is expected")
        found[key] = value
    return found
