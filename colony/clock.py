"""The time of day, without the steps that somebody takes back: a clock that is wrong by a year for
a minute must not delete a year of rows, nor call everything late that comes after."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import structlog

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_ELAPSED_NS: Final = partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
_STEP_NS: Final = 3600 * 10**9
_BELIEVED_NS: Final = 900 * 10**9


class Clock:
    """Unix time in nanoseconds, for any thread. It follows WALL_NS, but where that steps by more
    than an hour from what ELAPSED_NS says, it goes on as before for a quarter of an hour: then the
    step is believed. Suspended machines have elapsed, too."""

    def __init__(
        self,
        wall_ns: Callable[[], int] = time.time_ns,
        elapsed_ns: Callable[[], int] = _ELAPSED_NS,
    ) -> None:
        self._wall_ns, self._elapsed_ns = wall_ns, elapsed_ns
        self._turn = threading.Lock()
        self._at_ns, self._at_elapsed_ns = wall_ns(), elapsed_ns()  # when both agreed
        self._stepped_ns: int | None = None  # since when, elapsed, they do not

    def __call__(self) -> int:
        """The time."""
        with self._turn:
            wall_ns, elapsed_ns = self._wall_ns(), self._elapsed_ns()
            steady_ns = self._at_ns + elapsed_ns - self._at_elapsed_ns
            if abs(wall_ns - steady_ns) > _STEP_NS:
                if self._stepped_ns is None:
                    self._stepped_ns = elapsed_ns
                    log.warning(
                        "the clock was set; that is believed if it stays so",
                        by_s=(wall_ns - steady_ns) // 10**9, after_s=_BELIEVED_NS // 10**9,
                    )  # fmt: skip
                if elapsed_ns - self._stepped_ns < _BELIEVED_NS:
                    return steady_ns
            self._stepped_ns = None
            self._at_ns, self._at_elapsed_ns = wall_ns, elapsed_ns
            return wall_ns


now_ns: Final = Clock()
"""The colony's own."""
