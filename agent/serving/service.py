"""The contract's RPCs on the supervisor: messages in, messages out, refusals as exceptions.

One method for each RPC, of the same name; calls.py binds them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from google.protobuf.duration_pb2 import Duration

from coral.agent.access.asking import Asking
from coral.agent.access.rpcs import Role
from coral.agent.access.target import Ownership
from coral.agent.caller import Caller
from coral.agent.errors import InvalidRequestError, NotFoundError, UnsupportedError
from coral.agent.machine.caller_namespaces import Namespaces
from coral.agent.serving.capabilities import capabilities_of
from coral.agent.serving.pods import listed_pods
from coral.agent.sessions.changes import Watch
from coral.agent.sessions.info import info_of, timestamp
from coral.agent.sessions.session import StartRequest
from coral.agent.sessions.supervisor import Supervisor
from coral.agent.streams import Filter, Frame, Subscription, Terms
from coral.collectors.metering import Charge, uncharged
from coral.mesh.v1 import ebpf_pb2 as pb

_NANOS: Final = 1_000_000_000

SERVICE: Final = pb.DESCRIPTOR.services_by_name["EbpfService"]


class EbpfService:
    """One method for each RPC of the contract, which says what they do. Whether the caller may call
    it, on the session that it names, was decided before (`agent.serving.door`)."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._access = supervisor.access
        self._asking = Asking(supervisor.access)

    async def StartCollector(  # noqa: N802  the RPC's name
        self, request: pb.StartEbpfCollectorRequest, caller: Caller
    ) -> pb.StartEbpfCollectorResponse:
        """Starts a collector."""
        name = self._supervisor.config.name
        if request.agent_id not in ("", name):
            raise NotFoundError(
                f"agent_id: {request.agent_id!r} is not here; this agent is {name!r}"
            )
        wanted = StartRequest(
            request.kind,
            request.service_name,
            dict(request.config),
            _seconds(request.duration) if request.HasField("duration") else None,
            named_in=Namespaces(request.pid_namespace, request.cgroup_namespace),
        )
        try:
            session = await self._supervisor.start(wanted, caller)
        except UnsupportedError as error:
            return pb.StartEbpfCollectorResponse(supported=False, error=str(error))
        return pb.StartEbpfCollectorResponse(
            collector_id=session.id,
            expires_at=timestamp(session.expires_at),
            supported=True,
            notes=session.notes,
        )

    async def StopCollector(  # noqa: N802
        self, request: pb.StopEbpfCollectorRequest, caller: Caller
    ) -> pb.StopEbpfCollectorResponse:
        """Ends a collector."""
        await self._supervisor.stop(request.collector_id, caller)
        return pb.StopEbpfCollectorResponse(success=True)

    async def RenewCollector(  # noqa: N802
        self, request: pb.RenewCollectorRequest, _caller: Caller
    ) -> pb.RenewCollectorResponse:
        """Moves a deadline."""
        duration_s = _seconds(request.duration) if request.HasField("duration") else None
        session = self._supervisor.renew(request.collector_id, duration_s)
        return pb.RenewCollectorResponse(expires_at=timestamp(session.expires_at))

    async def GetCapabilities(  # noqa: N802
        self, _request: pb.GetCapabilitiesRequest, _caller: Caller
    ) -> pb.EbpfCapabilities:
        """The collectors and options that this machine supports."""
        return await capabilities_of(self._supervisor)

    async def ListPods(  # noqa: N802
        self, request: pb.ListPodsRequest, caller: Caller
    ) -> pb.ListPodsResponse:
        """The pods of this node that have a name, in namespaces that the caller may know of."""
        identity = caller.identity

        async def sees(namespace: str) -> bool:
            return await self._asking.decided(
                identity, lambda: self._access.sees_namespace(identity, namespace)
            )

        return await listed_pods(self._supervisor, sees, request.namespace)

    async def ListCollectors(  # noqa: N802
        self, request: pb.ListCollectorsRequest, caller: Caller
    ) -> pb.ListCollectorsResponse:
        """The collectors at work that the caller may see, and on request those that have ended."""
        sessions = self._supervisor.at_work()
        if request.include_ended:
            sessions = [*self._supervisor.ended.readable(), *sessions]
        whose = None if self._sees_all(caller) else caller.identity.principal
        return pb.ListCollectorsResponse(
            collectors=[
                info_of(each, whose)
                for each in sessions
                if await self._sees(each.ownership, caller)
            ]
        )

    @contextmanager
    def WatchCollectors(  # noqa: N802
        self, _request: pb.WatchCollectorsRequest, caller: Caller
    ) -> Iterator[tuple[AsyncIterator[bytes], Charge]]:
        """The collectors at work that the caller may see, then each start and end of such."""
        with self._access.quotas.stream(caller.identity.principal, caller.allowance):
            watch = self._supervisor.watch()
            try:
                with self._supervisor.readers.open(caller) as reader:
                    yield reader.timed(self._seen(watch, caller)), uncharged
            finally:
                watch.close()

    async def _seen(self, watch: Watch, caller: Caller) -> AsyncIterator[bytes]:
        sees_all = self._sees_all(caller)
        async for change in watch:
            if watch.about and not await self._sees(watch.about, caller):
                continue
            if sees_all or not change.collector.subscribers:
                yield change.SerializeToString()
                continue
            own = pb.CollectorChange()
            own.CopyFrom(change)  # watchers share the message
            del own.collector.subscribers[:]
            yield own.SerializeToString()

    def _sees_all(self, caller: Caller) -> bool:
        """Whether the caller may know who else reads."""
        return self._access.role_of(caller.identity) is Role.ADMIN

    async def _sees(self, ownership: Ownership, caller: Caller) -> bool:
        identity = caller.identity
        return await self._asking.decided(identity, lambda: self._access.sees(identity, ownership))

    @contextmanager
    def StreamEvents(  # noqa: N802
        self, request: pb.EbpfEventStreamRequest, caller: Caller
    ) -> Iterator[tuple[AsyncIterator[bytes], Charge]]:
        """Events, one in each message."""
        if request.summaries == pb.EbpfEventStreamRequest.SUMMARIES_COLUMNS:
            raise InvalidRequestError(
                "summaries: SUMMARIES_COLUMNS is not accepted; give SUMMARIES_ROWS, or call "
                "StreamEventBatches: a message of StreamEvents is one event"
            )
        with (
            self._subscription(request, caller, single_events=True) as (subscription, charge),
            self._supervisor.readers.open(caller) as reader,
        ):
            yield reader.timed(_read(subscription, subscription.events)), charge

    @contextmanager
    def StreamEventBatches(  # noqa: N802
        self, request: pb.EbpfEventStreamRequest, caller: Caller
    ) -> Iterator[tuple[AsyncIterator[bytes], Charge]]:
        """Events, in batches."""
        with (
            self._subscription(request, caller) as (subscription, charge),
            self._supervisor.readers.open(caller) as reader,
        ):
            messages = _read(subscription, lambda frame: (subscription.message(frame),))
            yield reader.timed(messages), charge

    @contextmanager
    def _subscription(
        self, request: pb.EbpfEventStreamRequest, caller: Caller, *, single_events: bool = False
    ) -> Iterator[tuple[Subscription, Charge]]:
        terms = Terms(
            after_seq=request.after_seq,
            overflow=request.overflow,
            queue_bytes=request.queue_bytes,
            wanted=Filter.of(request.filter),
            columns=request.summaries == pb.EbpfEventStreamRequest.SUMMARIES_COLUMNS,
            single_events=single_events,
            masked=caller.allowance.redacted,
            shared_rate=self._access.quotas.rate(caller.identity.principal, caller.allowance),
        )
        session = self._supervisor.readable(request.collector_id)
        caller = replace(caller, interactive=request.interactive and caller.may_claim)
        with self._access.quotas.stream(caller.identity.principal, caller.allowance):
            subscription = session.subscribe(terms, caller)
            try:
                yield subscription, session.costs.charge_subscriber
            finally:
                subscription.close()


async def _read(
    subscription: Subscription, messages: Callable[[Frame], Iterable[bytes]]
) -> AsyncIterator[bytes]:
    """The messages of each frame."""
    async for frame in subscription:
        for message in messages(frame):
            yield message


def _seconds(duration: Duration) -> float:
    """Raises `InvalidRequestError` for what google.protobuf.Duration does not allow."""
    if abs(duration.nanos) >= _NANOS or duration.seconds * duration.nanos < 0:
        raise InvalidRequestError(
            f"duration: seconds {duration.seconds} with nanos {duration.nanos} is not accepted; "
            "give nanos of less than a second and of the same sign"
        )
    return duration.seconds + duration.nanos / _NANOS
