"""The label sets of one kind's Prometheus metrics: bounded, and the idle ones give way. Loop-free.

A counter that Prometheus scrapes may vanish and later begin again at 0, which it takes for a
restart; it may not go down, or jump by events of the past. So a label set that gives way is exposed
no more, and its sums are dropped: added to `other`, they would look like events of now. `other`
itself never gives way.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from itertools import islice
from typing import Any, Final, Generic, Self, TypeVar

from numpy.typing import NDArray
from prometheus_client.utils import floatToGoString

# A label set that nothing was added to for this long may give way to a new one.
IDLE_S: Final = 600.0

Key = TypeVar("Key", bound=Hashable)


class SeriesTable(Generic[Key]):
    """An array of counters for each label set: at most MAX_SERIES, and OTHER for the rest."""

    def __init__(
        self, max_series: int, other: Key, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_series = max_series
        self._other_key = other
        self._other: NDArray[Any] | None = None
        self._clock = clock
        self._series: OrderedDict[Key, NDArray[Any]] = OrderedDict()  # idle longest first
        self._added_at: dict[Key, float] = {}

    def add(self, key: Key, figures: NDArray[Any]) -> None:
        """Adds FIGURES, of shape (width,), to the counters of KEY, or to OTHER without room."""
        if key == self._other_key or not self.has_room(key, self._max_series):
            self._other = figures.copy() if self._other is None else self._other + figures
            return
        if key in self._series:
            self._series[key] += figures
        else:
            self._series[key] = figures.copy()
        if figures.any():
            self._series.move_to_end(key)
            self._added_at[key] = self._clock()
        self._added_at.setdefault(key, self._clock())

    def has_room(self, key: Key, most: int) -> bool:
        """Whether KEY is here, or would be one of at most MOST; idle label sets give way for it."""
        if key in self._series:
            return True
        excess = len(self._series) + 1 - most
        longest_idle = list(islice(self._series, max(0, excess)))
        now = self._clock()
        if any(now - self._added_at[idle] < IDLE_S for idle in longest_idle):
            return False
        for idle in longest_idle:
            del self._series[idle], self._added_at[idle]
        return True

    def copy(self) -> dict[Key, NDArray[Any]]:
        """The counters by label set, as they are now."""
        series = {key: counters.copy() for key, counters in self._series.items()}
        if self._other is not None:
            series[self._other_key] = self._other
        return series


def le(bound: float) -> str:
    """An upper bound as the label `le` has it in its canonical form: `0.001`, `1.0`, `+Inf`."""
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]


class Service(str):
    """The label `service` of what is of pods, with MORE labels that come with it, and the same as
    ATTRIBUTES of a resource of OpenTelemetry. Services of one name with other labels are others."""

    more: Mapping[str, str]
    attributes: Mapping[str, str]
    __slots__ = ("attributes", "more")

    def __new__(cls, name: str, more: Mapping[str, str], attributes: Mapping[str, str]) -> Self:
        """A text with these."""
        service = super().__new__(cls, name)
        service.more, service.attributes = dict(more), dict(attributes)
        return service

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True and getattr(other, "more", {}) == self.more

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), *self.more.items()))
