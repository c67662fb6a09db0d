"""Exports metrics and spans to one receiver, within bounds: a receiver that is gone or slow costs
spans, which are counted, and never holds up the agent."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from types import TracebackType
from typing import Final, Self

import structlog

from coral.agent.config_otlp import Otlp
from coral.agent.otlp import spans
from coral.agent.otlp.receiver import transport
from coral.agent.otlp.resource import Resource
from coral.agent.serving.prometheus import Registry
from coral.agent.sessions.background import Backoff, keep_going
from coral.agent.sessions.labels import whole_label
from coral.agent.sessions.session import Session
from coral.collectors.contract import Batch
from coral.collectors.runner import in_thread
from coral.wire.otlp import metrics
from coral.wire.posting import NotAcceptedError
from coral.wire.text import safe

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.otlp")

_TIMEOUT_S: Final = 10.0
_LAST_TIMEOUT_S: Final = 0.3  # the agent ends within 1.4 s
_MOST_SPANS: Final = 20_000
_SPANS_AT_ONCE: Final = 512
_GATHER_S: Final = 1.0
_MOST_PAUSE_S: Final = 30.0


class Exporter:
    """Exports what REGISTRY has, every interval, and the spans of batches that `observe` is given.
    Use it as a context manager; leaving it sends what waits, if the receiver is quick. Raises
    `ConfigError`."""

    def __init__(
        self, config: Otlp, agent_id: str, registry: Registry, counts: Counter[tuple[str, str]]
    ) -> None:
        self._config, self._registry, self._counts = config, registry, counts
        self._resource = Resource(agent_id, config.resource)
        self._transport = transport(config)
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
        except (TimeoutError, NotAcceptedError):
            pass
        self._counts["spans", "lost"] += self._queue.count
        await self._transport.close()

    def observe(self, session: Session, batch: Batch) -> None:
        """Lets the requests of BATCH that belong to a trace wait for their export."""
        if not self._config.spans:
            return
        for found in spans.traced(whole_label(session), batch):
            self._counts["spans", "lost"] += self._queue.add(found)
            self._some.set()

    async def _export_metrics(self) -> None:
        while True:
            await asyncio.sleep(self._config.interval)
            try:
                await self._send_metrics(_TIMEOUT_S)
            except NotAcceptedError as error:  # the next export has everything again
                self._tell("metrics", error)

    async def _send_metrics(self, timeout_s: float) -> None:
        families, now_ns = self._registry.collect(), time.time_ns()
        request = await in_thread(
            lambda: metrics.request_of(families, self._resource, self._starts, now_ns)
        )
        points = metrics.points_in(request)
        try:
            rejected, reason = await self._transport.send(request, timeout_s)
        except NotAcceptedError:
            self._counts["metrics", "lost"] += points
            raise
        self._count("metrics", points, rejected, reason)

    async def _export_spans(self) -> None:
        backoff = Backoff(most_s=_MOST_PAUSE_S)
        while True:
            await self._some.wait()
            if self._queue.count < _SPANS_AT_ONCE:
                await asyncio.sleep(_GATHER_S)
            self._some.clear()
            while self._queue.count:
                await self._send_spans(_TIMEOUT_S, backoff)

    async def _send_spans(self, timeout_s: float, backoff: Backoff | None = None) -> None:
        """Sends some of the spans that wait. With BACKOFF, those that may be accepted later are
        sent until they are."""
        taken = self._queue.take(_SPANS_AT_ONCE)
        count = sum(len(each.records) for each in taken)
        settled = False
        try:
            request = await in_thread(lambda: spans.request_of(taken, self._resource))
            while not settled:
                try:
                    rejected, reason = await self._transport.send(request, timeout_s)
                except NotAcceptedError as error:
                    self._tell("spans", error)
                    if backoff is None or not error.passing:
                        return
                    await asyncio.sleep(backoff.pause_s())
                else:
                    settled = True
                    self._count("spans", count, rejected, reason)
        finally:
            if not settled:  # refused for good, or the agent ends
                self._counts["spans", "lost"] += count

    def _count(self, signal: str, sent: int, rejected: int, reason: str) -> None:
        self._counts[signal, "sent"] += sent - rejected
        self._counts[signal, "lost"] += rejected
        if rejected:
            log.warning(
                "otlp: partly rejected", signal=signal, rejected=rejected, reason=safe(reason)
            )

    def _tell(self, signal: str, error: NotAcceptedError) -> None:
        log.warning(
            "otlp: not accepted", endpoint=self._config.endpoint, signal=signal,
            code=error.code, reason=safe(str(error)),
        )  # fmt: skip
