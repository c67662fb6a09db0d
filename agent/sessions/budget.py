"""The limits on CPU time and memory, and which session is preempted when one is exceeded.
Loop-free: figures in, decisions out."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Generic, TypeVar

from coral.agent.config import Limits
from coral.agent.sessions.costs import CPU_WINDOW_S


class Priority(enum.IntEnum):
    """The order in which sessions are preempted: the lowest first."""

    CONTINUOUS = 0
    ON_DEMAND = 1
    WATCHED = 2  # a person is watching


S = TypeVar("S")

RELIEF: Final = 0.8  # the share of a limit that is in use after a preemption, at most


@dataclass(frozen=True, slots=True)
class Candidate(Generic[S]):
    """A session that could be preempted, and how much it uses of what is limited."""

    session: S
    priority: Priority
    used: float


@dataclass(frozen=True, slots=True)
class Excess(Generic[S]):
    """A limit that is exceeded, and the session that has to go."""

    limit: str  # its key
    value: float
    used: float  # by all sessions that are under this limit
    session: S


def first_to_go(candidates: Iterable[Candidate[S]], limit: float) -> S | None:
    """The session to preempt; None while all together use no more than LIMIT.

    It is the most expensive one of the lowest priority that suffices: of the lowest priority P for
    which the use falls to RELIEF of the limit once all sessions of P and below are gone. So a cheap
    session does not go in vain, neither where a more important one would have to follow it, nor
    where another's use is growing and has just passed the limit.
    """
    ordered = sorted(candidates, key=lambda candidate: (candidate.priority, -candidate.used))
    left = sum(candidate.used for candidate in ordered)
    if left <= limit:
        return None
    for _, group in groupby(ordered, key=lambda candidate: candidate.priority):
        first, *others = group
        left -= first.used + sum(candidate.used for candidate in others)
        if left <= RELIEF * limit:
            return first.session
    return ordered[0].session if ordered else None


def cpu_excess(candidates: Sequence[Candidate[S]], limits: Limits) -> Excess[S] | None:
    """The first limit on CPU time that CANDIDATES exceed, whose use is in percent of one CPU."""
    unattended = [each for each in candidates if each.priority is Priority.CONTINUOUS]
    for limit, value, under in (
        ("limits.continuous_cpu_percent", limits.continuous_cpu_percent, unattended),
        ("limits.cpu_percent", limits.cpu_percent, candidates),
    ):
        session = first_to_go(under, value)
        if session is not None:
            return Excess(limit, value, sum(each.used for each in under), session)
    return None


@dataclass(frozen=True, slots=True)
class Needs:
    """What a collector used when it was preempted."""

    cpu_percent: float  # of one CPU
    memory_bytes: int


# A collector that needs more than this share of a limit on CPU time is tried again where so much
# is free: only that shows whether it still needs as much.
_MOST_NEEDED: Final = 0.8


class Room:
    """Whether a continuous collector that was preempted can come back: there has to be room for
    what it used before."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Collectors that have come back and whose use does not show yet: until when, and how much.
        self._promised: list[tuple[float, Needs]] = []

    def take(
        self, needs: Needs, candidates: Sequence[Candidate[S]], memory_bytes: int, at_s: float
    ) -> bool:
        """Whether there is room for NEEDS beside CANDIDATES, whose use is in percent of one CPU,
        and MEMORY_BYTES, at the time AT_S. If so, it is taken."""
        self._promised = [each for each in self._promised if each[0] > at_s]
        promised = [each for _, each in self._promised]
        percent = sum(each.cpu_percent for each in promised)
        unattended = [c.used for c in candidates if c.priority is Priority.CONTINUOUS]
        limits = self._limits
        memory_bytes += sum(each.memory_bytes for each in promised) + needs.memory_bytes
        has_room = memory_bytes <= limits.memory and all(
            percent + used + min(needs.cpu_percent, _MOST_NEEDED * limit) <= limit
            for used, limit in (
                (sum(unattended), limits.continuous_cpu_percent),
                (sum(c.used for c in candidates), limits.cpu_percent),
            )
        )
        if has_room:
            self._promised.append((at_s + CPU_WINDOW_S, needs))
        return has_room
