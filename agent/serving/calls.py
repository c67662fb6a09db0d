"""From a gRPC call to a method of the service, and back: bytes in, bytes or a status out.

The handlers are bound by the service's descriptor. Their serialisers are the identity: requests are
parsed here, so that bad ones get the right status, and streams are encoded before they get here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, Final

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message

from coral.agent.caller import Caller
from coral.agent.serving.requests import parse
from coral.agent.serving.status import code_of, fitting
from coral.bpf import BpfError
from coral.mesh.v1 import ebpf_pb2 as pb

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.audit")

Context = grpc.aio.ServicerContext[Any, Any]

Unary = Callable[[Any, Caller], Awaitable[Message]]
# Inside the block the stream stands; what it holds is given back when the block is left.
Streaming = Callable[[Any, Caller], AbstractContextManager[AsyncIterator[bytes]]]


def handlers(descriptor: ServiceDescriptor, service: object) -> grpc.GenericRpcHandler:
    """Handlers for SERVICE, which has a method, `Unary` or `Streaming`, for each RPC of
    DESCRIPTOR."""
    return grpc.method_handlers_generic_handler(
        descriptor.full_name,
        {
            method.name: _handler(method, getattr(service, method.name))
            for method in descriptor.methods
        },
    )


def _handler(
    method: MethodDescriptor,
    behaviour: Any,  # noqa: ANN401  Unary or Streaming, as the descriptor says
) -> grpc.RpcMethodHandler[Any, Any]:
    request_type: type[Message] = getattr(pb, method.input_type.name)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_streaming(method, request_type, behaviour))
    return grpc.unary_unary_rpc_method_handler(_unary(method, request_type, behaviour))


def _unary(
    method: MethodDescriptor, request_type: type[Message], behaviour: Unary
) -> Callable[[bytes, Context], Awaitable[bytes]]:
    async def answer(wire: bytes, context: Context) -> bytes:
        async with _failures_as_status(method, context):
            response = await behaviour(parse(request_type, wire), _caller(context))
            return response.SerializeToString()

    return answer


def _streaming(
    method: MethodDescriptor, request_type: type[Message], behaviour: Streaming
) -> Callable[[bytes, Context], Awaitable[None]]:
    async def answer(wire: bytes, context: Context) -> None:
        async with _failures_as_status(method, context):
            with behaviour(parse(request_type, wire), _caller(context)) as messages:
                # A caller that has the headers knows that its stream stands.
                await context.send_initial_metadata(())
                async for message in messages:
                    await context.write(message)

    return answer


def _caller(context: Context) -> Caller:
    return Caller(peer=context.peer())


@asynccontextmanager
async def _failures_as_status(method: MethodDescriptor, context: Context) -> AsyncIterator[None]:
    """Ends the call with the status of whatever is raised inside. gRPC itself would answer UNKNOWN
    to anything but its own errors."""
    try:
        yield
    except Exception as error:
        # The caller has left. A write that was under way may say so before gRPC notices.
        if context.done() or isinstance(error, grpc.aio.InternalError):
            return
        code, peer = code_of(error), context.peer()
        if code is grpc.StatusCode.INTERNAL:
            log.exception("call failed unexpectedly", method=method.name, peer=peer)
            error = RuntimeError(f"{method.name} failed: the agent's log says why")
        elif code is grpc.StatusCode.PERMISSION_DENIED:
            log.warning("refused", peer=peer, code=code.name, reason=str(error))
        elif isinstance(error, BpfError):
            log.error("refused by the kernel", peer=peer, what=error.what, said=error.log)
        await context.abort(code, fitting(str(error)))
