"""When to try again after a connection broke: exponential back-off with full jitter, bounded.

https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Retry:
    """How persistently a stream reconnects.

    Before attempt number n it waits a random time between 0 and `first_delay_s` * 2^(n-1), at most
    `max_delay_s`. It gives up when the agent has been away for `patience_s`, or after `attempts`
    failed attempts in a row. `patience_s=0` never reconnects.
    """

    patience_s: float = 60.0
    attempts: int | None = None
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0


class Backoff:
    """The state of one stream's reconnecting. Knows no clock: callers pass the time."""

    def __init__(self, retry: Retry, jitter: Callable[[], float] = random.random) -> None:
        self._retry = retry
        self._jitter = jitter  # from 0 to 1
        self._away_since_s: float | None = None
        self._failures = 0
        self._doublings = 0

    def delay_s(self, now_s: float) -> float | None:
        """How long to wait before the next attempt; None: give up. The next call after that
        begins anew."""
        retry = self._retry
        if self._away_since_s is None:
            self._away_since_s = now_s
        left_s = self._away_since_s + retry.patience_s - now_s
        if left_s <= 0 or (retry.attempts is not None and self._failures >= retry.attempts):
            self.stands()
            return None
        ceiling_s = min(retry.first_delay_s * 2.0**self._doublings, retry.max_delay_s, left_s)
        self._failures += 1
        self._doublings = min(self._doublings + 1, 30)
        return self._jitter() * ceiling_s

    def stands(self) -> None:
        """A call stands: the agent is not away. The delays stay long until it delivers, so that an
        agent that accepts and breaks off is not called in a tight loop."""
        self._away_since_s = None
        self._failures = 0

    def delivers(self) -> None:
        """A message came: the next delay is short again."""
        self._doublings = 0
