"""Work for the agent's whole life, which no exception ends, and which never ends the agent."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.supervisor")

_BACKOFF_FIRST_S: Final = 1.0
_BACKOFF_MOST_S: Final = 60.0
_STEADY_S: Final = 60.0


@dataclass
class Backoff:
    """Pauses that double from a second to MOST_S, each with a jitter of half its length. They are
    short again after work that lasted a minute."""

    clock: Callable[[], float] = time.monotonic
    most_s: float = _BACKOFF_MOST_S
    _next_s: float = _BACKOFF_FIRST_S
    _began_s: float | None = None

    def begin(self) -> None:
        """The work begins."""
        self._began_s = self.clock()

    def pause_s(self) -> float:
        """How long to wait before the next attempt, after the work ended or could not begin."""
        if self._began_s is not None and self.clock() - self._began_s > _STEADY_S:
            self._next_s = _BACKOFF_FIRST_S
        self._began_s = None
        pause_s, self._next_s = min(self._next_s, self.most_s), min(2 * self._next_s, self.most_s)
        return pause_s * random.uniform(0.75, 1.25)  # noqa: S311  not a secret


async def keep_going(
    name: str, work: Callable[[], Awaitable[None]], most_pause_s: float = _BACKOFF_MOST_S
) -> None:
    """Does WORK until it returns. When it raises, logs the exception and begins again, after
    pauses that grow to MOST_PAUSE_S."""
    backoff = Backoff(most_s=most_pause_s)
    while True:
        backoff.begin()
        try:
            return await work()
        except Exception:
            pause_s = backoff.pause_s()
            log.exception("unexpected failure", task=name, again_in=f"{pause_s:.1f}s")
        await asyncio.sleep(pause_s)
