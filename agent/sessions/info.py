"""A session as the contract describes it."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from coral.agent.sessions.session import Session
from coral.mesh.v1 import ebpf_pb2 as pb


def info_of(session: Session) -> pb.CollectorInfo:
    """The session as it is now: its lease, its account, its subscribers, its end."""
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
        lost=_losses(channel.lost_in_kernel),
        map_memory_bytes=session.map_memory_bytes,
    )
    for subscription in channel.subscriptions:
        account = subscription.account
        info.subscribers.add(
            peer=subscription.terms.peer,
            queued_events=account.queued,
            queued_bytes=account.queued_bytes,
            delivered=account.delivered,
            lost=sum(account.lost.values()),
            filtered=account.filtered,
            lag=channel.produced - subscription.last_delivered_seq,
            losses=_losses(account.lost),
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


def _losses(counts: Mapping[int, int]) -> list[pb.Loss]:
    return [
        pb.Loss(stage=stage, count=count)  # type: ignore[arg-type]
        for stage, count in counts.items()
        if count
    ]
