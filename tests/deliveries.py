"""Deliveries to a colony's store, of batches that the agent's own encoders made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from coral.agent.streams import Channel, Header
from coral.client import Batch, Kind
from coral.collectors.contract import Batch as Made
from coral.collectors.contract import EventRows, Summaries
from coral.colony.delivery import Delivery, Session
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import field_of, kind_name

NOW_NS: Final = 1_700_000_040 * 10**9
"""When the deliveries are from: a whole minute."""
INTERVAL_NS: Final = 10 * 10**9


def session_of(kind: int, agent: str = "node-1", **more: Any) -> Session:
    """A session of an agent."""
    given: dict[str, Any] = {"collector_id": f"{agent}-{kind_name(kind)}", "service": "shop"} | more
    return Session(agent, kind=Kind(kind), started_ns=NOW_NS, **given)


def wire_of(
    rows: Summaries | EventRows,
    end_ns: int = NOW_NS,
    attributes: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes of a batch of ROWS, as the agent sends them."""
    kind = field_of(rows.message.DESCRIPTOR).kind
    channel = Channel(Header("c-1", kind, "node-1", "shop"), 1 << 30)  # type: ignore[arg-type]
    channel.publish(Made(rows, end_ns - INTERVAL_NS, end_ns, attributes=attributes or {}))
    (frame,) = channel.kept or [channel.control(1, 0, end_ns)]
    return frame.wire(columns=True)


def delivered(batch: Batch, session: Session | None = None, **more: Any) -> Delivery:
    """A batch as a follower hands it on."""
    return Delivery(
        session or session_of(batch.kind, **more),
        batch,
        batch.first_seq - 1,
        batch.last_seq,
        batch.last_seq,
        batch.message.interval_end_ns or NOW_NS,
        1000,
    )


def delivery_of(
    rows: Summaries | EventRows,
    end_ns: int = NOW_NS,
    attributes: Mapping[str, str] | None = None,
    session: Session | None = None,
    **more: Any,
) -> Delivery:
    """The same of ROWS, over the wire."""
    return delivered(Batch.parse(wire_of(rows, end_ns, attributes)), session, **more)


def message_of(wire: bytes) -> pb.EbpfEventBatch:
    """A batch as protobuf's own parser has it: to be changed, and sent again."""
    return pb.EbpfEventBatch.FromString(wire)
