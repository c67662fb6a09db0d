"""Deliveries on their way to the stream: in order for each session, one of a session at a time, so
that each message follows on the one before it in the stream. No connection, no loop.

A message is sent with the number that the session's last message has in the stream, and the server
refuses it if that is not so. This way a message that is sent again, by this process or by one that
was killed, is never stored twice or out of order, however long ago the first one was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import structlog

from coral.colony.bus import envelope, subjects
from coral.colony.bus.envelope import Told
from coral.colony.delivery import AgentSeen, Delivery, Gap, SequenceError, Standing

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

Key = tuple[str, str]

_MORE_HEADERS_BYTES: Final = 128  # `EXPECTED`, and what the protocol needs


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """What waits to be published; `number` counts what was admitted."""

    number: int
    subject: str
    headers: Mapping[str, str]
    payload: bytes
    size_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Numbered(Message):
    """A delivery."""

    told: Told


@dataclass(slots=True, eq=False)
class _Line:
    """One session. `last_seq`, `stored` and `lost` count what was admitted; `stream` is what the
    stream has, `stream_seq` the number of its last message there."""

    last_seq: int = 0
    stored: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    stream: Told | None = None
    stream_seq: int = 0
    waiting: deque[Numbered] = field(default_factory=deque)
    busy: bool = False


class Outbox:
    """PREFIX is that of all subjects; messages of more than MOST_BYTES are not accepted by the
    server. FOUND is the last message of each session in the stream, with its number there."""

    def __init__(
        self, prefix: str, most_bytes: int, found: Iterable[tuple[Told, int]] = ()
    ) -> None:
        self._prefix = prefix
        self._most_bytes = most_bytes
        self._lines: dict[Key, _Line] = {}
        self._ready: deque[_Line] = deque()
        self._apart: deque[Message] = deque()  # what belongs to no session
        self._outstanding: dict[int, None] = {}
        self._next_number = 1
        self.waiting_bytes = 0
        # Since the beginning.
        self.too_large = 0  # events
        self.repeated = 0  # messages whose events the stream had
        self.diverged = 0  # how often somebody else had published some of a message's events
        for told, stream_seq in found:
            line = _Line(told.last_seq, told.all_stored, told.all_lost, told, stream_seq)
            self._lines[told.key] = line

    def __len__(self) -> int:
        """How many messages the stream does not have yet."""
        return len(self._outstanding)

    @property
    def last_number(self) -> int:
        """The number of the message that was admitted last."""
        return self._next_number - 1

    def has_all_up_to(self, number: int) -> bool:
        """Whether the stream has all messages up to that number."""
        return next(iter(self._outstanding), number + 1) > number

    def standing(self, agent_id: str, collector_id: str) -> Standing | None:
        """What the stream has of a session."""
        line = self._lines.get((agent_id, collector_id))
        return line.stream.standing if line and line.stream else None

    def standings(self) -> Iterator[Standing]:
        """The same of all."""
        return (line.stream.standing for line in self._lines.values() if line.stream)

    def forget(self, before_ns: int) -> None:
        """Drops sessions that ended before that time."""
        for key, line in tuple(self._lines.items()):
            end = line.stream.ended if line.stream else None
            if end and end.at_ns < before_ns and not line.waiting and not line.busy:
                del self._lines[key]

    def admit(self, delivery: Delivery) -> bool:
        """Queues DELIVERY; False for one that was admitted before. Raises `SequenceError` where it
        does not follow on."""
        key = delivery.session.key
        line = self._lines.setdefault(key, _Line())
        after, last = delivery.after_seq, delivery.last_seq
        if after != line.last_seq:
            if last <= line.last_seq:
                return False
            raise SequenceError(
                f"session {key}: a delivery goes on after event {after}, and the stream has "
                f"{line.last_seq}",
                line.last_seq,
            )
        told = envelope.told(delivery, line.stored, line.lost)
        payload = delivery.batch.wire if delivery.batch else b""
        headers = _headers(told)
        if _size(headers, payload) > self._most_bytes:
            self.too_large += told.rows
            told, payload = envelope.without_rows(told), b""
            headers = _headers(told)
        line.last_seq, line.stored, line.lost = last, told.all_stored, told.all_lost
        subject = subjects.of_session(self._prefix, *key)
        size = _size(headers, payload)
        message = Numbered(self._enter(size), subject, headers, payload, size, told)
        line.waiting.append(message)
        if not line.busy and len(line.waiting) == 1:
            self._free(line)
        return True

    def admit_apart(self, it: Gap | AgentSeen) -> None:
        """Queues what belongs to no session."""
        headers = envelope.headers_apart(it)
        subject, size = subjects.of_agent(self._prefix, it.agent_id), _size(headers, b"")
        self._apart.append(Message(self._enter(size), subject, headers, b"", size))

    def next(self) -> Message | None:
        """A message that may be sent now. It is on its way until `stored`, or until `refused` says
        that it is not sent again."""
        if self._apart:
            return self._apart.popleft()
        if not self._ready:
            return None
        line = self._ready.popleft()
        line.busy = True
        return line.waiting[0]

    def headers(self, message: Message) -> dict[str, str]:
        """Those with which MESSAGE is sent now."""
        if not isinstance(message, Numbered):
            return dict(message.headers)
        after = self._lines[message.told.key].stream_seq
        return {**message.headers, envelope.EXPECTED: str(after)}

    def stored(self, message: Message, stream_seq: int) -> None:
        """The stream has MESSAGE, under that number."""
        self._over(message)
        if isinstance(message, Numbered):
            line = self._lines[message.told.key]
            line.stream, line.stream_seq = message.told, stream_seq
            line.waiting.popleft()
            self._free(line)

    def refused(self, message: Numbered, found: Told | None, stream_seq: int) -> bool:
        """The server says that MESSAGE does not follow on the last one of its session, which is
        FOUND, under that number; None where the stream has none, or none any more. Returns whether
        it is to be sent again.

        The stream can have less than before: messages grow old, and a machine that loses its power
        loses what its disk had not got. Readers count what is between as lost.
        """
        line = self._lines[message.told.key]
        line.stream, line.stream_seq = found, stream_seq
        self._settle(line)
        if line.waiting and line.waiting[0] is message:
            return True
        self._free(line)
        return False

    def _settle(self, line: _Line) -> None:
        """Drops what the stream has of what waits. Where it has some of the events of a message, it
        cannot have the others: then everything that waits is dropped, and the session's next
        delivery must go on where the stream ends."""
        stream = line.stream
        while stream and line.waiting and line.waiting[0].told.after_seq < stream.last_seq:
            if line.waiting[0].told.last_seq <= stream.last_seq:
                self._over(line.waiting.popleft())
                self.repeated += 1
                continue
            while line.waiting:
                self._over(line.waiting.popleft())
            line.last_seq, line.stored, line.lost = (
                stream.last_seq, stream.all_stored, stream.all_lost,
            )  # fmt: skip
            self.diverged += 1
            log.error(
                "somebody else publishes a session too", agent=stream.agent,
                session=stream.session, last_seq=stream.last_seq,
            )  # fmt: skip

    def _enter(self, size_bytes: int) -> int:
        """The number of a message that is new."""
        number = self._next_number
        self._next_number += 1
        self._outstanding[number] = None
        self.waiting_bytes += size_bytes
        return number

    def _over(self, message: Message) -> None:
        del self._outstanding[message.number]
        self.waiting_bytes -= message.size_bytes

    def _free(self, line: _Line) -> None:
        line.busy = False
        self._settle(line)
        if line.waiting:
            self._ready.append(line)


def _headers(told: Told) -> dict[str, str]:
    return {
        envelope.MESSAGE_ID: envelope.message_id(told),
        envelope.DELIVERY: envelope.header(told),
    }


def _size(headers: Mapping[str, str], payload: bytes) -> int:
    return len(payload) + sum(map(len, headers.values())) + _MORE_HEADERS_BYTES
