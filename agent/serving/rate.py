"""Rates: how much one peer may send, and how often a log line may be repeated. Loop-free."""

from __future__ import annotations

from collections import Counter


class Bucket:
    """A token bucket that lends: spending is never refused, but what goes beyond the burst is a
    debt, and nothing more should be taken until the rate has paid it."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate  # a second
        self._burst = burst
        self._level = burst
        self._filled_at_s = 0.0

    def spend(self, amount: float, now_s: float) -> None:
        """Takes AMOUNT, on credit where there is not enough."""
        self._fill(now_s)
        self._level -= amount

    def wait_s(self, now_s: float) -> float:
        """How long until the debt is paid, in seconds; 0 without one."""
        self._fill(now_s)
        return max(0.0, -self._level / self._rate)

    def is_full(self, now_s: float) -> bool:
        """Whether nothing would change if the bucket were made anew."""
        self._fill(now_s)
        return self._level >= self._burst

    def _fill(self, now_s: float) -> None:
        passed_s = now_s - self._filled_at_s
        self._filled_at_s = now_s
        self._level = min(self._burst, self._level + passed_s * self._rate)


class Seldom:
    """Lets an event of each name through once in a while, and counts the others."""

    def __init__(self, every_s: float = 10.0) -> None:
        self._every_s = every_s
        self._due_at_s: dict[str, float] = {}
        self._held_back: Counter[str] = Counter()

    def due(self, name: str, now_s: float) -> int | None:
        """None where an event of that NAME is not to be reported now; otherwise how many were held
        back since the last one that was."""
        if now_s < self._due_at_s.get(name, 0.0):
            self._held_back[name] += 1
            return None
        self._due_at_s[name] = now_s + self._every_s
        return self._held_back.pop(name, 0)
