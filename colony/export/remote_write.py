"""Metric families as requests of Prometheus' remote write, version 1.0.

A request is a WriteRequest in protobuf, compressed with snappy's block format:

    WriteRequest  { repeated TimeSeries timeseries = 1; }
    TimeSeries    { repeated Label labels = 1; repeated Sample samples = 2; }
    Label         { string name = 1; string value = 2; }
    Sample        { double value = 1; int64 timestamp = 2; }   in ms of Unix time

Labels are sorted by name. The labels of a series are encoded once: of a sample, only the value
changes. Synchronous: call it in a thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import cramjam
from prometheus_client import Metric
from prometheus_client.samples import Sample

from coral.wire.series import Service

HEADERS: Final = {
    "Content-Encoding": "snappy",
    "X-Prometheus-Remote-Write-Version": "0.1.0",
}
MOST_SAMPLES: Final = 2000
"""In one request: what Prometheus sends itself."""

_SERIES, _LABEL, _NAME, _VALUE, _SAMPLE = b"\x0a", b"\x0a", b"\x0a", b"\x12", b"\x12"
_DOUBLE: Final = struct.Struct("<cd")
_LOW: Final = 0x7F
_MORE: Final = 0x80
_CREATED: Final = "_created"

Labels = tuple[tuple[str, str], ...]


class Encoder:
    """Encodes families; every series gets the labels LABELS too, unless it has one of that name."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._known: dict[tuple[str, Labels], bytes] = {}
        self._seen: dict[tuple[str, Labels], bytes] = {}

    def requests(self, families: Iterable[Metric], time_ms: int) -> Iterator[tuple[bytes, int]]:
        """FAMILIES as they are at that Unix time: requests, and how many samples each has."""
        stamp = b"\x10" + _varint(time_ms)
        body, count = bytearray(), 0
        for family in families:
            for sample in family.samples:
                if sample.name.endswith(_CREATED):
                    continue
                head = self._head(sample)
                value = _DOUBLE.pack(b"\x09", sample.value) + stamp
                tail = _SAMPLE + _varint(len(value)) + value
                body += _SERIES + _varint(len(head) + len(tail)) + head + tail
                count += 1
                if count == MOST_SAMPLES:
                    yield compressed(body), count
                    body, count = bytearray(), 0
        if count:
            yield compressed(body), count
        self._known, self._seen = self._seen, {}

    def _head(self, sample: Sample) -> bytes:
        # A service with other labels is another: `Service` compares them.
        key = (sample.name, tuple(sample.labels.items()))
        head = self._known.get(key)
        if head is None:
            head = b"".join(
                _LABEL + _varint(len(label)) + label for label in map(_label, *self._names(sample))
            )
        self._seen[key] = head
        return head

    def _names(self, sample: Sample) -> tuple[list[str], list[str]]:
        """Names and values of a series' labels, sorted by name; empty ones are none."""
        service = sample.labels.get("service", "")
        more = service.more if isinstance(service, Service) else {}
        labels = {**self._labels, **sample.labels, **more, "__name__": sample.name}
        kept = sorted((name, value) for name, value in labels.items() if value)
        return [name for name, _ in kept], [value for _, value in kept]


def compressed(body: bytes | bytearray) -> bytes:
    """BODY in snappy's block format."""
    return bytes(cramjam.snappy.compress_raw(bytes(body)))


def _label(name: str, value: str) -> bytes:
    parts = []
    for tag, text in ((_NAME, name), (_VALUE, value)):
        encoded = text.encode(errors="backslashreplace")  # a name from /proc can have surrogates
        parts.append(tag + _varint(len(encoded)) + encoded)
    return b"".join(parts)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > _LOW:
        encoded.append(number & _LOW | _MORE)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
