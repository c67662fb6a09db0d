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

from proto.coral.mesh.v1 import ebpf_pb2 as pb

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
    async def subscribe(self, collector_id: str) -> AsyncIterator[AsyncIterator[pb.EbpfEventBatch]]:
        """A collector's batches, from its first event if that is still kept, to the one that
        carries the end. Inside the block the subscription stands."""
        call = self._channel.unary_stream(
            f"/{_SERVICE}/StreamEventBatches",
            request_serializer=pb.EbpfEventStreamRequest.SerializeToString,
            response_deserializer=pb.EbpfEventBatch.FromString,
        )(pb.EbpfEventStreamRequest(collector_id=collector_id), metadata=self._metadata)
        try:
            await call.initial_metadata()
            yield self._batches(call)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()

    async def _batches(self, call: Any) -> AsyncIterator[pb.EbpfEventBatch]:  # noqa: ANN401
        try:
            async for batch in call:
                yield batch
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    async def _call(self, method: str, request: Message, answer: type[Answer]) -> Answer:
        call: Any = self._channel.unary_unary(
            f"/{_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            response: Answer = await call(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        return response

    def _error(self, error: grpc.aio.AioRpcError) -> AgentError:
        message = error.details() or error.code().name
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            message = (
                f"no agent answers at {self.address}: start one with `coral agent`, or name its "
                f"address with --agent or {ENV_ADDRESS}"
            )
        return AgentError(error.code(), message)
