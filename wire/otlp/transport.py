"""How a request gets to the receiver: OTLP over gRPC, or protobuf over HTTP."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError, Message
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from coral.wire.posting import Headers, NotAcceptedError, Poster

Request = ExportMetricsServiceRequest | ExportTraceServiceRequest
InThread = Callable[[Callable[[], bytes]], Awaitable[bytes]]

_METHOD: Final = "/opentelemetry.proto.collector.{0}.v1.{1}Service/Export"
_PATHS: Final[dict[type, str]] = {
    ExportMetricsServiceRequest: "/v1/metrics",
    ExportTraceServiceRequest: "/v1/traces",
}
_ANSWERS: Final[dict[type, type[Message]]] = {
    ExportMetricsServiceRequest: ExportMetricsServiceResponse,
    ExportTraceServiceRequest: ExportTraceServiceResponse,
}
_MOST_RECONNECT_MS: Final = 30_000
# After these a receiver may accept the same later; others are final (OTLP specification, "OTLP/gRPC
# Response").
_PASSING_CODES: Final = frozenset({
    grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
})  # fmt: skip


class Transport(ABC):
    """Carries requests to one receiver."""

    @abstractmethod
    async def send(self, request: Request, timeout_s: float) -> tuple[int, str]:
        """How many of its points or spans the receiver rejected, and why. Raises
        `NotAcceptedError`."""

    @abstractmethod
    async def close(self) -> None:
        """Ends the connection."""


class Grpc(Transport):
    """OTLP over gRPC, to `http://HOST:PORT`, or over TLS to `https://HOST:PORT`, which is one of
    the authorities CA, in PEM, or of this machine."""

    def __init__(self, endpoint: str, headers: Headers, ca: bytes | None) -> None:
        self._headers = headers
        scheme, _, address = endpoint.partition("://")
        options = (("grpc.max_reconnect_backoff_ms", _MOST_RECONNECT_MS),)
        if scheme == "http":
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(ca)
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._accept: dict[type, Any] = {
            request: self._channel.unary_unary(
                _METHOD.format(*names),
                request_serializer=request.SerializeToString,
                response_deserializer=_ANSWERS[request].FromString,
            )
            for request, names in (
                (ExportMetricsServiceRequest, ("metrics", "Metrics")),
                (ExportTraceServiceRequest, ("trace", "Trace")),
            )
        }

    async def send(self, request: Request, timeout_s: float) -> tuple[int, str]:  # noqa: D102
        accept = self._accept[type(request)]
        try:
            answer = await accept(request, timeout=timeout_s, metadata=self._headers)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            passing = code in _PASSING_CODES
            raise NotAcceptedError(code.name, error.details() or "", passing=passing) from error
        return _rejected(answer)

    async def close(self) -> None:  # noqa: D102
        await self._channel.close(0)


class Http(Transport):
    """OTLP over HTTP, in protobuf; IN_THREAD runs what blocks. Raises ValueError where CA is not
    PEM."""

    def __init__(
        self, endpoint: str, headers: Headers, ca: bytes | None, in_thread: InThread
    ) -> None:
        self._poster = Poster(endpoint, headers, ca)
        self._in_thread = in_thread

    async def send(self, request: Request, timeout_s: float) -> tuple[int, str]:  # noqa: D102
        body, path = request.SerializeToString(), _PATHS[type(request)]
        answer = await self._in_thread(lambda: self._poster.post(path, body, timeout_s))
        try:
            return _rejected(_ANSWERS[type(request)].FromString(answer))
        except DecodeError:
            return 0, ""  # it was accepted; the answer is not what the specification asks for

    async def close(self) -> None:  # noqa: D102
        pass  # each request has a connection of its own


def _rejected(answer: Any) -> tuple[int, str]:  # noqa: ANN401  either answer
    partial = answer.partial_success
    if isinstance(answer, ExportTraceServiceResponse):
        return partial.rejected_spans, partial.error_message
    return partial.rejected_data_points, partial.error_message
