"""Reflection (grpc.reflection.v1alpha): clients without the contract's file ask for it here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final, cast

from google.protobuf.descriptor import ServiceDescriptor
from grpc_reflection.v1alpha import reflection, reflection_pb2

from coral.agent.caller import Caller
from coral.agent.streams import Readers
from coral.collectors.metering import Charge, uncharged

REFLECTION: Final = cast(
    "ServiceDescriptor", reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
)


class Reflection:
    """The method of the protocol for calls.py; the answers are the library's."""

    def __init__(self, readers: Readers, *services: str) -> None:
        self._readers = readers
        self._servicer = reflection.aio.ReflectionServicer((*services, REFLECTION.full_name))

    @contextmanager
    def ServerReflectionInfo(  # noqa: N802  the RPC's name
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest], caller: Caller
    ) -> Iterator[tuple[AsyncIterator[bytes], Charge]]:
        """An answer for each request."""
        with self._readers.open(caller) as reader:
            yield reader.timed(self._answers(requests)), uncharged

    async def _answers(
        self, requests: AsyncIterator[reflection_pb2.ServerReflectionRequest]
    ) -> AsyncIterator[bytes]:
        # Its stubs take an asynchronous generator for a coroutine.
        answers = cast(
            "AsyncIterator[reflection_pb2.ServerReflectionResponse]",
            self._servicer.ServerReflectionInfo(requests, None),
        )
        async for answer in answers:
            yield answer.SerializeToString()
