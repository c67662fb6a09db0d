"""What a message says beside its payload, which is the batch as the agent sent it, or nothing.

The headers are

    Nats-Msg-Id     agent/session/last_seq; the server stores each once
    Coral-Delivery  the delivery without its batch, in JSON: the fields of `Told`

so that readers in any language find an EbpfEventBatch of the contract in the payload. Other
messages have no payload, and in place of the latter `Coral-Gap` or `Coral-Agent`: see `Gap` and
`AgentSeen`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Final

import msgspec

from coral.client import Batch, Kind
from coral.colony.bus.subjects import token
from coral.colony.delivery import AgentSeen, Delivery, Ended, Gap, Session, Standing

TOO_LARGE: Final = "bus_too_large"
"""The stage of events whose batch is larger than the server accepts."""

MESSAGE_ID: Final = "Nats-Msg-Id"
EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
DELIVERY: Final = "Coral-Delivery"
GAP: Final = "Coral-Gap"
SEEN: Final = "Coral-Agent"


# Anybody may publish: what is read keeps within what databases hold, and memory.
_MOST: Final = 1 << 62
Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
TimeNs = Annotated[int, msgspec.Meta(ge=-_MOST, le=_MOST)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]+\Z", max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Texts = Annotated[Mapping[Text, Text], msgspec.Meta(max_length=256)]
Counts = Annotated[Mapping[Name, Count], msgspec.Meta(max_length=256)]


class ToldEnd(msgspec.Struct, frozen=True):
    """See `Ended`."""

    reason: Text
    detail: Text
    at_ns: TimeNs


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """A delivery without its batch, and the session's account up to it: `all_stored` and
    `all_lost` count from the session's first event, this delivery included."""

    agent: Name
    session: Name
    kind: TimeNs
    after_seq: Count
    last_seq: Count
    produced: Count
    time_ns: TimeNs
    service: Text = ""
    started_ns: TimeNs = 0
    rows: Count = 0
    config: Texts = {}
    attributes: Texts = {}
    lost: Counts = {}
    lost_in_kernel: Counts = {}
    ended: ToldEnd | None = None
    all_stored: Count = 0
    all_lost: Counts = {}

    def __post_init__(self) -> None:
        """Raises ValueError where events are missing, which decoders report as their own error."""
        if self.last_seq - self.after_seq != self.rows + sum(self.lost.values()):
            raise ValueError(
                f"events {self.after_seq + 1} to {self.last_seq} are not {self.rows} rows and "
                f"{dict(self.lost)} lost"
            )

    @property
    def key(self) -> tuple[str, str]:
        """That of the session."""
        return self.agent, self.session

    @property
    def of(self) -> Session:
        """The session."""
        return Session(
            self.agent,
            self.session,
            Kind(self.kind),
            self.service,
            self.started_ns,
            self.config,
            self.attributes,
        )

    @property
    def standing(self) -> Standing:
        """How the session stands after it."""
        return Standing(
            self.of,
            self.last_seq,
            self.produced,
            self.all_stored,
            self.time_ns,
            self.all_lost,
            self.lost_in_kernel,
            self._ended,
        )

    def delivery(
        self,
        session: Session,
        payload: bytes,
        after_seq: int | None = None,
        more_lost: Mapping[str, int] | None = None,
    ) -> Delivery:
        """The delivery, of SESSION; with MORE_LOST, events before it that are lost, it goes on
        after AFTER_SEQ. Raises `ContractError` for a payload that is no batch."""
        lost = dict(self.lost)
        if more_lost:
            lost = dict(Counter(lost) + Counter(more_lost))
        return Delivery(
            session,
            Batch.parse(payload) if payload else None,
            self.after_seq if after_seq is None else after_seq,
            self.last_seq,
            self.produced,
            self.time_ns,
            len(payload),
            lost,
            self.lost_in_kernel,
            self._ended,
        )

    @property
    def _ended(self) -> Ended | None:
        end = self.ended
        return Ended(end.reason, end.detail, end.at_ns) if end else None


def told(delivery: Delivery, stored: int, lost: Mapping[str, int]) -> Told:
    """What is said of DELIVERY; STORED and LOST are the session's account before it."""
    session, end = delivery.session, delivery.ended
    return Told(
        session.agent_id,
        session.collector_id,
        int(session.kind),
        delivery.after_seq,
        delivery.last_seq,
        delivery.produced,
        delivery.time_ns,
        session.service,
        session.started_ns,
        delivery.rows,
        session.config,
        session.attributes,
        delivery.lost,
        delivery.lost_in_kernel,
        ToldEnd(end.reason, end.detail, end.at_ns) if end else None,
        stored + delivery.rows,
        Counter(lost) + Counter(delivery.lost) if delivery.lost else lost,
    )


def without_rows(it: Told) -> Told:
    """The same where the rows cannot be sent: they are lost."""
    more = {TOO_LARGE: it.rows}
    return msgspec.structs.replace(
        it,
        rows=0,
        lost=dict(Counter(it.lost) + Counter(more)),
        all_stored=it.all_stored - it.rows,
        all_lost=dict(Counter(it.all_lost) + Counter(more)),
    )


def message_id(it: Told) -> str:
    """Two messages with the same events have the same. One without events only says how the session
    stands, or that it has ended, so its time is part of it."""
    name = f"{token(it.agent)}/{token(it.session)}/{it.last_seq}"
    return name if it.last_seq > it.after_seq else f"{name}@{it.time_ns}"


def headers_apart(it: Gap | AgentSeen) -> dict[str, str]:
    """The headers of a message that belongs to no session."""
    agent = token(it.agent_id)
    if isinstance(it, Gap):
        return {MESSAGE_ID: f"{agent}/gap/{it.from_ns}-{it.to_ns}", GAP: header(it)}
    return {MESSAGE_ID: f"{agent}/seen/{it.seen_ns}", SEEN: header(it)}


def header(value: Told | Gap | AgentSeen) -> str:
    """VALUE as the value of a header: JSON on one line, in ASCII."""
    encoded = _encoder.encode(value)
    return encoded.decode() if encoded.isascii() else json.dumps(json.loads(encoded))


def told_of(headers: Mapping[str, str] | None) -> Told | None:
    """What the headers of a message say of a delivery; None for other messages. Raises
    `msgspec.MsgspecError`."""
    value = (headers or {}).get(DELIVERY)
    return _told.decode(value) if value else None


def gap_of(headers: Mapping[str, str] | None) -> Gap | None:
    """The same of a gap."""
    value = (headers or {}).get(GAP)
    gap = _gap.decode(value) if value else None
    if gap:
        _check(gap.agent_id, gap.from_ns, gap.to_ns)
    return gap


def seen_of(headers: Mapping[str, str] | None) -> AgentSeen | None:
    """The same of an agent."""
    value = (headers or {}).get(SEEN)
    seen = _seen.decode(value) if value else None
    if seen:
        _check(seen.agent_id, seen.seen_ns)
    return seen


def _check(agent_id: str, *times_ns: int) -> None:
    msgspec.convert(agent_id, Name)
    for time_ns in times_ns:
        msgspec.convert(time_ns, TimeNs)


_encoder: Final = msgspec.json.Encoder()
_told: Final = msgspec.json.Decoder(Told)
_gap: Final = msgspec.json.Decoder(Gap)
_seen: Final = msgspec.json.Decoder(AgentSeen)
