"""How a request gets to the receiver: OTLP over gRPC, or protobuf over HTTP."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
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

from coral.agent.config import ConfigError
from coral.agent.config_otlp import Otlp
from coral.agent.files import read_regular
from coral.collectors.runner import in_thread

Request = ExportMetricsServiceRequest | ExportTraceServiceRequest
Headers = Sequence[tuple[str, str]]

_METHOD: Final = "/opentelemetry.proto.collector.{0}.v1.{1}Service/Export"
_PATHS: Final[dict[type, str]] = {
    ExportMetricsServiceRequest: "/v1/metrics",
    ExportTraceServiceRequest: "/v1/traces",
}
_ANSWERS: Final[dict[type, type[Message]]] = {
    ExportMetricsServiceRequest: ExportMetricsServiceResponse,
    ExportTraceServiceRequest: ExportTraceServiceResponse,
}
_MOST_FILE_BYTES: Final = 1 << 20
_MOST_ANSWER_BYTES: Final = 64 << 10
_MOST_RECONNECT_MS: Final = 30_000
# After these a receiver may accept the same later; others are final (OTLP specification, "OTLP/gRPC
# Response" and "OTLP/HTTP Response").
_PASSING_CODES: Final = frozenset({
    grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
})  # fmt: skip
_PASSING_STATUSES: Final = frozenset({429, 502, 503, 504})


class NotAcceptedError(Exception):
    """The receiver did not accept a request: CODE and the message say why; PASSING, that it may
    accept the same later."""

    def __init__(self, code: str, reason: str, *, passing: bool) -> None:
        super().__init__(reason)
        self.code, self.passing = code, passing


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
    """OTLP over gRPC."""

    def __init__(self, config: Otlp) -> None:
        self._headers = read_headers(config)
        scheme, _, address = config.endpoint.partition("://")
        options = (("grpc.max_reconnect_backoff_ms", _MOST_RECONNECT_MS),)
        if scheme == "http":
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(_ca(config))
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
    """OTLP over HTTP, in protobuf."""

    def __init__(self, config: Otlp) -> None:
        self._headers = dict(read_headers(config))
        self._endpoint = config.endpoint.rstrip("/")
        context = None
        if config.endpoint.startswith("https"):
            roots = _ca(config)
            try:
                context = ssl.create_default_context(cadata=roots.decode() if roots else None)
            except (ssl.SSLError, ValueError) as error:
                raise ConfigError(f"otlp.ca_file: {config.ca_file}: not PEM") from error
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects(), urllib.request.ProxyHandler()]
        if context:
            handlers.append(urllib.request.HTTPSHandler(context=context))
        self._opener = urllib.request.build_opener(*handlers)

    async def send(self, request: Request, timeout_s: float) -> tuple[int, str]:  # noqa: D102
        return await in_thread(lambda: self._post(request, timeout_s))

    async def close(self) -> None:  # noqa: D102
        pass  # each request has a connection of its own

    def _post(self, request: Request, timeout_s: float) -> tuple[int, str]:
        post = urllib.request.Request(  # noqa: S310  the scheme was checked
            self._endpoint + _PATHS[type(request)],
            request.SerializeToString(),
            {**self._headers, "Content-Type": "application/x-protobuf"},
        )
        try:
            with self._opener.open(post, timeout=timeout_s) as response:
                body = response.read(_MOST_ANSWER_BYTES)
            return _rejected(_ANSWERS[type(request)].FromString(body))
        except urllib.error.HTTPError as error:
            passing = error.code in _PASSING_STATUSES
            raise NotAcceptedError(str(error.code), str(error.reason), passing=passing) from error
        except urllib.error.URLError as error:
            raise NotAcceptedError("UNREACHABLE", str(error.reason), passing=True) from error
        except (OSError, HTTPException) as error:
            raise NotAcceptedError("UNREACHABLE", str(error), passing=True) from error
        except DecodeError:
            return 0, ""  # it was accepted; the answer is not what the specification asks for


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The specification knows no redirects, and they would carry the headers elsewhere."""

    def redirect_request(self, *_: object) -> None:
        return None


def transport(config: Otlp) -> Transport:
    """The transport that CONFIG asks for. Raises `ConfigError`."""
    return Http(config) if config.protocol == "http" else Grpc(config)


def read_headers(config: Otlp) -> Headers:
    """The headers of `otlp.headers_file`, names in lower case. Raises `ConfigError`."""
    if not config.headers_file:
        return ()
    lines = _read("otlp.headers_file", config.headers_file).decode(errors="replace").splitlines()
    headers = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, value = (part.strip() for part in line.partition(":"))
        word = name.replace("-", "").replace("_", "")
        if not (word.isalnum() and value and (name + value).isascii() and value.isprintable()):
            raise ConfigError(
                f"otlp.headers_file: {config.headers_file}: line {number} is not accepted; give "
                "lines of NAME: VALUE, in ASCII"
            )
        headers.append((name.lower(), value))
    return headers


def _rejected(answer: Any) -> tuple[int, str]:  # noqa: ANN401  either answer
    partial = answer.partial_success
    if isinstance(answer, ExportTraceServiceResponse):
        return partial.rejected_spans, partial.error_message
    return partial.rejected_data_points, partial.error_message


def _ca(config: Otlp) -> bytes | None:
    return _read("otlp.ca_file", config.ca_file) if config.ca_file else None


def _read(key: str, path: str) -> bytes:
    try:
        return read_regular(Path(path), _MOST_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from error
