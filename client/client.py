"""A connection to one agent. Errors of gRPC become `AgentError`, with a text for people.

async with AgentClient() as agent:
    started = await agent.start(pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, config={"pid": "1234"})
    async with agent.subscribe(started.collector_id) as stream:
        async for batch in stream:
            ...
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
from google.protobuf.message import Message

from coral.client.batch import Batch
from coral.mesh.v1 import ebpf_pb2 as pb

DEFAULT_ADDRESS: Final = "unix:/run/coral/agent.sock"
ENV_ADDRESS: Final = "CORAL_AGENT"
ENV_TOKEN: Final = "CORAL_TOKEN"  # noqa: S105  the variable's name

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["EbpfService"].full_name

Answer = TypeVar("Answer", bound=Message)


def default_address() -> str:
    """CORAL_AGENT, else the socket of this machine's agent."""
    return os.environ.get(ENV_ADDRESS, DEFAULT_ADDRESS)


class AgentError(Exception):
    """The agent refused, or could not be reached. `code` is a gRPC status code."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        super().__init__(message)


class AgentClient:
    """One agent, by its address (`unix:PATH`, `HOST:PORT`). Use it as a context manager."""

    def __init__(self, address: str | None = None, token: str | None = None) -> None:
        self.address = address or default_address()
        token = token or os.environ.get(ENV_TOKEN)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    async def __aenter__(self) -> Self:
        self._channel = grpc.aio.insecure_channel(self.address)
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def capabilities(self) -> pb.EbpfCapabilities:
        """What the agent can do on its machine."""
        return await self._call("GetCapabilities", pb.GetCapabilitiesRequest(), pb.EbpfCapabilities)

    async def collectors(self) -> pb.ListCollectorsResponse:
        """The collectors at work."""
        return await self._call(
            "ListCollectors", pb.ListCollectorsRequest(), pb.ListCollectorsResponse
        )

    async def start(
        self,
        kind: pb.EbpfCollectorKind,
        *,
        service_name: str = "",
        config: Mapping[str, str] | None = None,
        duration_s: float | None = None,
    ) -> pb.StartEbpfCollectorResponse:
        """Starts a collector. Look at `supported`: a machine that cannot is not an error."""
        request = pb.StartEbpfCollectorRequest(
            service_name=service_name, kind=kind, config=dict(config or {})
        )
        if duration_s is not None:
            request.duration.FromNanoseconds(int(duration_s * 1e9))
        return await self._call("StartCollector", request, pb.StartEbpfCollectorResponse)

    async def renew(
        self, collector_id: str, duration_s: float | None = None
    ) -> pb.RenewCollectorResponse:
        """Moves a collector's deadline to so many seconds from now."""
        request = pb.RenewCollectorRequest(collector_id=collector_id)
        if duration_s is not None:
            request.duration.FromNanoseconds(int(duration_s * 1e9))
        return await self._call("RenewCollector", request, pb.RenewCollectorResponse)

    async def stop(self, collector_id: str) -> pb.StopEbpfCollectorResponse:
        """Ends a collector; returns when it is detached."""
        return await self._call(
            "StopCollector",
            pb.StopEbpfCollectorRequest(collector_id=collector_id),
            pb.StopEbpfCollectorResponse,
        )

    @asynccontextmanager
    async def subscribe(
        self, collector_id: str, terms: pb.EbpfEventStreamRequest | None = None
    ) -> AsyncIterator[AsyncIterator[Batch]]:
        """A collector's batches, from its first event if that is still kept, to the one that
        carries the end. Inside the block the subscription stands. TERMS may ask for another start,
        a filter, another overflow policy.

        A connection that breaks, or that the agent renews for its age, is made again, and the
        stream resumed after the last event that was read.
        """
        wanted = pb.EbpfEventStreamRequest()
        if terms:
            wanted.CopyFrom(terms)
        wanted.collector_id = collector_id
        stream = _Stream(self, wanted)
        await stream.open()
        try:
            yield stream.batches()
        finally:
            stream.close()

    def stream_call(self, wanted: pb.EbpfEventStreamRequest) -> Any:  # noqa: ANN401
        """A call of StreamEventBatches whose messages are bytes."""
        method: Any = self._channel.unary_stream(
            f"/{_SERVICE}/StreamEventBatches",
            request_serializer=pb.EbpfEventStreamRequest.SerializeToString,
            response_deserializer=None,
        )
        return method(wanted, metadata=self._metadata)

    async def _call(self, method: str, request: Message, answer: type[Answer]) -> Answer:
        call: Any = self._channel.unary_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            response: Answer = await call(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self.error_of(error) from error
        return response

    def error_of(self, error: grpc.aio.AioRpcError) -> AgentError:
        """What a failed call means, for people."""
        message = error.details() or error.code().name
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            message = (
                f"no agent answers at {self.address}: start one with `coral agent`, or name its "
                f"address with --agent or {ENV_ADDRESS}"
            )
        return AgentError(error.code(), message)


class _Stream:
    """One subscription, over as many calls as it takes."""

    def __init__(self, agent: AgentClient, wanted: pb.EbpfEventStreamRequest) -> None:
        self._agent = agent
        self._wanted = wanted
        self._call: Any = None

    async def open(self) -> None:
        """Subscribes; returns when the agent has said that the subscription stands."""
        self._call = self._agent.stream_call(self._wanted)
        try:
            await self._call.initial_metadata()
        except grpc.aio.AioRpcError as error:
            self.close()
            raise self._agent.error_of(error) from error

    async def batches(self) -> AsyncIterator[Batch]:
        """Every batch, over as many calls as it takes."""
        resuming = False
        while True:
            try:
                async for wire in self._call:
                    batch = Batch.parse(wire)
                    resuming = False
                    # Of a batch of losses this is the event before the next: what was told as
                    # lost is not asked for again.
                    self._wanted.after_seq = max(self._wanted.after_seq, batch.last_seq)
                    yield batch
                    if batch.end:
                        return  # whatever becomes of the connection
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or resuming:
                    raise self._agent.error_of(error) from error
                resuming = True
                await self.open()
            else:
                return

    def close(self) -> None:
        """Leaves."""
        self._call.cancel()
