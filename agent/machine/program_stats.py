"""Run time of programs, by sampling the kernel's statistics.

While the kernel keeps run-time statistics, every run of every program on the machine costs about
80 ns more. So the statistics are on for a short window in each period, and the counts of a window
are scaled up to the time since the window before. The figures are estimates.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from coral.bpf import BpfObject, ProgramStats
from coral.bpf.libbpf import EXHAUSTED, BpfError
from coral.bpf.loading.object import enable_run_time_stats

WINDOW_S: Final = 0.1
PERIOD_S: Final = 5.0

ObjectsByKind = Callable[[], Iterable[tuple[int, BpfObject]]]


@dataclass(slots=True)
class RunEstimate:
    """The use of one program of one kind since the agent started."""

    seconds: float = 0.0
    runs: float = 0.0


class ProgramStatsSampler:
    """Estimates run time and run count by (kind, program), over all sessions so far."""

    def __init__(self, objects: ObjectsByKind) -> None:
        self._objects = objects
        self._sampled_at: dict[int, float] = {}
        self.total_s = 0.0
        self.estimates: dict[tuple[int, str], RunEstimate] = defaultdict(RunEstimate)

    async def run(self) -> None:
        """Samples until cancelled."""
        while True:
            if any(True for _ in self._objects()):
                try:
                    await self._sample()
                except BpfError as error:
                    if error.errno not in EXHAUSTED:
                        return  # this kernel has no such statistics, so there are no figures
            await asyncio.sleep(PERIOD_S - WINDOW_S)

    async def _sample(self) -> None:
        fd = enable_run_time_stats()
        try:
            before = {id(o): (o, kind, o.program_stats()) for kind, o in self._objects()}
            opened_at = time.monotonic()
            await asyncio.sleep(WINDOW_S)
            now = time.monotonic()
            for object_id, (bpf_object, kind, stats) in before.items():
                since = now - self._sampled_at.get(object_id, opened_at)
                scale = max(since / (now - opened_at), 1.0)
                self._add(kind, stats, bpf_object.program_stats(), scale)
            self._sampled_at = dict.fromkeys(before, now)
        finally:
            os.close(fd)

    def _add(
        self,
        kind: int,
        before: dict[str, ProgramStats],
        after: dict[str, ProgramStats],
        scale: float,
    ) -> None:
        for name, stats in after.items():
            if name not in before:
                continue
            estimate = self.estimates[kind, name]
            seconds = (stats.run_time_ns - before[name].run_time_ns) / 1e9 * scale
            estimate.seconds += seconds
            self.total_s += seconds
            estimate.runs += (stats.run_count - before[name].run_count) * scale
