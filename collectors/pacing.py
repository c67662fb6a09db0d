"""When to drain a session of single events: soon after one, and not for each. No clock, no loop.

An event that comes after a pause is drained at once: the kernel wakes a reader that has caught up.
Then events gather for a while, since a drain and the writes to subscribers cost the same for one
as for a hundred. The more a drain has cost, the longer: so drains take a bounded part of a CPU, and
events come as soon as that allows.
"""

from __future__ import annotations

from typing import Final

# How long events gather between two drains, which is the longest that one waits. With many, the
# longest time saves more than half of the drains.
SHORTEST_GAP_S: Final = 0.0035
SHORT_GAP_S: Final = 0.007
LONG_GAP_S: Final = 0.018
MANY: Final = 64
COSTS_A_GAP: Final = 6  # the gap after a drain of few events is this many times what it has taken
EARLY_S: Final = 0.001  # that timers may be early: uvloop's are in whole milliseconds
# How often to look into a buffer whose kernel wakes nobody for its first record.
POLL_S: Final = LONG_GAP_S


class EventPace:
    """Decides when to drain. TICK_S is how often it drains in any case, to hear of losses; POLLS
    says that the kernel does not wake a reader that has caught up. Times are of one clock, in
    seconds."""

    def __init__(self, now: float, tick_s: float, *, polls: bool) -> None:
        self._tick_s, self._polls = tick_s, polls
        self._tick = now + tick_s
        self._gathered = now  # when events have gathered for long enough
        self._took_s = SHORT_GAP_S  # what drains of few events have taken lately
        self._found = True  # whether the last drain took anything

    def should_drain(self, now: float, *, pending: bool, filling: bool) -> bool:
        """Whether to drain now, where events are PENDING, or the buffer is FILLING."""
        if filling and self._found:
            return True
        now += EARLY_S
        return now >= self._tick or (pending and now >= self._gathered)

    def drained(self, began: float, now: float, count: int, *, more: bool) -> None:
        """Notes a drain of COUNT events, which BEGAN then, and has left MORE than it may leave."""
        self._found = count > 0
        self._tick = now + self._tick_s
        self._gathered = now if more and count else now + self._gap_s(now - began, count)

    def _gap_s(self, took_s: float, count: int) -> float:
        if count >= MANY:
            return LONG_GAP_S
        # Half of it is this drain's own: one that was interrupted says little of the next.
        self._took_s = (self._took_s + took_s) / 2
        return min(max(COSTS_A_GAP * self._took_s, SHORTEST_GAP_S), SHORT_GAP_S)

    def rests(self, now: float) -> bool:
        """Whether nothing is gathering: the next event should wake the reader."""
        return now + EARLY_S >= self._gathered

    def due(self, now: float) -> float:
        """When to look again if nobody wakes the reader."""
        if not self.rests(now):
            return min(self._gathered, self._tick)
        return min(now + POLL_S, self._tick) if self._polls else self._tick
