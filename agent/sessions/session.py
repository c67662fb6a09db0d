"""One session: a collector, its lease, its stream, and how it ended."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from coral.agent.caller import LIBRARY, Caller
from coral.agent.config import Config
from coral.agent.errors import InvalidRequestError, OutOfRangeError
from coral.agent.sessions.budget import Needs, Priority
from coral.agent.sessions.costs import Costs
from coral.agent.streams import Channel, Header, Subscription, Terms
from coral.collectors.contract import Collector
from coral.collectors.options import format_duration
from coral.mesh.v1 import ebpf_pb2 as pb


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What to start. KIND is a kind's name or number; DURATION_S None is the agent's default."""

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


EXPIRED = End(pb.SessionEnd.REASON_EXPIRED)


class Session:
    """One collector, its lease and its stream. The stream can be read for a while after the end."""

    def __init__(self, collector: Collector, request: StartRequest, config: Config) -> None:
        self.id = str(uuid.uuid4())
        self.kind = collector.kind
        self.config = dict(request.config)
        self.service_name = request.service_name or collector.label
        self.continuous = request.continuous
        self.lease_s = None if request.continuous else lease_s(request.duration_s, config)
        # Unix time in seconds, 0 until it is so.
        self.started_at = self.expires_at = self.ended_at = 0.0
        self.end: End | None = None
        self.ended = asyncio.Event()
        self.costs = Costs()
        self.needs: Needs | None = None  # what it used when it was preempted
        header = Header(self.id, self.kind, config.name, self.service_name)
        self.channel = Channel(header, config.limits.replay_bytes)
        self.slot = ExitStack()  # what is given back when the session ends
        self.task: asyncio.Task[None] | None = None
        self.lease: asyncio.Timeout | None = None
        self._limits = config.limits
        self._collector: Collector | None = collector
        self._begun = False
        self._wanted_end: End | None = None

    @property
    def collector(self) -> Collector:
        """The collector, until the session's end. Raises RuntimeError afterwards."""
        if not self._collector:
            raise RuntimeError(f"session {self.id} has ended")
        return self._collector

    @property
    def at_work(self) -> bool:
        """Whether it is attached and has not ended."""
        return bool(self.started_at) and not self.end

    @property
    def decided_end(self) -> End | None:
        """How it ends, or ended; None while nothing ends it. A session whose end is decided may
        still be sending its last rows."""
        if self.end or self._wanted_end:
            return self.end or self._wanted_end
        return EXPIRED if self.lease and self.lease.expired() else None

    @property
    def priority(self) -> Priority:
        """When it has to go, if a limit is passed."""
        if any(s.terms.interactive for s in self.channel.subscriptions):
            return Priority.WATCHED
        return Priority.CONTINUOUS if self.continuous else Priority.ON_DEMAND

    @property
    def map_memory_bytes(self) -> int:
        """What the kernel charges for its maps; 0 after its end."""
        collector = self._collector  # a scrape reads it in a thread
        return collector.bpf_object.map_memory_bytes if collector else 0

    @property
    def memory_bytes(self) -> int:
        """Its maps in the kernel and its buffers here."""
        return self.map_memory_bytes + self.channel.buffered_bytes

    def subscribe(self, terms: Terms | None = None, caller: Caller = LIBRARY) -> Subscription:
        """A stream of this session's frames for CALLER, from the first one that is kept. TERMS are
        held within the agent's limits. Raises `OutOfRangeError`."""
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
                    peer=caller.peer or terms.peer,
                    interactive=caller.interactive or terms.interactive,
                )
            )
        except ValueError as error:
            raise OutOfRangeError(f"after_seq: {error}") from error

    def begin(self) -> None:
        """Marks the first step of the session's task. Raises CancelledError where it was told to
        end before."""
        self._begun = True
        if self._wanted_end:
            raise asyncio.CancelledError

    def attached(self) -> None:
        """Marks it as attached; the lease runs from now on."""
        self.started_at = time.time()
        self.costs.begin(time.monotonic())
        if self.lease_s is not None:
            self._set_deadline(self.lease_s)

    def renew(self, lease_s_: float) -> None:
        """Moves the deadline to LEASE_S_ seconds from now. Raises RuntimeError where the session's
        end is decided."""
        if end := self.decided_end:
            raise RuntimeError(f"session {self.id} ends: {end}")
        self._set_deadline(lease_s_)

    def _set_deadline(self, from_now_s: float) -> None:
        self.expires_at = time.time() + from_now_s
        if self.lease:
            self.lease.reschedule(asyncio.get_running_loop().time() + from_now_s)

    def finish(self, end: End) -> None:
        """Ends the stream, and lets go of the collector. The last step of the session's task."""
        self.ended_at = time.time()
        self.end = end
        self.channel.end(end.reason, end.detail, int(self.ended_at * 1e9))
        self._collector = None
        self.slot.close()
        self.ended.set()

    def forget_task(self, _task: object = None) -> None:
        """Lets go of the task, once it is done: a cancelled one holds the frames that it left, and
        with them the collector."""
        self.task = self.lease = None

    async def stop(self, end: End) -> None:
        """Ends the session for the reason END, and returns when it is detached and its stream has
        ended."""
        if not self.decided_end and self.task:
            self._wanted_end = end
            if self._begun:  # a task that is cancelled before its first step never takes one
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
