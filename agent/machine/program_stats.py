"""Run time of programs, by sampling the kernel's statistics.

While the kernel keeps run-time statistics, every run of every program on the machine costs about
80 ns more. So the statistics are on for a short window about once a second, less often while the
programs use little, at random times, and what is counted in a window stands for the time since the
window before. The figures are estimates.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from coral.bpf import ProgramStats
from coral.bpf.libbpf import EXHAUSTED, BpfError
from coral.bpf.loading.object import enable_run_time_stats
from coral.collectors.contract import Programs

WINDOW_S: Final = 0.02
# A fixed period would always meet the same part of what a program does every second.
PERIOD_S: Final = (0.5, 1.5)
# Enabling and disabling them interrupts every CPU, 0.5 ms in all. Programs that have used less than
# this part of a CPU in the window before are looked at that many times less often.
_LITTLE: Final = 0.005
_LESS_OFTEN: Final = 3


@dataclass(slots=True)
class RunEstimate:
    """The use of one program of one kind since the agent started."""

    seconds: float = 0.0
    runs: float = 0.0


@dataclass(slots=True)
class ProgramUse:
    """The run time of one session's programs. The session owns it, so that no other session's past
    is ever taken for its own."""

    counted_until_s: float  # by the monotonic clock; at first, when the programs were attached
    seconds: float = 0.0
    is_known: bool = False  # whether the kernel has counted any

    def count(
        self,
        before: Mapping[str, ProgramStats],
        after: Mapping[str, ProgramStats],
        window: Window,
        shares: Mapping[str, float],
    ) -> dict[str, RunEstimate]:
        """Counts one window: the session's SHARES of its programs' use of it, for the time since
        the window before. Returns what that adds to each program."""
        scale = max(window.end_s - self.counted_until_s, window.length_s) / window.length_s
        self.counted_until_s = window.end_s
        self.is_known = True
        added = {
            name: RunEstimate(
                (stats.run_time_ns - before[name].run_time_ns) / 1e9 * scale * shares[name],
                (stats.run_count - before[name].run_count) * scale * shares[name],
            )
            for name, stats in after.items()
            if name in before and name in shares
        }
        self.seconds += sum(estimate.seconds for estimate in added.values())
        return added


class Window(NamedTuple):
    """When statistics were counted, by the monotonic clock."""

    begin_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """How long that was."""
        return self.end_s - self.begin_s


class Sampled(NamedTuple):
    """The programs of one session."""

    kind: int
    programs: Programs
    use: ProgramUse


class ProgramStatsSampler:
    """Estimates run time and run count: for each session, and by (kind, program) over all sessions
    so far."""

    def __init__(self, sessions: Callable[[], Iterable[Sampled]]) -> None:
        self._sessions = sessions
        self.estimates: dict[tuple[int, str], RunEstimate] = defaultdict(RunEstimate)

    async def run(self) -> None:
        """Samples until cancelled; returns where there are no statistics."""
        while True:
            times = 1
            if any(True for _ in self._sessions()):
                try:
                    times = _LESS_OFTEN if await self._sample() < _LITTLE else 1
                except BpfError as error:
                    if error.errno not in EXHAUSTED:
                        return  # this kernel has no such statistics; the log says so at the start
            await asyncio.sleep(times * random.uniform(*PERIOD_S) - WINDOW_S)  # noqa: S311  no secret

    async def _sample(self) -> float:
        """Counts one window; returns the part of a CPU that one session's programs used in it, of
        the session whose programs used most."""
        most = 0.0
        fd = enable_run_time_stats()
        try:
            before = [
                (sampled, sampled.programs.program_stats(), time.monotonic())
                for sampled in self._sessions()
            ]
            await asyncio.sleep(WINDOW_S)
            for sampled, stats, begin_s in before:
                after = sampled.programs.program_stats()
                window = Window(begin_s, time.monotonic())
                added = sampled.use.count(stats, after, window, sampled.programs.shares)
                ran_ns = sum(after[name].run_time_ns - stats[name].run_time_ns for name in added)
                most = max(most, ran_ns / 1e9 / window.length_s)
                for program, estimate in added.items():
                    total = self.estimates[sampled.kind, program]
                    total.seconds += estimate.seconds
                    total.runs += estimate.runs
        finally:
            os.close(fd)
        return most
