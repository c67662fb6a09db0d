"""From a gRPC call to a method of the service, and back: bytes in, bytes or a status out.

The handlers are bound by the service's descriptor. Their serialisers are the identity: requests are
parsed here, so that bad ones get the right status, and streams are encoded before they get here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, Self

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from coral.agent.caller import Caller
from coral.agent.config import Limits
from coral.agent.errors import LimitError, UnauthenticatedError
from coral.agent.serving.caller import CallerOf, Context, unknown_caller
from coral.agent.serving.quota import Quota
from coral.agent.serving.requests import parse
from coral.agent.serving.status import code_of
from coral.bpf import BpfError
from coral.collectors.metering import Charge, metered
from coral.wire.refusal import fitting

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.audit")

Unary = Callable[[Any, Caller], Awaitable[Message]]
# The request is a message, or an iterator of messages where the client streams. Inside the block
# the stream stands; what it holds is given back when the block is left. The CPU time of sending the
# messages is charged.
Streaming = Callable[[Any, Caller], AbstractContextManager[tuple[AsyncIterator[bytes], Charge]]]


@dataclass(frozen=True)
class Quotas:
    """How many calls of one server may be under way."""

    unary: Quota
    streaming: Quota

    @classmethod
    def of(cls, limits: Limits, refused: Counter[str]) -> Self:
        """As LIMITS say; counts refusals in REFUSED, by limit."""
        calls = Quota(
            "calls", limits.calls, "calls_per_peer", limits.calls_per_peer, "calls", refused
        )
        streams = Quota(
            "streams", limits.streams, "streams_per_peer", limits.streams_per_peer, "streams",
            refused,
        )  # fmt: skip
        return cls(calls, streams)


class Admits(Protocol):
    """Decides which calls get to a method."""

    async def let_in(self, caller: Caller, context: Context, method: MethodDescriptor) -> Caller:
        """CALLER with who it is, before its request is looked at. Raises a `RefusedError`."""

    async def permit(self, caller: Caller, method: MethodDescriptor, request: object) -> Caller:
        """The same, once it is known what the call is about. Raises a `RefusedError`."""

    def limited(self, caller: Caller, method: MethodDescriptor, error: LimitError) -> None:
        """A limit stands against a call, of CALLER as far as it is known by then."""


class Everyone:
    """Lets every caller in; for servers without roles."""

    async def let_in(self, caller: Caller, _context: Context, _method: MethodDescriptor) -> Caller:
        """The caller."""
        return caller

    async def permit(self, caller: Caller, _method: MethodDescriptor, _request: object) -> Caller:
        """The caller."""
        return caller

    def limited(self, caller: Caller, method: MethodDescriptor, error: LimitError) -> None:
        """Nobody has to know."""


def handlers(
    descriptor: ServiceDescriptor,
    service: object,
    caller_of: CallerOf = unknown_caller,
    quotas: Quotas | None = None,
    door: Admits | None = None,
) -> grpc.GenericRpcHandler:
    """Handlers for SERVICE, which has a method, `Unary` or `Streaming`, for each RPC of
    DESCRIPTOR, within QUOTAS, for callers that DOOR lets in."""
    calls = _Calls(caller_of, quotas or Quotas.of(Limits(), Counter()), door or Everyone())
    return grpc.method_handlers_generic_handler(
        descriptor.full_name,
        {
            method.name: calls.handler(method, getattr(service, method.name))
            for method in descriptor.methods
        },
    )


@dataclass
class _Seen:
    """A call under way: who makes it, as far as that is known so far."""

    caller: Caller


@dataclass(frozen=True)
class _Calls:
    caller_of: CallerOf
    quotas: Quotas
    door: Admits

    def handler(
        self,
        method: MethodDescriptor,
        behaviour: Any,  # noqa: ANN401  Unary or Streaming, as the descriptor says
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler for one method."""
        request_type = GetMessageClass(method.input_type)
        if method.client_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(method, partial(_parsed, request_type), behaviour)
            )
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(method, partial(parse, request_type), behaviour)
            )
        return grpc.unary_unary_rpc_method_handler(self._unary(method, request_type, behaviour))

    def _unary(
        self, method: MethodDescriptor, request_type: type[Message], behaviour: Unary
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def answer(wire: bytes, context: Context) -> bytes:
            caller = self.caller_of(context)
            # Until gRPC has sent the answer: it keeps answers that callers do not read.
            place = ExitStack()
            context.add_done_callback(lambda _: place.close())  # type: ignore[arg-type]
            async with self._failures_as_status(method, context, caller) as seen:
                place.enter_context(self.quotas.unary.one(caller))
                seen.caller = await self.door.let_in(caller, context, method)
                request = parse(request_type, wire)
                seen.caller = await self.door.permit(seen.caller, method, request)
                response = await behaviour(request, seen.caller)
                return response.SerializeToString()

        return answer

    def _streaming(
        self, method: MethodDescriptor, parse_request: Callable[[Any], object], behaviour: Streaming
    ) -> Callable[[Any, Context], Awaitable[None]]:
        async def answer(wire: object, context: Context) -> None:
            caller = self.caller_of(context)
            async with self._failures_as_status(method, context, caller) as seen:
                with self.quotas.streaming.one(caller):
                    seen.caller = await self.door.let_in(caller, context, method)
                    request = parse_request(wire)
                    seen.caller = await self.door.permit(seen.caller, method, request)
                    with behaviour(request, seen.caller) as (messages, charge):
                        # A caller that has the headers knows that its stream stands.
                        await context.send_initial_metadata(())
                        await metered(_write(messages, context), charge)

        return answer

    @asynccontextmanager
    async def _failures_as_status(
        self, method: MethodDescriptor, context: Context, caller: Caller
    ) -> AsyncIterator[_Seen]:
        """Ends the call with the status of whatever is raised inside. gRPC itself would answer
        UNKNOWN to anything but its own errors."""
        seen = _Seen(caller)
        try:
            yield seen
        except Exception as error:
            # The caller has left. A write that was under way may say so before gRPC notices.
            if context.done() or isinstance(error, grpc.aio.InternalError):
                return
            code, peer = code_of(error), caller.peer
            if isinstance(error, LimitError) and not error.is_audited:
                self.door.limited(seen.caller, method, error)
            if code is grpc.StatusCode.INTERNAL:
                log.exception("call failed unexpectedly", method=method.name, peer=peer)
                error = RuntimeError(f"{method.name} failed: the agent's log says why")
            elif isinstance(error, UnauthenticatedError):
                log.warning(
                    "refused", peer=peer, principal=caller.refusals_of, code=code.name,
                    method=f"/{method.containing_service.full_name}/{method.name}",
                    reason=error.reason,
                )  # fmt: skip
            elif code is grpc.StatusCode.PERMISSION_DENIED:
                log.warning(
                    "refused", peer=peer, principal=caller.refusals_of, code=code.name,
                    reason=str(error),
                )  # fmt: skip
            elif isinstance(error, BpfError):
                log.error("refused by the kernel", peer=peer, what=error.what, said=error.log)
            await context.abort(code, fitting(str(error)))


async def _parsed(
    request_type: type[Message], wires: AsyncIterator[bytes]
) -> AsyncIterator[Message]:
    async for wire in wires:
        yield parse(request_type, wire)


async def _write(messages: AsyncIterator[bytes], context: Context) -> None:
    async for message in messages:
        await context.write(message)
