"""What was read from the stream becomes deliveries that go on where the store ends: each event
once, those that are missing counted. No connection, no loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from coral.client import ContractError
from coral.colony.bus.envelope import Told
from coral.colony.delivery import Delivery, Session, Standing

EVICTED: Final = "bus_evicted"
"""The stage of events that the stream dropped, by its limits, before they were read."""
OVERLAPPED: Final = "bus_overlapped"
"""The stage of events in a batch of which others are stored already: it cannot be split. It takes a
stream that was made anew while agents still had their sessions."""
UNREADABLE: Final = "bus_unreadable"
"""The stage of events in a payload that is no batch of the contract, or not the one told of."""
_STAGES: Final = frozenset({EVICTED, OVERLAPPED, UNREADABLE})

Key = tuple[str, str]
Recall = Callable[[str, str], Standing | None]


class OutOfOrderError(Exception):
    """A message was skipped: it was sent to a reader that is gone, and would come later. Reading
    must begin anew after the last one that is stored."""


class Order:
    """The order of the messages of one consumer: its numbers have no holes, and the stream's
    numbers grow. What was sent before comes with a number of the stream that was there."""

    def __init__(self) -> None:
        self._consumer_seq = 0
        self._stream_seq = 0

    def is_new(self, stream_seq: int, consumer_seq: int) -> bool:
        """Whether the message is not one that was read before. Raises `OutOfOrderError`."""
        if consumer_seq != self._consumer_seq + 1:
            raise OutOfOrderError(f"after message {self._consumer_seq} came {consumer_seq}")
        self._consumer_seq = consumer_seq
        if stream_seq <= self._stream_seq:
            return False
        self._stream_seq = stream_seq
        return True


@dataclass(slots=True)
class _Line:
    session: Session
    last_seq: int = 0
    lost: Counter[str] = field(default_factory=Counter)


class Inbox:
    """RECALL says how a session stands in the store, by agent and session."""

    def __init__(self, recall: Recall) -> None:
        self._recall = recall
        self._lines: dict[Key, _Line] = {}
        self._ended: set[Key] = set()
        self.repeated = 0
        self.lost: Counter[str] = Counter()
        """Events that were lost between followers and this store, by stage of this file."""

    def take(self, told: Told, payload: bytes) -> Delivery | None:
        """The message as a delivery for the store; None for what is stored."""
        line = self._line(told)
        has_events = told.last_seq > told.after_seq
        if told.last_seq < line.last_seq or (has_events and told.last_seq == line.last_seq):
            self.repeated += 1
            return None
        session = told.of
        if session != line.session:
            line.session = session
        if told.after_seq < line.last_seq:
            lost = Counter({OVERLAPPED: told.last_seq - line.last_seq})
            delivery = _without_rows(told, line, lost)
        else:
            more = _missing(told, line)
            try:
                delivery = told.delivery(line.session, payload, line.last_seq, more)
                readable = delivery.rows == told.rows
            except ContractError:
                readable = False
            if not readable:
                lost = Counter(more) + Counter(told.lost) + Counter({UNREADABLE: told.rows})
                delivery = _without_rows(told, line, lost)
        for stage in _STAGES & delivery.lost.keys():
            self.lost[stage] += delivery.lost[stage]
        line.last_seq = told.last_seq
        line.lost.update(delivery.lost)
        if told.ended:
            self._ended.add(told.key)
        return delivery

    def ended(self) -> frozenset[Key]:
        """The sessions whose end was taken since they were forgotten last."""
        return frozenset(self._ended)

    def forget(self, ended: frozenset[Key]) -> None:
        """The store has all of these: what it says of them is true from now on."""
        for key in ended:
            self._lines.pop(key, None)
        self._ended -= ended

    def _line(self, told: Told) -> _Line:
        line = self._lines.get(told.key)
        if line is None:
            standing = self._recall(*told.key)
            line = self._lines[told.key] = _Line(standing.session if standing else told.of)
            if standing:
                line.last_seq, line.lost = standing.last_seq, Counter(standing.lost)
        return line


def _without_rows(told: Told, line: _Line, lost: Mapping[str, int]) -> Delivery:
    return replace(told.delivery(line.session, b"", line.last_seq), lost=lost)


def _missing(told: Told, line: _Line) -> Mapping[str, int]:
    """Where the events between those of LINE and those of TOLD are: the ones that were lost before
    they were published keep their stages, the others were published, and are gone."""
    count = told.after_seq - line.last_seq
    if not count:
        return {}
    before = Counter(told.all_lost)
    before.subtract(told.lost)
    before.subtract(line.lost)
    known = +before
    if known.total() > count:  # the stream was made anew: its figures are of another account
        return {EVICTED: count}
    if known.total() < count:
        known[EVICTED] += count - known.total()
    return known
