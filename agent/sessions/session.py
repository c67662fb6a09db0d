"""One session: a collector at work, its lease, its stream, and how it ended."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from coral.agent.config import Config
from coral.agent.errors import InvalidRequestError
from coral.agent.sessions.budget import Priority
from coral.agent.streams.channel import Channel, Header, Subscription, Terms
from coral.collectors.contract import Collector
from coral.collectors.options import format_duration
from coral.mesh.v1 import ebpf_pb2 as pb


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What to start. KIND is a kind's name or number; DURATION_S None takes the agent's default."""

    kind: str | int
    service_name: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    duration_s: float | None = None
    continuous: bool = False  # no lease: it ends with the agent


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended."""

    reason: pb.SessionEnd.Reason
    detail: str = ""

    def __str__(self) -> str:
        name = pb.SessionEnd.Reason.Name(self.reason).removeprefix("REASON_")
        return f"{name}: {self.detail}" if self.detail else name


class Session:
    """One collector at work, its lease and its stream."""

    def __init__(self, collector: Collector, request: StartRequest, config: Config) -> None:
        self.id = str(uuid.uuid4())
        self.kind = collector.kind
        self.collector = collector
        self.config = dict(request.config)
        self.service_name = request.service_name or collector.label
        self.continuous = request.continuous
        self.lease_s = None if request.continuous else lease_s(request.duration_s, config)
        self.started_at = self.expires_at = 0.0  # Unix time in seconds
        self.end: End | None = None
        limits = config.limits
        header = Header(self.id, self.kind, config.name, self.service_name)
        self.channel = Channel(header, limits.replay_bytes)
        self._limits = limits
        self.ended = asyncio.Event()
        self.wanted_end: End | None = None
        self.task: asyncio.Task[None] | None = None
        self.lease: asyncio.Timeout | None = None
        self.slot = ExitStack()  # what it gives back at its end

    def subscribe(self, terms: Terms | None = None) -> Subscription:
        """A stream of this session's frames, from its first event if that is still kept. Terms are
        held within the agent's limits. Raises `InvalidRequestError`."""
        limits = self._limits
        terms = terms or Terms()
        queue_bytes = min(
            terms.queue_bytes or limits.subscriber_queue_bytes, limits.subscriber_queue_bytes
        )
        try:
            return self.channel.subscribe(
                replace(
                    terms,
                    queue_bytes=queue_bytes,
                    rate_bytes_s=float(limits.subscriber_bytes_per_second),
                )
            )
        except ValueError as error:
            raise InvalidRequestError(f"after_seq: {error}") from error

    @property
    def priority(self) -> Priority:
        """When it has to go, if a limit is passed."""
        if any(s.terms.interactive for s in self.channel.subscriptions):
            return Priority.WATCHED
        return Priority.CONTINUOUS if self.continuous else Priority.ON_DEMAND

    @property
    def memory_bytes(self) -> int:
        """Its maps in the kernel and its buffers here."""
        return self.collector.bpf_object.map_memory_bytes + self.channel.buffered_bytes

    def renew(self, lease_s_: float) -> None:
        """Moves the deadline to so many seconds from now."""
        self.expires_at = time.time() + lease_s_
        if self.lease:
            self.lease.reschedule(asyncio.get_running_loop().time() + lease_s_)

    async def stop(self, end: End) -> None:
        """Ends the session for the reason END, and returns when nothing of it is left."""
        if not self.wanted_end and self.task:
            self.wanted_end = end
            self.task.cancel()
        await self.ended.wait()


def lease_s(duration_s: float | None, config: Config) -> float:
    """The lease that a request gets, in seconds. Raises `InvalidRequestError`."""
    most = config.limits.max_duration
    if duration_s is None:
        return min(config.limits.default_duration, most)
    if not 0 < duration_s <= most:
        raise InvalidRequestError(
            f"duration: {format_duration(duration_s)} is not accepted; give more than 0s and at "
            f"most {format_duration(most)}, this agent's limits.max_duration"
        )
    return duration_s
