"""Sends what rollups say to the receivers of the settings, within bounds: a receiver that is gone
or slow costs samples, which are counted, and holds up nothing else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Final

import pyarrow as pa
import structlog
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from coral.client import Retry
from coral.client.backoff import Backoff
from coral.colony.export import remote_write
from coral.colony.export.abandoned import in_thread
from coral.colony.export.backlog import Backlog, Request
from coral.colony.export.measures import Totals
from coral.colony.export.settings import ExportSettings
from coral.wire.otlp import metrics
from coral.wire.otlp.transport import Grpc, Http, Transport
from coral.wire.posting import NotAcceptedError, Poster
from coral.wire.series import Service
from coral.wire.text import safe

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

OTLP: Final = "otlp"
REMOTE_WRITE: Final = "remote_write"

# Prometheus sends again after every 5xx, and after 429.
_PASSING: Final = frozenset({429, *range(500, 600)})
_UNKNOWN: Final = "unknown_service"  # OpenTelemetry's name for it


@dataclass(slots=True)
class ExportCounts:
    """Since the exporter was made, by `otlp` and `remote_write`: samples, or data points, that were
    accepted, and that were not. `rows_dropped` are rows of rollups for which there was no room,
    `overflowed` how often a group was added to the series `other`."""

    sent: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    rows_dropped: int = 0
    overflowed: int = 0


class Resources:
    """Who says it, in OTLP: each service, as the colony NAME sees it, with ATTRIBUTES."""

    def __init__(self, name: str, attributes: Mapping[str, str]) -> None:
        self._scope = InstrumentationScope(name="coral", version=version("coral-ebpf-agent"))
        self._more = {"coral.colony.name": name, **attributes}

    @property
    def scope(self) -> InstrumentationScope:
        """The software."""
        return self._scope

    def of(self, service: str) -> Resource:
        """The resource of SERVICE."""
        own = service.attributes if isinstance(service, Service) else {}
        attributes = {"service.name": str(service) or _UNKNOWN, **own, **self._more}
        return Resource(
            attributes=[
                KeyValue(key=key, value=AnyValue(string_value=_utf8(text)))
                for key, text in attributes.items()
            ]
        )


class Exporter:
    """Exports the rollups of minutes that `observe` is given. Raises ValueError where a receiver's
    authorities are not PEM."""

    def __init__(self, settings: ExportSettings) -> None:
        self.settings = settings
        self._counts = ExportCounts()
        self._totals = Totals(settings.max_series)
        self._adding = threading.Lock()
        self._waiting: deque[tuple[str, pa.Table]] = deque()
        self._waiting_rows = 0
        self._resources = Resources(settings.name, settings.resource)
        self._starts = metrics.Starts(time.time_ns())
        labels = {"instance": settings.name, **settings.labels}
        self._encoder = remote_write.Encoder(labels)
        self._backlog = Backlog(settings.queue_bytes)
        self._some = asyncio.Event()
        target = settings.remote_write
        self._poster = Poster(target.endpoint, target.headers, target.ca) if target else None
        self._posting = Request(b"", 0)
        self._newest: ExportMetricsServiceRequest | None = None  # for OTLP, not sent yet
        self._newer = asyncio.Event()

    @property
    def counts(self) -> ExportCounts:
        """As of now."""
        self._counts.overflowed = self._totals.dropped
        self._counts.waiting = self._backlog.samples + self._posting.samples
        return self._counts

    def observe(self, tables: Mapping[str, pa.Table]) -> None:
        """Lets rollups, by name, wait to be added up. From any thread; never waits for a
        receiver."""
        with self._adding:
            for name, rows in tables.items():
                if self._waiting_rows + rows.num_rows > self.settings.most_rows:
                    self._counts.rows_dropped += rows.num_rows
                    continue
                self._waiting.append((name, rows))
                self._waiting_rows += rows.num_rows

    async def run(self) -> None:
        """Exports every interval until it is cancelled. What waits then is lost, and told; no
        receiver is waited for."""
        transport = self._transport()
        try:
            async with asyncio.TaskGroup() as group:
                if self._poster:
                    group.create_task(self._post_all(self._poster))
                if transport:
                    group.create_task(self._send_newest(transport))
                while True:
                    await asyncio.sleep(self.settings.interval_s)
                    await self._export()
        finally:
            samples = self._backlog.samples + self._posting.samples
            self._counts.lost[REMOTE_WRITE] += samples
            if samples or self._waiting_rows:
                log.warning(
                    "metrics were not sent before the end", remote_write_samples=samples,
                    rows_not_added_up=self._waiting_rows,
                )  # fmt: skip
            if transport:
                await transport.close()

    def _transport(self) -> Transport | None:
        target = self.settings.otlp
        if not target:
            return None
        if self.settings.otlp_protocol == "grpc":
            return Grpc(target.endpoint, target.headers, target.ca)
        return Http(target.endpoint, target.headers, target.ca, in_thread)

    async def _export(self) -> None:
        """Makes what there is now ready for each receiver."""
        has_otlp = self.settings.otlp is not None
        request, posts = await asyncio.to_thread(self._made, time.time_ns(), has_otlp)
        for post in posts:
            self._counts.lost[REMOTE_WRITE] += self._backlog.add(post)
        self._some.set()
        if request:
            if self._newest:  # its successor has everything again
                self._counts.lost[OTLP] += metrics.points_in(self._newest)
            self._newest = request
            self._newer.set()

    async def _send_newest(self, transport: Transport) -> None:
        """Sends by OTLP, one request after the other: a receiver that takes longer than the
        interval misses some, and delays nothing but the next one."""
        while True:
            await self._newer.wait()
            self._newer.clear()
            request, self._newest = self._newest, None
            if request:
                await self._send(transport, request)

    async def _send(self, transport: Transport, request: ExportMetricsServiceRequest) -> None:
        points = metrics.points_in(request)
        try:
            rejected, reason = await transport.send(request, self.settings.timeout_s)
        except NotAcceptedError as error:  # the next export has everything again
            self._counts.lost[OTLP] += points
            self._tell(OTLP, error)
            return
        self._counts.sent[OTLP] += points - rejected
        self._counts.lost[OTLP] += rejected
        if rejected:
            log.warning("otlp: partly rejected", rejected=rejected, reason=safe(reason))

    def _made(
        self, now_ns: int, otlp: bool
    ) -> tuple[ExportMetricsServiceRequest | None, list[Request]]:
        """Adds up what waits, and makes the requests of it. Blocks."""
        while True:
            with self._adding:
                if not self._waiting:
                    break
                name, rows = self._waiting.popleft()
                self._waiting_rows -= rows.num_rows
            self._totals.add(name, rows)
        families = list(self._totals.collect())
        request = None
        if otlp:
            request = metrics.request_of(families, self._resources, self._starts, now_ns)
        if not self._poster:
            return request, []
        made = self._encoder.requests(families, now_ns // 1_000_000)
        return request, [Request(body, samples) for body, samples in made]

    async def _post_all(self, poster: Poster) -> None:
        """Sends the requests of remote write, in their order; what may be accepted later is sent
        until it is."""
        settings = self.settings
        retry = Retry(float("inf"), first_delay_s=0.5, max_delay_s=settings.most_retry_s)
        while True:
            await self._some.wait()
            self._some.clear()
            while len(self._backlog):
                self._posting, backoff = self._backlog.take(), Backoff(retry)
                while True:
                    if await self._post(poster, self._posting):
                        break
                    await asyncio.sleep(backoff.delay_s(time.monotonic()) or 0.0)
                self._posting = Request(b"", 0)

    async def _post(self, poster: Poster, request: Request) -> bool:
        """Whether it need not be sent again."""
        try:
            await in_thread(
                lambda: poster.post(
                    "", request.body, self.settings.timeout_s, remote_write.HEADERS, _PASSING
                )
            )
        except NotAcceptedError as error:
            self._tell(REMOTE_WRITE, error)
            if error.passing:
                return False
            self._counts.lost[REMOTE_WRITE] += request.samples
        else:
            self._counts.sent[REMOTE_WRITE] += request.samples
        return True

    def _tell(self, signal: str, error: NotAcceptedError) -> None:
        self._counts.failures[signal] += 1
        log.warning(
            "metrics were not accepted", signal=signal, code=error.code, reason=safe(str(error))
        )


def _utf8(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
