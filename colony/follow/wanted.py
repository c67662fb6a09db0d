"""The collectors that are wanted on an agent, and those at work there: what to start, and which
lease to renew. Loop-free; callers pass the time, in seconds of a monotonic clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from coral.client import CollectorInfo, Kind
from coral.wire.leases import MAX_LEASE_S

_FIRST_PAUSE_S: Final = 1.0
_MOST_PAUSE_S: Final = 300.0
_STEADY_S: Final = 60.0
"""A collector that has been at work for this long starts again without a pause."""
# How often and how finely it looks, not what it looks at.
_RATES: Final = frozenset({"interval", "frequency"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """A collector that is to be at work on every agent, with leases of `lease_s` seconds."""

    kind: Kind
    service: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    lease_s: float = MAX_LEASE_S

    def is_met_by(self, info: CollectorInfo) -> bool:
        """Whether the collector that INFO describes is this one, whoever started it: this colony in
        an earlier life, another colony, or the agent's configuration, which chooses its own
        rates."""
        if info.end or info.kind != self.kind:
            return False
        # An agent names one that watches pods after them.
        if self.service and info.service_name != self.service:
            return False
        return self._looks_at(self.config, info) == self._looks_at(info.config, info)

    @staticmethod
    def _looks_at(config: Mapping[str, str], info: CollectorInfo) -> Mapping[str, str]:
        if not info.continuous:
            return config
        return {name: text for name, text in config.items() if name not in _RATES}

    def __str__(self) -> str:
        return " ".join(filter(None, (self.kind.name, self.service)))


@dataclass(frozen=True, slots=True)
class Start:
    """Start a collector."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Renew:
    """Renew the lease of a collector."""

    wanted: Wanted
    collector_id: str


class _Place:
    """How one wanted collector stands."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.collector_id = ""
        self.continuous = False
        self.since_s = 0.0
        self.due_s = 0.0
        self.is_asked = False  # and has not answered
        self.failures = 0
        self.why = ""


class Upkeep:
    """Keeps WANTED at work on one agent. Every action of `due` is answered with `started`,
    `renewed` or `refused`. JITTER is from 0 to 1."""

    def __init__(
        self, wanted: Iterable[Wanted], jitter: Callable[[], float] = random.random
    ) -> None:
        self._places = [_Place(each) for each in wanted]
        self._jitter = jitter

    @property
    def missing(self) -> Mapping[str, str]:
        """Those that are not at work, and why, in the agent's words."""
        return {str(it.wanted): it.why for it in self._places if not it.collector_id}

    def begin(self, infos: Iterable[CollectorInfo], now_s: float) -> None:
        """A connection stands; INFOS are the collectors at work. Those that are wanted are
        adopted."""
        for place in self._places:
            place.is_asked, place.collector_id, place.due_s = False, "", now_s
        for info in infos:
            self.appears(info, now_s)

    def appears(self, info: CollectorInfo, now_s: float) -> None:
        """A collector is at work."""
        for place in self._places:
            if place.collector_id == info.collector_id:
                return
            if not place.collector_id and place.wanted.is_met_by(info):
                place.collector_id, place.continuous = info.collector_id, info.continuous
                place.since_s = now_s
                # How much is left of its lease is known by the agent's clock alone.
                place.due_s = now_s
                return

    def disappears(self, collector_id: str, why: str, now_s: float) -> None:
        """A collector has ended, for the reason WHY."""
        for place in self._places:
            if place.collector_id == collector_id:
                place.collector_id = ""
                if now_s - place.since_s >= _STEADY_S:
                    place.failures = 0
                self._pause(place, why, now_s)

    def due(self, now_s: float) -> Sequence[Start | Renew]:
        """What to do now."""
        actions: list[Start | Renew] = []
        for place in self._places:
            if place.is_asked or place.due_s > now_s or (place.continuous and place.collector_id):
                continue
            place.is_asked = True
            if place.collector_id:
                actions.append(Renew(place.wanted, place.collector_id))
            else:
                actions.append(Start(place.wanted))
        return actions

    def next_s(self) -> float:
        """When something is due next; infinity for never."""
        return min(
            (it.due_s for it in self._places
             if not it.is_asked and not (it.continuous and it.collector_id)),
            default=float("inf"),
        )  # fmt: skip

    def done(self, action: Start | Renew, collector_id: str, now_s: float) -> None:
        """The agent did ACTION; the collector has COLLECTOR_ID."""
        place = self._place(action)
        place.is_asked = False
        if place.collector_id != collector_id:
            place.collector_id, place.continuous = collector_id, False
            place.since_s = now_s
        place.why = ""
        place.due_s = now_s + place.wanted.lease_s / 3

    def refused(self, action: Start | Renew, why: str, now_s: float) -> None:
        """The agent did not do ACTION, because WHY. A collector that could not be renewed is
        reported again or has ended."""
        place = self._place(action)
        place.is_asked = False
        self._pause(place, why, now_s)

    def _place(self, action: Start | Renew) -> _Place:
        return next(it for it in self._places if it.wanted is action.wanted)

    def _pause(self, place: _Place, why: str, now_s: float) -> None:
        """The first try is soon; then pauses double, with a jitter of a half, so that a thousand
        agents do not ask at once."""
        ceiling_s = min(_FIRST_PAUSE_S * 2.0 ** min(place.failures, 30), _MOST_PAUSE_S)
        place.failures += 1
        place.why = why
        place.due_s = now_s + ceiling_s * (1 + self._jitter()) / 2
