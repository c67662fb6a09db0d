"""Metrics of what a colony does beside storing: of the bus, and of the export of metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from coral.colony.bus.consumer import Consumer
from coral.colony.bus.publisher import Publisher
from coral.colony.export.exporter import OTLP, REMOTE_WRITE, Exporter


def published(publisher: Publisher) -> Iterator[Metric]:
    """How publishing to the bus fares."""
    counts = publisher.counts
    for name, value, text in (
        ("messages", counts.published, "Messages that the bus has acknowledged."),
        ("bytes", counts.bytes, "Bytes of messages that the bus has acknowledged, with headers."),
        ("repeated", counts.repeated, "Messages that the bus had already."),
        ("failures", counts.failures, "Tries that the bus did not acknowledge."),
        ("diverged", counts.diverged, "Sessions of which somebody else had published events."),
        ("too_large", counts.too_large, "Events lost in batches that the bus does not accept."),
    ):
        yield CounterMetricFamily(f"coral_colony_bus_published_{name}", text, value=value)
    yield GaugeMetricFamily(
        "coral_colony_bus_waiting_messages",
        "Messages that the bus has not acknowledged yet.",
        value=counts.waiting,
    )
    yield GaugeMetricFamily(
        "coral_colony_bus_waiting_bytes",
        "Bytes of messages that the bus has not acknowledged yet.",
        value=counts.waiting_bytes,
    )


def read(consumer: Consumer) -> Iterator[Metric]:
    """How reading from the bus fares."""
    counts = consumer.counts
    for name, value, text in (
        ("messages", counts.read, "Messages read from the bus."),
        ("bytes", counts.bytes, "Bytes of batches in messages read from the bus."),
        ("repeated", counts.repeated, "Messages whose events were stored already."),
        ("failures", counts.failures, "How often reading began anew."),
    ):
        yield CounterMetricFamily(f"coral_colony_bus_read_{name}", text, value=value)
    lost = CounterMetricFamily(
        "coral_colony_bus_lost_events",
        "Events that were published and could not be stored, by stage.",
        labels=["stage"],
    )
    for stage, count in sorted(consumer.inbox.lost.items()):
        lost.add_metric([stage], count)
    yield lost
    yield GaugeMetricFamily(
        "coral_colony_bus_lag_messages",
        "Messages that the bus has and this colony has not read, as of the last one.",
        value=counts.lag,
    )


def exported(exporter: Exporter) -> Iterator[Metric]:
    """How the export of metrics fares."""
    counts, targets = exporter.counts, exporter.settings
    signals = {OTLP: targets.otlp, REMOTE_WRITE: targets.remote_write}
    for name, by_signal, text in (
        ("sent_samples", counts.sent, "Samples that a receiver of metrics accepted."),
        ("lost_samples", counts.lost, "Samples that none accepted."),
        ("failures", counts.failures, "Requests with metrics that were not accepted."),
    ):
        family = CounterMetricFamily(f"coral_colony_export_{name}", text, labels=["signal"])
        for signal, target in signals.items():
            if target:
                family.add_metric([signal], by_signal[signal])
        yield family
    yield GaugeMetricFamily(
        "coral_colony_export_waiting_samples", "Samples that wait to be sent.", value=counts.waiting
    )
    yield CounterMetricFamily(
        "coral_colony_export_dropped_rows",
        "Rows of rollups for which there was no room.",
        value=counts.rows_dropped,
    )
    yield CounterMetricFamily(
        "coral_colony_export_overflowed",
        "How often figures were added to the series `other`.",
        value=counts.overflowed,
    )
