"""One clock for all collectors: Unix time of the programs' times, which are of CLOCK_MONOTONIC.

The two clocks differ by a constant: they run at the same rate, also while NTP corrects it. Two
things change the constant. A *step* sets the wall clock: to all times, earlier ones included, the
new setting applies, since it replaces a wrong one. A *suspend* of the machine stops CLOCK_MONOTONIC
and not the wall clock: it moves only the times after it. CLOCK_BOOTTIME, which runs on in a suspend
and is never set, tells them apart.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Readings to choose the best from: one that is not interrupted takes a fraction of a microsecond.
_READINGS: Final = 5
# Smaller jumps are taken for the clocks' own inaccuracy, between CPUs for example.
_SMALLEST_JUMP_NS: Final = 1_000
_MOST_SUSPENDS: Final = 1_000


class Reading(NamedTuple):
    """The clocks, read in this order, in nanoseconds."""

    boot_ns: int
    monotonic_ns: int
    unix_ns: int
    boot_after_ns: int

    @property
    def width_ns(self) -> int:
        """How long the reading took, which bounds its error."""
        return self.boot_after_ns - self.boot_ns


def read_clocks() -> Reading:
    """One reading."""
    return Reading(
        time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        time.clock_gettime_ns(time.CLOCK_MONOTONIC),
        time.clock_gettime_ns(time.CLOCK_REALTIME),
        time.clock_gettime_ns(time.CLOCK_BOOTTIME),
    )


@dataclass
class _Difference:
    """The difference between two clocks, constant but for jumps. Each reading bounds it; the value
    is that of the reading at the last jump."""

    low_ns: int
    high_ns: int

    def __post_init__(self) -> None:
        self.value_ns = (self.low_ns + self.high_ns) // 2

    def agrees(self, other: _Difference) -> bool:
        """Whether both can be of the same constant."""
        apart_ns = max(self.low_ns - other.high_ns, other.low_ns - self.high_ns)
        return apart_ns < _SMALLEST_JUMP_NS

    def narrow(self, other: _Difference) -> None:
        """Adds what another reading of the same constant says. The value stays: what was given out
        with it must not change."""
        low_ns, high_ns = max(self.low_ns, other.low_ns), min(self.high_ns, other.high_ns)
        if low_ns <= high_ns:
            self.low_ns, self.high_ns = low_ns, high_ns


class UnixClock:
    """Makes Unix time of times of CLOCK_MONOTONIC. It looks for jumps at every call, and may be
    used by several threads."""

    def __init__(self, read: Callable[[], Reading] = read_clocks) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._checked_ns = 0  # the last time of CLOCK_MONOTONIC up to which no jump is unknown
        self._setting: _Difference | None = None  # of the wall clock, against CLOCK_BOOTTIME
        # CLOCK_BOOTTIME against CLOCK_MONOTONIC: the present one, and all so far, each with the
        # time of CLOCK_MONOTONIC from which on it applies.
        self._suspended: _Difference | None = None
        self._since_ns: list[int] = []
        self._suspended_ns: list[int] = []

    def unix_ns(self, monotonic_ns: NDArray[Any]) -> NDArray[np.int64]:
        """Unix time in nanoseconds of MONOTONIC_NS, integers of any shape.

        Equal times give equal results, from whichever call, unless the wall clock was stepped in
        between. A time after the last call but before a suspend is taken to be after it.
        """
        times = monotonic_ns.astype(np.int64)
        with self._lock:
            setting_ns = self._check()
            if len(self._since_ns) == 1:
                times += setting_ns + self._suspended_ns[0]
                return times
            segments = np.searchsorted(self._since_ns[1:], times, side="right")
            times += np.array(self._suspended_ns)[segments] + setting_ns
            return times

    def unix_ns_of(self, *monotonic_ns: int) -> list[int]:
        """`unix_ns` of a few times that are in no array."""
        with self._lock:
            setting_ns = self._check()
            segments = [bisect_right(self._since_ns, each, lo=1) - 1 for each in monotonic_ns]
            return [
                each + setting_ns + self._suspended_ns[segment]
                for each, segment in zip(monotonic_ns, segments, strict=True)
            ]

    def now_ns(self) -> int:
        """The present Unix time in nanoseconds, in step with `unix_ns`."""
        return self.unix_ns_of(time.monotonic_ns())[0]

    def _check(self) -> int:
        """Notes jumps since the last time; the setting of the wall clock, in nanoseconds."""
        reading = self._read()
        setting, suspended = _differences(reading)
        if not (
            self._setting
            and self._suspended
            and self._setting.agrees(setting)
            and self._suspended.agrees(suspended)
        ):
            readings = (reading, *(self._read() for _ in range(_READINGS - 1)))
            reading = min(readings, key=lambda one: one.width_ns)
            setting, suspended = _differences(reading)
            if not self._setting or not self._setting.agrees(setting):
                self._setting = setting
            if not self._suspended or not self._suspended.agrees(suspended):
                self._suspended = suspended
                self._since_ns.append(self._checked_ns + 1)
                self._suspended_ns.append(suspended.value_ns)
                del self._since_ns[:-_MOST_SUSPENDS], self._suspended_ns[:-_MOST_SUSPENDS]
        self._setting.narrow(setting)
        self._suspended.narrow(suspended)
        self._checked_ns = reading.monotonic_ns
        return self._setting.value_ns


def _differences(reading: Reading) -> tuple[_Difference, _Difference]:
    """The bounds of the wall clock against CLOCK_BOOTTIME, and of that against CLOCK_MONOTONIC."""
    first, last = reading.boot_ns, reading.boot_after_ns
    return (
        _Difference(reading.unix_ns - last, reading.unix_ns - first),
        _Difference(first - reading.monotonic_ns, last - reading.monotonic_ns),
    )


CLOCK: Final = UnixClock()
"""The clock of this process."""
