"""One session: a collector, its lease, its stream, and how it ended."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from coral.agent.access.target import NOBODYS, Ownership
from coral.agent.caller import LIBRARY, Caller
from coral.agent.config import Config
from coral.agent.errors import InvalidRequestError, OutOfRangeError
from coral.agent.machine.caller_namespaces import HERE, Namespaces
from coral.agent.sessions.budget import Needs, Priority
from coral.agent.sessions.costs import Costs
from coral.agent.streams import Channel, Header, Subscription, Terms
from coral.collectors.contract import Collector
from coral.collectors.options import format_duration
from coral.collectors.runner import Stop
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.text import safe


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What to start. KIND is a kind's name or number; DURATION_S None is the agent's default.
    NAMED_IN are the namespaces in which `config` names the target."""

    kind: str | int
    service_name: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    duration_s: float | None = None
    continuous: bool = False  # no lease: it ends with the agent
    named_in: Namespaces = HERE


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

    def __init__(
        self,
        collector: Collector,
        request: StartRequest,
        config: Config,
        ownership: Ownership = NOBODYS,
    ) -> None:
        self.id = str(uuid.uuid4())
        self.ownership = ownership
        self.kind = collector.kind
        self.config = dict(request.config)
        self.service_name = safe(request.service_name or collector.label)
        self.continuous = request.continuous
        self.lease_s = None if request.continuous else lease_s(request.duration_s, config)
        # Unix time in seconds, 0 until it is so.
        self.started_at = self.expires_at = self.ended_at = 0.0
        self.notes: tuple[str, ...] = ()  # see `Collector.notes`
        # How it ends: decided once, by whatever comes first, while it may still have rows to send.
        self.decided_end: End | None = None
        self.end: End | None = None  # the same, once it has ended
        self.ended = asyncio.Event()
        self.stopping = Stop()
        self.costs = Costs()
        self.needs: Needs | None = None  # what it used when it was preempted
        header = Header(self.id, self.kind, config.name, self.service_name)
        self.channel = Channel(
            header, config.limits.replay_bytes, charge=self.costs.charge_offering
        )
        self._attributes: Mapping[str, str] = {}
        self.slot = ExitStack()  # what is given back when the session ends
        self._lease: asyncio.TimerHandle | None = None
        self._limits = config.limits
        self._collector: Collector | None = collector

    @property
    def collector(self) -> Collector:
        """The collector, until the session's end. Raises RuntimeError afterwards."""
        if not self._collector:
            raise RuntimeError(f"session {self.id} has ended")
        return self._collector

    @property
    def attributes(self) -> Mapping[str, str]:
        """What all that it watches has in common: see `Collector.attributes`; after its end, what
        it was."""
        if self._collector:
            self._attributes = self._collector.attributes
        return self._attributes

    @property
    def at_work(self) -> bool:
        """Whether it is attached and has not ended."""
        return bool(self.started_at) and not self.end

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
                    principal=caller.identity.principal,
                    interactive=caller.interactive or terms.interactive,
                )
            )
        except ValueError as error:
            raise OutOfRangeError(f"after_seq: {error}") from error

    def attached(self) -> None:
        """Marks it as attached; the lease runs from now on."""
        self.started_at = time.time()
        self.notes = tuple(self.collector.notes)
        self.costs.begin(time.monotonic())
        if self.lease_s is not None:
            self.renew(self.lease_s)

    def renew(self, lease_s_: float) -> None:
        """Moves the deadline to LEASE_S_ seconds from now. The session's end must not be
        decided."""
        self.expires_at = time.time() + lease_s_
        if self._lease:
            self._lease.cancel()
        self._lease = asyncio.get_running_loop().call_later(lease_s_, self.end_for, EXPIRED)

    def end_for(self, end: End) -> None:
        """Decides that the session ends for the reason END, unless its end is decided already. Its
        task then detaches, sends the last rows, and closes."""
        if not self.decided_end:
            self.decided_end = end
            self.stopping.request()

    async def stop(self, end: End) -> None:
        """Ends the session for the reason END, unless its end is decided already; returns when it
        is detached and its stream has ended."""
        self.end_for(end)
        await self.ended.wait()

    def finish(self) -> End:
        """Ends the stream as it was decided, and lets go of the collector. The last step of the
        session's task."""
        end = self.end = self.decided_end
        if not end:
            raise RuntimeError(f"nothing has decided how session {self.id} ends")
        if self._lease:
            self._lease.cancel()
        self.ended_at = time.time()
        self.channel.end(end.reason, end.detail, int(self.ended_at * 1e9))
        self._attributes = self.attributes
        self._collector = None
        self.slot.close()
        self.ended.set()
        return end


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
