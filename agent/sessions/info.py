"""A session as the contract describes it."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from coral.agent.sessions.session import Session
from coral.agent.streams.frame import loss_messages
from coral.mesh.v1 import ebpf_pb2 as pb


def info_of(session: Session, whose: str | None = None) -> pb.CollectorInfo:
    """The session as it is now: its lease, its account, its subscribers, its end. With WHOSE, a
    caller's name, its subscribers are those of that caller alone."""
    channel = session.channel
    info = pb.CollectorInfo(
        collector_id=session.id,
        kind=session.kind,
        service_name=session.service_name,
        started_at=timestamp(session.started_at),
        expires_at=None if session.continuous else timestamp(session.expires_at),
        continuous=session.continuous,
        config=session.config,
        produced=channel.produced,
        lost=loss_messages(channel.lost_in_kernel),
        map_memory_bytes=session.map_memory_bytes,
        attributes=session.attributes,
    )
    for subscription in channel.subscriptions:
        if whose is not None and subscription.terms.principal != whose:
            continue
        account = subscription.account
        info.subscribers.add(
            peer=subscription.terms.peer,
            queued_events=account.queued,
            queued_bytes=account.queued_bytes,
            delivered=account.delivered,
            lost=sum(account.lost.values()),
            filtered=account.filtered,
            lag=account.queued,
            losses=loss_messages(account.lost),
        )
    if session.end:
        info.ended_at.CopyFrom(timestamp(session.ended_at))
        info.end.CopyFrom(
            pb.SessionEnd(
                reason=session.end.reason,
                detail=session.end.detail,
                produced=channel.produced,
                lost_in_kernel=info.lost,
            )
        )
    return info


def timestamp(unix_s: float) -> Timestamp:
    """UNIX_S as the contract's message."""
    made = Timestamp()
    made.FromNanoseconds(int(unix_s * 1e9))
    return made
