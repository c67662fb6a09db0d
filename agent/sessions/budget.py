"""The CPU budget, and which session is preempted when a limit is exceeded. Loop-free: figures in,
decisions out."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

CPU_WINDOW_S: Final = 10.0


class Priority(enum.IntEnum):
    """The order in which sessions are preempted: the lowest first."""

    CONTINUOUS = 0
    ON_DEMAND = 1
    WATCHED = 2  # a person is watching


S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Candidate(Generic[S]):
    """A session that could be preempted."""

    session: S
    priority: Priority
    started_at: float


def first_to_go(candidates: Iterable[Candidate[S]]) -> S | None:
    """The youngest session of the lowest priority; None without candidates."""
    ordered = sorted(candidates, key=lambda c: (c.priority, -c.started_at))
    return ordered[0].session if ordered else None


@dataclass
class CpuBudget:
    """CPU used over a sliding window, against a share of one CPU in percent."""

    percent: float
    _samples: deque[tuple[float, float]] = field(default_factory=deque)

    def add(self, at_s: float, used_s: float) -> None:
        """Adds a sample: at the time AT_S, USED_S seconds of CPU time had been used in all."""
        self._samples.append((at_s, used_s))
        while len(self._samples) > 2 and self._samples[1][0] <= at_s - CPU_WINDOW_S:  # noqa: PLR2004
            self._samples.popleft()

    @property
    def used_percent(self) -> float | None:
        """The use over the window; None before the window is full."""
        if not self._samples:
            return None
        (first_at, first_used), (last_at, last_used) = self._samples[0], self._samples[-1]
        if last_at - first_at < CPU_WINDOW_S:
            return None
        return 100 * (last_used - first_used) / (last_at - first_at)

    @property
    def exceeded(self) -> bool:
        """Whether the window is full and the use in it exceeds the budget."""
        used = self.used_percent
        return used is not None and used > self.percent

    def restart(self) -> None:
        """Begins a new window, in which the use so far does not count."""
        self._samples.clear()
