"""`coral doctor`: is everything here that an agent needs, and does all of it work?"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Final

import click
from rich.table import Table
from rich.text import Text

from coral.cli.common import EXIT_ERROR, Output, echo_data, output_option, run, tls_options
from coral.cli.doctor.checkup import Check, Status, examine
from coral.cli.doctor.machine import AgentProcess
from coral.cli.private_agent import AgentDidNotStartError, PrivateAgent, private_agent
from coral.cli.signals import exiting
from coral.wire.text import safe, safe_lines

_STYLES: Final = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}
_STATUS_WIDTH: Final = 4
_NAME_WIDTH: Final = 28


@click.command()
@click.option(
    "--agent",
    "address",
    metavar="ADDRESS",
    help="Examine this running agent.  [default: one of its own, on a private socket]",
)
@tls_options
@output_option
def doctor(address: str | None, output: str) -> None:
    """Check this machine from end to end: what an agent needs, and that each collector sees what
    it should and leaves nothing behind. The collectors watch a process of the doctor's own."""
    report = _Report(output)
    if address:
        about = f"answers at {address}"
        process = AgentProcess.at(address)
        run(report.add_all(examine(address, process, about, private=False)))
    with exiting(), tempfile.TemporaryDirectory(prefix="coral-doctor-") as directory:
        run(report.add_all(_with_agent_of_its_own(Path(directory))))


async def _with_agent_of_its_own(directory: Path) -> AsyncGenerator[Check, None]:
    began = time.monotonic()
    try:
        with private_agent(directory) as agent:
            about = f"starts and listens in {time.monotonic() - began:.1f} s"
            process = AgentProcess(agent.process.pid)
            async with aclosing(examine(agent.address, process, about, private=True)) as checks:
                async for check in checks:
                    yield check
            yield await asyncio.to_thread(_stop, agent)
    except AgentDidNotStartError as error:
        yield Check("agent", Status.FAIL, f"it does not start: {error}")


def _stop(agent: PrivateAgent) -> Check:
    began = time.monotonic()
    status = agent.stop()
    found = f"status {status}, in {time.monotonic() - began:.1f} s"
    return Check("agent stops", Status.FAIL if status else Status.OK, found)


class _Report:
    """Shows each check as it comes, or all as data at the end."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._console = Output()

    async def add_all(self, checks: AsyncIterator[Check]) -> int:
        """Takes them in; the exit status."""
        all_checks = []
        async for check in checks:
            all_checks.append(check)
            if self._output == "table":
                self._show(check)
        failed = [check for check in all_checks if check.status is Status.FAIL]
        if self._output != "table":
            rows = [
                {"check": c.name, "status": c.status.lower(), "found": c.found} for c in all_checks
            ]
            echo_data({"healthy": not failed, "checks": rows}, self._output)
        else:
            self._console.print(_summary(all_checks))
        return EXIT_ERROR if failed else 0

    def _show(self, check: Check) -> None:
        if self._console.is_terminal:
            self._console.print(_row(check))
        else:  # whole, to be searched and copied
            found = "; ".join(map(safe, check.found.splitlines()))
            click.echo(f"{check.status:<{_STATUS_WIDTH}}  {check.name:<{_NAME_WIDTH}}  {found}")


def _row(check: Check) -> Table:
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(width=_STATUS_WIDTH)
    line.add_column(min_width=_NAME_WIDTH, no_wrap=True)
    line.add_column(overflow="fold")
    found = Text(safe_lines(check.found))
    line.add_row(Text(check.status, _STYLES[check.status]), Text(check.name), found)
    return line


def _summary(checks: list[Check]) -> Text:
    failed, warned = (
        sum(check.status is status for check in checks) for status in (Status.FAIL, Status.WARN)
    )
    if failed:
        return Text(f"{failed} of {len(checks)} checks failed", _STYLES[Status.FAIL])
    if warned:
        return Text(f"all works; {warned} of {len(checks)} could be better", _STYLES[Status.WARN])
    return Text("all works", _STYLES[Status.OK])
