"""How long a tap has watched: from its start to its end, also while nothing happened.

All times are the agent's clock, as Unix time in nanoseconds.
"""

from __future__ import annotations

from typing import Final

from coral.mesh.v1 import ebpf_pb2 as pb

# A rate over less than half a second is an extrapolation, unless every interval is that short:
# then it is one over less than half an interval. No interval is shorter than 100 ms, but the first
# may be, which ends as soon as there is anything to show, and the last.
_LONG_S: Final = 0.5
_SHORT_S: Final = 0.05
_QUIET_S: Final = 2.0


class Intervals:
    """The time that a tap has watched, and the intervals that brought rows."""

    def __init__(self) -> None:
        self.latest_s = 0.0  # the last interval that brought rows
        self._latest = 0, 0
        self._longest_s = 0.0
        self._began_ns: int | None = None
        self.reached_ns = 0  # up to when the collector is known to have watched

    def begin(self, at_ns: int) -> None:
        """Notes when the collector began to watch."""
        self._began_ns = at_ns
        self.reach(at_ns)

    def reach(self, at_ns: int) -> None:
        """Notes that the collector has watched until then."""
        self.reached_ns = max(self.reached_ns, at_ns)

    def add(self, batch: pb.EbpfEventBatch) -> bool:
        """Takes in the interval of a batch with rows. True where it is another one than that of
        the batch before: an interval may come in several batches."""
        interval = batch.interval_start_ns, batch.interval_end_ns
        self.reach(interval[1])
        if self._began_ns is None or interval[0] < self._began_ns:
            self._began_ns = interval[0]
        if interval == self._latest:
            return False
        self._latest = interval
        self.latest_s = (interval[1] - interval[0]) / 1e9
        self._longest_s = max(self._longest_s, self.latest_s)
        return True

    @property
    def seconds(self) -> float:
        """How long the collector has watched."""
        return 0.0 if self._began_ns is None else (self.reached_ns - self._began_ns) / 1e9

    @property
    def quiet_s(self) -> float:
        """How long ago the latest interval with rows ended."""
        return (self.reached_ns - self._latest[1]) / 1e9 if self._latest[1] else self.seconds

    def is_quiet(self, quiet_s: float) -> bool:
        """Whether QUIET_S without rows is so long that the latest interval is not the present."""
        return quiet_s > max(2 * self.latest_s, _QUIET_S)

    @property
    def rate_s(self) -> float:
        """Over how many seconds a rate of the latest interval is taken; 0 where the interval is
        too short for a rate."""
        least_s = min(max(self._longest_s / 2, _SHORT_S), _LONG_S)
        return self.latest_s if self.latest_s >= least_s else 0.0

    @property
    def total_rate_s(self) -> float:
        """Over how many seconds a rate of the whole is taken; 0 where that is too short."""
        return self.seconds if self.seconds >= _LONG_S else 0.0
