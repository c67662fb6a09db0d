"""A connection to one agent. Errors of gRPC become `AgentError`, with a text for people.

async with AgentClient() as agent:
    async with agent.collector("syscall_stats", config={"pid": 1234}) as started:
        async with agent.subscribe(started.collector_id) as stream:
            async for batch in stream:
                ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final, Unpack

import grpc

from coral.client.address import default_address
from coral.client.backoff import Retry
from coral.client.calls import Call, RepeatedCall
from coral.client.connection import Connection, duration_of
from coral.client.errors import AgentError, NotFoundError, UnavailableError, building_a_request
from coral.client.pods import Pods
from coral.client.results import Capabilities, Collectors, Kind, Started, unix_ns
from coral.client.stream import Stream
from coral.client.terms import Terms, stream_request
from coral.client.tls import Tls
from coral.client.watch import Watch
from coral.mesh.v1 import ebpf_pb2 as pb

DEFAULT_TIMEOUT_S: Final = 30.0
DEFAULT_RETRY: Final = Retry()

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["EbpfService"].full_name


def _option_text(value: str | int) -> str:
    """An option's value as the contract has it: `true` or `false` for a bool."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class AgentClient(Connection):
    """One agent. Use it as a context manager; every method raises `AgentError`.

    ADDRESS is `unix:PATH` or `HOST:PORT`; by default the environment's CORAL_AGENT, else the local
    socket. TOKEN is the agent's, by default the environment's CORAL_TOKEN. TLS is for `HOST:PORT`,
    by default what the environment's CORAL_TLS_* say. A call that the agent has not answered after
    TIMEOUT_S raises `DeadlineExceededError`. RETRY says how streams and watches reconnect; calls
    with one answer are never repeated. READ_AHEAD_BYTES is how much of each stream is buffered
    while it is not read; by default gRPC decides, up to some megabytes.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        *,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retry: Retry = DEFAULT_RETRY,
        read_ahead_bytes: int | None = None,
    ) -> None:
        super().__init__(
            _SERVICE,
            address or default_address(),
            token=token,
            tls=tls,
            timeout_s=timeout_s,
            read_ahead_bytes=read_ahead_bytes,
        )
        self.retry = retry

    async def capabilities(self) -> Capabilities:
        """What the agent can do on its machine."""
        request = pb.GetCapabilitiesRequest()
        answer = await self._call("GetCapabilities", request, pb.EbpfCapabilities)
        return Capabilities.of(answer)

    async def collectors(self, *, include_ended: bool = False) -> Collectors:
        """The collectors at work, and with INCLUDE_ENDED those whose streams can still be read."""
        request = pb.ListCollectorsRequest(include_ended=include_ended)
        answer = await self._call("ListCollectors", request, pb.ListCollectorsResponse)
        return Collectors.of(answer)

    async def pods(self, namespace: str = "") -> Pods:
        """The pods of the agent's node that it knows by name, of one NAMESPACE or of all, and what
        it knows them by."""
        with building_a_request():
            request = pb.ListPodsRequest(namespace=namespace)
        return Pods.of(await self._call("ListPods", request, pb.ListPodsResponse))

    async def start(
        self,
        kind: int | str,
        *,
        service_name: str = "",
        config: Mapping[str, str | int] | None = None,
        duration_s: float | None = None,
        pid_namespace: int = 0,
        cgroup_namespace: int = 0,
    ) -> Started:
        """Starts a collector of KIND, such as `syscall_stats`, for DURATION_S seconds, by default
        for the agent's limits.default_duration. Values in CONFIG may be numbers and bools. Look at
        `supported`: a machine that cannot run the collector is not an error. Process ids and a
        cgroup's path are those of the agent's namespaces, or of the caller's, with the inodes
        PID_NAMESPACE and CGROUP_NAMESPACE.

        The collector outlives this client; `collector` stops it when its block is left.
        """
        with building_a_request():
            request = pb.StartEbpfCollectorRequest(
                service_name=service_name,
                kind=Kind.of(kind),  # type: ignore[arg-type]
                config={name: _option_text(value) for name, value in (config or {}).items()},
                pid_namespace=pid_namespace,
                cgroup_namespace=cgroup_namespace,
            )
            if duration_s is not None:
                request.duration.CopyFrom(duration_of(duration_s, "duration_s"))
        answer = await self._call("StartCollector", request, pb.StartEbpfCollectorResponse)
        return Started.of(answer)

    @asynccontextmanager
    async def collector(
        self,
        kind: int | str,
        *,
        service_name: str = "",
        config: Mapping[str, str | int] | None = None,
        duration_s: float | None = None,
    ) -> AsyncIterator[Started]:
        """A collector that is stopped when the block is left, if it has not ended by then. The
        arguments are those of `start`. If the agent cannot be reached any more, the collector ends
        with its lease."""
        started = await self.start(
            kind, service_name=service_name, config=config, duration_s=duration_s
        )
        try:
            yield started
        finally:
            if started.supported:
                with suppress(NotFoundError, UnavailableError):
                    await self.stop(started.collector_id)

    async def renew(self, collector_id: str, duration_s: float | None = None) -> int:
        """Moves a collector's deadline to DURATION_S seconds from now; returns it, in Unix
        nanoseconds."""
        with building_a_request():
            request = pb.RenewCollectorRequest(collector_id=collector_id)
            if duration_s is not None:
                request.duration.CopyFrom(duration_of(duration_s, "duration_s"))
        answer = await self._call("RenewCollector", request, pb.RenewCollectorResponse)
        return unix_ns(answer, "expires_at") or 0

    async def stop(self, collector_id: str) -> None:
        """Ends a collector; returns when it is detached. Raises `NotFoundError`, which says how it
        ended, for one that has ended already."""
        with building_a_request():
            request = pb.StopEbpfCollectorRequest(collector_id=collector_id)
        answer = await self._call("StopCollector", request, pb.StopEbpfCollectorResponse)
        if not answer.success:
            raise AgentError(grpc.StatusCode.UNKNOWN, answer.error or "the agent did not stop it")

    @asynccontextmanager
    async def subscribe(
        self,
        collector_id: str,
        terms: pb.EbpfEventStreamRequest | None = None,
        *,
        retry: Retry | None = None,
        **wanted: Unpack[Terms],
    ) -> AsyncIterator[Stream]:
        """A collector's stream, from its first event that is still kept to its end. The block is
        entered when the subscription stands. See `Terms` for what can be asked for; the contract's
        own message is accepted too.

        When the connection breaks, or the agent renews it for its age, the stream resumes after the
        last event that it has accounted for: no event comes twice, and none is missing without
        being counted.
        """
        with building_a_request():
            request = stream_request(collector_id, terms, wanted)
        error_of_status = partial(self._error, "StreamEventBatches")
        stream = Stream(
            request, self.stream_call, error_of_status, retry or self.retry, self.timeout_s
        )
        await stream.open()
        try:
            yield stream
        finally:
            stream.close()

    @asynccontextmanager
    async def watch(self, *, retry: Retry | None = None) -> AsyncIterator[Watch]:
        """The collectors at work, then each one that starts or ends. The block is entered when the
        watch stands. After a broken connection it begins anew, with `What.RECONNECTED`."""
        calls = RepeatedCall(
            partial(self._stream, "WatchCollectors", pb.WatchCollectorsRequest()),
            partial(self._error, "WatchCollectors"),
            retry or self.retry,
            self.timeout_s,
        )
        watch = Watch(calls)
        await watch.open()
        try:
            yield watch
        finally:
            watch.close()

    def stream_call(self, wanted: pb.EbpfEventStreamRequest) -> Call:
        """A single call of StreamEventBatches, whose messages are bytes."""
        return self._stream("StreamEventBatches", wanted)
