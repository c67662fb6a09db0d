"""`coral collect`: start a collector on many agents, by their colony."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

from coral.cli.common import EXIT_ERROR, Duration, DurationType, run
from coral.cli.page import Page
from coral.cli.query.command import colony_options
from coral.cli.query.completion import complete_service
from coral.client import ColonyClient
from coral.mesh.v1 import ebpf_pb2 as ebpf
from coral.views.sheet import Column, Sheet
from coral.wire.kinds import kind_name

_KINDS: Final = tuple(kind_name(kind) for kind in ebpf.EbpfCollectorKind.values() if kind)
_RESULTS: Final = (
    Column("AGENT", right=False),
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
    run(_collect(address, kind, wanted), {"kind": kind, "duration_s": "--duration"})


async def _collect(address: str, kind: str, wanted: Mapping[str, Any]) -> int:
    """Fails where no agent has started it."""
    async with ColonyClient(address) as colony:
        results = await colony.collect(kind, **wanted)
    page = Page()
    if not results:
        page.text("no agent can be reached")
        return EXIT_ERROR
    sheet = Sheet(_RESULTS)
    for result in results:
        why = (result.error, "red") if result.error else "; ".join(result.notes)
        sheet.add(result.agent, result.collector_id or "-", why)
    page.sheet(sheet)
    return 0 if any(result.collector_id for result in results) else EXIT_ERROR


def _config(options: Sequence[str]) -> Mapping[str, str]:
    """Raises a usage error."""
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not key:
            raise click.UsageError(f"-c {option}: KEY=VALUE is expected")
        found[key] = value
    return found
