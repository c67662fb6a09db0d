"""Measures coral beside its peers, on processes that it starts itself, and prints tables.

    python -P -m benchmarks.run [--json FILE] [--page FILE] [SECTION ...]

A section is a module with `async def measure(bench) -> Report` and a line in SECTIONS.
"""

from __future__ import annotations

import signal

# Before the other imports, which take a while. What a caller ignores, every process we start would
# ignore: peers stop at SIGINT.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import asyncio
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.console import Console

from benchmarks import (
    colony_bus,
    colony_fleet,
    colony_intake,
    colony_store,
    cost,
    delivery,
    drain,
    encoders,
    http,
    http_agent,
    http_programs,
    kernel,
    lag,
    loop_lag,
    memory,
    profile,
    replay,
    rungs,
    sessions,
    stacks,
    startup,
    summaries,
    tcp,
    tls,
    unwinding,
)
from benchmarks.bench import Bench, BenchError
from benchmarks.report import Report, page, show
from coral import bpf
from coral.cli.signals import exiting

SECTIONS: Final[dict[str, Callable[[Bench], Coroutine[None, None, Report]]]] = {
    "startup": startup.measure,
    "memory": memory.measure,
    "cost": cost.measure,
    "tcp": tcp.measure,
    "http": http.measure,
    "https": http.measure_tls,
    "http_agent": http_agent.measure,
    "http_programs": http_programs.measure,
    "sessions": sessions.measure,
    "rungs": rungs.measure,
    "programs": rungs.measure_programs,
    "drain": drain.measure,
    "stacks": stacks.measure,
    "unwinding": unwinding.measure,
    "profile": profile.measure,
    "first_names": profile.measure_names,
    "delivery": delivery.measure,
    "encoders": encoders.measure,
    "summaries": summaries.measure,
    "colony_intake": colony_intake.measure,
    "colony_store": colony_store.measure,
    "colony_fleet": colony_fleet.measure,
    "colony_bus": colony_bus.measure,
    "lag": lag.measure,
    "tls": tls.measure,
    "loop_lag": loop_lag.measure,
    "replay": replay.measure,
}

_NEEDED: Final = ("cc", "clang", "bpftool")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the named sections, or all; returns the process's exit status. An aim that is not met
    is shown, and is no failure: the machine may be busy."""
    options = _parse(arguments)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    # What was started is ended, what was mounted unmounted.
    with exiting():
        return _measure(options, console, sys.argv[1:] if arguments is None else arguments)


def _measure(options: argparse.Namespace, console: Console, arguments: Sequence[str]) -> int:
    try:
        _check_can_trace()
        machine = kernel.machine()  # now, for the load is others' now, and ours afterwards
        for what, value in machine.items():
            console.print(f"{what:<7} {value}")
        reports = _run(options.sections or list(SECTIONS), console)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        written = {
            "machine": machine,
            "sections": {name: report.as_json() for name, report in reports.items()},
        }
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    if options.page:
        command = f"sudo .venv/bin/python -P -m benchmarks.run {shlex.join(arguments)}"
        options.page.write_text(page(reports, machine, command))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -P -m benchmarks.run", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there too")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page of Markdown there")
    options = parser.parse_args(arguments)
    for name in options.sections:
        if name not in SECTIONS:
            parser.error(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
    return options


def _check_can_trace() -> None:
    if os.geteuid() != 0:
        raise BenchError("loading eBPF programs takes root: run it with sudo")
    if obstacle := bpf.probe().obstacle:
        raise BenchError(obstacle)
    if missing := [program for program in _NEEDED if not shutil.which(program)]:
        raise BenchError(f"missing: {', '.join(missing)}; `make bench` installs them")


def _run(names: Sequence[str], console: Console) -> dict[str, Report]:
    began_at = time.monotonic()
    reports: dict[str, Report] = {}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coral-bench-")))
        kernel_source, about_headers = kernel.headers_for_bcc(directory)
        about_tracefs = stack.enter_context(kernel.tracefs())
        bench = Bench(directory, console, kernel_source)
        for remark in filter(None, (about_tracefs, about_headers)):
            console.print(f"note    {remark}")
        for name in names:
            console.print(f"\n{name}: measuring", style="dim")
            reports[name] = asyncio.run(SECTIONS[name](bench))
            show(reports[name], console)
    console.print(f"\nmeasured in {time.monotonic() - began_at:.0f} s")
    return reports


if __name__ == "__main__":
    sys.exit(main())
