"""Exports metrics and spans to one receiver, within bounds: a receiver that is gone or slow costs
spans, which are counted, and never holds up the agent."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import grpc
import structlog
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from coral.agent.config import ConfigError, Otlp
from coral.agent.files import read_regular
from coral.agent.otlp import metrics, spans
from coral.agent.otlp.resource import Resource
from coral.agent.serving.prometheus import Registry
from coral.agent.sessions.background import Backoff, keep_going
from coral.agent.sessions.session import Session
from coral.collectors.contract import Batch
from coral.collectors.runner import in_thread
from coral.wire.text import safe

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.otlp")

_METHOD: Final = "/opentelemetry.proto.collector.{0}.v1.{1}Service/Export"
_TIMEOUT_S: Final = 10.0
_LAST_TIMEOUT_S: Final = 0.3  # the agent ends within 1.4 s
_MOST_SPANS: Final = 20_000
_SPANS_AT_ONCE: Final = 512
_GATHER_S: Final = 1.0
_MOST_PAUSE_S: Final = 30.0
_MOST_FILE_BYTES: Final = 1 << 20
# After these a receiver may accept the same again; other codes are final (OTLP specification,
# "OTLP/gRPC response").
_PASSING: Final = frozenset({
    grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
})  # fmt: skip


class Exporter:
    """Exports what REGISTRY has, every interval, and the spans of batches that `observe` is given.
    Use it as a context manager; leaving it sends what waits, if the receiver is quick."""

    def __init__(
        self, config: Otlp, agent_id: str, registry: Registry, counts: Counter[tuple[str, str]]
    ) -> None:
        self._config, self._registry, self._counts = config, registry, counts
        self._resource = Resource(agent_id, config.resource)
        self._headers = read_headers(config)
        self._channel = _channel(config)
        self._accept_metrics = self._channel.unary_unary(
            _METHOD.format("metrics", "Metrics"),
            request_serializer=ExportMetricsServiceRequest.SerializeToString,
            response_deserializer=ExportMetricsServiceResponse.FromString,
        )
        self._accept_spans = self._channel.unary_unary(
            _METHOD.format("trace", "Trace"),
            request_serializer=ExportTraceServiceRequest.SerializeToString,
            response_deserializer=ExportTraceServiceResponse.FromString,
        )
        self._starts = metrics.Starts(time.time_ns())
        self._queue = spans.Queue(_MOST_SPANS)
        self._some = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        if self._config.metrics:
            work = asyncio.create_task(keep_going("OTLP metrics", self._export_metrics))
            self._tasks.append(work)
        if self._config.spans:
            work = asyncio.create_task(keep_going("OTLP spans", self._export_spans))
            self._tasks.append(work)
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_LAST_TIMEOUT_S):
                if self._config.spans and self._queue.count:
                    await self._send_spans(_LAST_TIMEOUT_S)
                if self._config.metrics:
                    await self._send_metrics(_LAST_TIMEOUT_S)
        except (TimeoutError, grpc.aio.AioRpcError):
            pass
        self._lose_spans(self._queue.count)
        await self._channel.close(0)

    def observe(self, session: Session, batch: Batch) -> None:
        """Lets the requests of BATCH that belong to a trace wait for their export."""
        if not self._config.spans:
            return
        if found := spans.traced(session.service_name, batch):
            self._queue.add(found)
            self._lose_spans(self._queue.dropped)
            self._queue.dropped = 0
            self._some.set()

    def _lose_spans(self, count: int) -> None:
        self._counts["spans", "lost"] += count

    async def _export_metrics(self) -> None:
        while True:
            await asyncio.sleep(self._config.interval)
            try:
                await self._send_metrics(_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:  # the next export has everything again
                self._tell("metrics", error)

    async def _send_metrics(self, timeout_s: float) -> None:
        families, now_ns = self._registry.collect(), time.time_ns()
        request = await in_thread(
            lambda: metrics.request_of(families, self._resource, self._starts, now_ns)
        )
        points = metrics.points_in(request)
        try:
            answer = await self._accept_metrics(request, timeout=timeout_s, metadata=self._headers)
        except grpc.aio.AioRpcError:
            self._counts["metrics", "lost"] += points
            raise
        rejected = answer.partial_success.rejected_data_points
        self._count("metrics", points, rejected, answer.partial_success.error_message)

    async def _export_spans(self) -> None:
        backoff = Backoff(most_s=_MOST_PAUSE_S)
        while True:
            await self._some.wait()
            if self._queue.count < _SPANS_AT_ONCE:
                await asyncio.sleep(_GATHER_S)
            self._some.clear()
            while self._queue.count:
                backoff.begin()
                await self._send_spans(_TIMEOUT_S, backoff)

    async def _send_spans(self, timeout_s: float, backoff: Backoff | None = None) -> None:
        """Sends some of the spans that wait. With BACKOFF, those that may be accepted later are
        sent until they are."""
        taken = self._queue.take(_SPANS_AT_ONCE)
        count = sum(len(each.records) for each in taken)
        settled = False
        try:
            request = await in_thread(lambda: spans.request_of(taken, self._resource))
            while True:
                try:
                    answer = await self._accept_spans(
                        request, timeout=timeout_s, metadata=self._headers
                    )
                    break
                except grpc.aio.AioRpcError as error:
                    self._tell("spans", error)
                    if backoff is None or error.code() not in _PASSING:
                        return
                    await asyncio.sleep(backoff.pause_s())
            settled = True
            rejected = answer.partial_success.rejected_spans
            self._count("spans", count, rejected, answer.partial_success.error_message)
        finally:
            if not settled:  # refused for good, or the agent ends
                self._lose_spans(count)

    def _count(self, signal: str, sent: int, rejected: int, message: str) -> None:
        self._counts[signal, "sent"] += sent - rejected
        self._counts[signal, "lost"] += rejected
        if rejected:
            log.warning("otlp: partly rejected", signal=signal, rejected=rejected,
                        reason=safe(message))  # fmt: skip

    def _tell(self, signal: str, error: grpc.aio.AioRpcError) -> None:
        log.warning(
            "otlp: not accepted", endpoint=self._config.endpoint, signal=signal,
            code=error.code().name, reason=safe(error.details() or ""),
        )  # fmt: skip


def read_headers(config: Otlp) -> Sequence[tuple[str, str]]:
    """The headers of `otlp.headers_file`, as gRPC's metadata. Raises `ConfigError`."""
    if not config.headers_file:
        return ()
    lines = _read("otlp.headers_file", config.headers_file).decode(errors="replace").splitlines()
    headers = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, value = (part.strip() for part in line.partition(":"))
        accepted = colon and name and value and (name + value).isascii() and value.isprintable()
        if not accepted or not name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(
                f"otlp.headers_file: {config.headers_file}: line {number} is not accepted; give "
                "lines of NAME: VALUE, in ASCII"
            )
        headers.append((name.lower(), value))
    return headers


def _channel(config: Otlp) -> grpc.aio.Channel:
    scheme, _, address = config.endpoint.partition("://")
    options: Mapping[str, int] = {"grpc.max_reconnect_backoff_ms": int(_MOST_PAUSE_S * 1000)}
    if scheme == "http":
        return grpc.aio.insecure_channel(address, options=tuple(options.items()))
    roots = _read("otlp.ca_file", config.ca_file) if config.ca_file else None
    credentials = grpc.ssl_channel_credentials(roots)
    return grpc.aio.secure_channel(address, credentials, options=tuple(options.items()))


def _read(key: str, path: str) -> bytes:
    try:
        return read_regular(Path(path), _MOST_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from error
