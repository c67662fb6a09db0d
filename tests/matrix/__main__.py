"""`python -P -m tests.matrix [KERNEL...]`: runs the matrix, prints and saves its table."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import psutil

from tests.matrix.apt import KERNELS_DIRECTORY, KernelMissingError
from tests.matrix.kernels import Kernel, kernel, machine_of
from tests.matrix.report import Outcome, failures, instructions, table
from tests.matrix.rows import HOST, KERNELS, Row, rows_of
from tests.matrix.run import GUEST_MEMORY_MIB, Say, missing_packages, run_guest, run_here

# A boot takes seconds and a row takes minutes, so that guests of one row each share the CPUs best.
_ROWS_A_GUEST: Final = 1


@dataclass(frozen=True)
class Plan:
    """One guest to boot, or why it cannot."""

    name: str
    kernel: Kernel | None
    rows: Sequence[Row]
    why_not: str = ""


def plans(names: Sequence[str]) -> Iterator[Plan]:
    """The guests for the kernels NAMES."""
    for name in names:
        rows = rows_of(name)
        try:
            found = kernel(name)
        except KernelMissingError as error:
            yield Plan(name, None, rows, str(error))
            continue
        for first in range(0, len(rows), _ROWS_A_GUEST):
            suffix = f"-{first // _ROWS_A_GUEST + 1}" if len(rows) > _ROWS_A_GUEST else ""
            yield Plan(found.name + suffix, found, rows[first : first + _ROWS_A_GUEST])


def at_once() -> int:
    """The number of concurrent guests: as many as CPUs and memory allow."""
    fitting = psutil.virtual_memory().available // ((GUEST_MEMORY_MIB + 256) << 20)
    return max(1, min(len(os.sched_getaffinity(0)), fitting))


async def tried_again(guest: str, booted: Kernel, first: Outcome, say: Say) -> Outcome:
    """An emulated machine stands still for a second now and then, and others work on the one below:
    what failed FIRST in a guest is tried once more, by itself in another, and named."""
    if not first.failed:
        return first
    row = replace(first.row, tests=first.failed)
    (again,) = await run_guest(f"{guest}-again", booted, [row], say)
    return first.with_second_tries(again.cases)


async def run(names: Sequence[str]) -> list[Outcome]:
    """Runs every row of the kernels NAMES, and prints the outcome of each as it ends."""
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)

    outcomes: dict[Row, Outcome] = {}
    if HOST in names:  # alone: its tests measure time
        for row in rows_of(HOST):
            outcomes[row] = await run_here(row, say)
    guests = list(plans([name for name in names if name != HOST]))
    room = asyncio.Semaphore(at_once())

    async def boot(plan: Plan) -> None:
        if not plan.kernel:
            for row in plan.rows:
                outcomes[row] = Outcome(row, "", (), plan.why_not, 0.0, excused=row.optional)
            say(f"{plan.name}: {plan.why_not}")
            return
        async with room:
            for result in await run_guest(plan.name, plan.kernel, plan.rows, say):
                outcomes[result.row] = await tried_again(plan.name, plan.kernel, result, say)

    async with asyncio.TaskGroup() as group:
        # Those of bcc first: they take longest.
        for plan in sorted(guests, key=lambda plan: plan.rows[0].loader):
            group.create_task(boot(plan))
    return [outcomes[row] for name in names for row in rows_of(name)]


def main() -> int:
    """0 if every row ran and nothing failed."""
    names = tuple(dict.fromkeys(sys.argv[1:])) or KERNELS
    if os.geteuid() != 0:
        print("the kernel tests need root, in a guest as here: run this as root", file=sys.stderr)
        return 2
    machines = {machine_of(name) for name in names if name != HOST}
    if machines and (missing := missing_packages(machines)):
        print(f"missing: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    outcomes = asyncio.run(run(names))
    text = table(outcomes)
    programs = instructions(outcomes)
    KERNELS_DIRECTORY.mkdir(parents=True, exist_ok=True)
    (KERNELS_DIRECTORY / "matrix.md").write_text(f"{text}\n{programs}")
    print(f"\n{programs}\n{text}{failures(outcomes)}", end="")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
