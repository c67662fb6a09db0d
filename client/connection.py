"""What clients of an agent and of a colony have in common: address, token, channels, calls."""

from __future__ import annotations

import asyncio
import os
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message

from coral.client.address import ENV_TOKEN, checked_address, checked_token, is_unix
from coral.client.calls import Call
from coral.client.channels import Channels
from coral.client.errors import AgentError, ContractError, building_a_request, error_of
from coral.client.tls import REFUSED, Tls

Answer = TypeVar("Answer", bound=Message)


class Connection:
    """Calls of SERVICE, a full name of gRPC, at ADDRESS. TOKEN is by default the environment's
    CORAL_TOKEN; TLS is for `HOST:PORT`, by default what the environment's CORAL_TLS_* say."""

    def __init__(
        self,
        service: str,
        address: str,
        *,
        token: str | None,
        tls: Tls | None,
        timeout_s: float,
        read_ahead_bytes: int | None = None,
    ) -> None:
        with building_a_request():
            tls = tls.checked() if tls else Tls.from_environment()
            self.address = checked_address(address)
            token = checked_token(token or os.environ.get(ENV_TOKEN, ""))
        self.timeout_s = timeout_s
        self._service = service
        self._tls = None if is_unix(self.address) else tls
        self._read_ahead_bytes = read_ahead_bytes
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()

    async def __aenter__(self) -> Self:
        with building_a_request():
            self._channels = Channels(self.address, self._tls, self._read_ahead_bytes)
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self._channels.close()

    def _stream(self, method: str, request: Message, timeout_s: float | None = None) -> Call:
        """A call whose messages are bytes."""
        channel = self._channels.current()
        stream: Any = channel.unary_stream(
            f"/{self._service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=None,
        )
        call: Call = stream(request, metadata=self._metadata, timeout=timeout_s)
        self._channels.hold(channel, call)
        return call

    async def _call(self, method: str, request: Message, answer: type[Answer]) -> Answer:
        channel = self._channels.current()
        method_call: Any = channel.unary_unary(
            f"/{self._service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=None,
        )
        call = method_call(request, metadata=self._metadata, timeout=self.timeout_s)
        self._channels.hold(channel, call)
        try:
            wire: bytes = await call
        except grpc.aio.AioRpcError as error:
            details = await self._with_alert(error.details() or "")
            raise self._error(method, error.code(), details) from error
        return parsed(answer, wire)

    async def _with_alert(self, details: str) -> str:
        """DETAILS of a failed call, and why the server refused this client, where it did."""
        if not (self._tls and REFUSED in details):
            return details
        alert = await asyncio.to_thread(self._tls.refusal, self.address)
        return f"{details} {alert}" if alert else details

    def _error(self, method: str, code: grpc.StatusCode, details: str) -> AgentError:
        return error_of(code, details, self.address, method, self.timeout_s, tls=self._tls)


def parsed(message: type[Answer], wire: bytes) -> Answer:
    """The MESSAGE that WIRE encodes. Raises `ContractError`."""
    try:
        return message.FromString(wire)
    except DecodeError as error:
        raise ContractError(f"what was sent is no {message.DESCRIPTOR.name}: {error}") from error


def duration_of(seconds: float, name: str) -> Duration:
    """SECONDS as the contract has them. Raises ValueError, with NAME, for what a Duration cannot
    hold."""
    duration = Duration()
    try:
        duration.FromNanoseconds(round(seconds * 1e9))
    except (ValueError, OverflowError) as error:
        raise ValueError(
            f"{name}: {seconds!r} is not accepted; give a number of seconds"
        ) from error
    return duration
