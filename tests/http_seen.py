"""A running `http_latency`, and all requests that it has seen so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import pytest

from coral import bpf
from coral.collectors.contract import Batch, EventRows
from coral.collectors.http_latency.collector import HttpLatencyCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import at_work, wait_until

CLIENT, SERVER = pb.HTTP_ROLE_CLIENT, pb.HTTP_ROLE_SERVER
COMPLETE, UPGRADED = pb.HTTP_OUTCOME_COMPLETE, pb.HTTP_OUTCOME_UPGRADED
BY_CLIENT, BY_SERVER = pb.HTTP_OUTCOME_ABORTED_BY_CLIENT, pb.HTTP_OUTCOME_ABORTED_BY_SERVER


@dataclass(frozen=True)
class Request:
    """A row, with names in place of numbers."""

    role: int
    method: str
    path: str
    status: int
    outcome: int
    time_ns: int
    duration_ns: int
    request_ns: int
    first_byte_ns: int
    request_body_bytes: int
    response_body_bytes: int
    connection_id: int
    number: int
    pid: int
    local_port: int
    remote_port: int
    version: int
    tls: int
    query: str
    host: str
    trace_id: str
    parent_span_id: str

    @property
    def exchange(self) -> tuple[str, str, int, int, int]:
        """What clients and servers say of it, too: method, path, status, bytes of both bodies."""
        bodies = self.request_body_bytes, self.response_body_bytes
        return (self.method, self.path, self.status, *bodies)


_TEXTS = ("path", "query", "host", "trace_id", "parent_span_id")
_NUMBERS = [field.name for field in fields(Request) if field.name not in ("method", *_TEXTS)]


class Seen:
    """The requests so far. As in tests/network.py, `missed` is an upper bound of what is missing
    here, and `lost` exact."""

    def __init__(self, collector: HttpLatencyCollector) -> None:
        self.collector = collector
        self.requests: list[Request] = []
        self.lost = self.missed = 0
        self.unread: Counter[str] = Counter()  # connections and operations, by what they are

    def drain(self) -> None:
        """Takes in what there is."""
        self.add(self.collector.drain())

    def add(self, batch: Batch) -> None:
        """Takes in a batch of single events."""
        assert isinstance(batch.rows, EventRows)
        missed = batch.losses.get(pb.Loss.STAGE_PROGRAM_MISSED, 0)
        self.missed += missed
        self.lost += sum(batch.losses.values()) - missed
        self.unread.update({what: it.count for what, it in batch.unread.items()})
        strings = batch.rows.strings
        for record in batch.rows.records:
            self.requests.append(_request(record, strings))

    def of(self, role: int) -> list[Request]:
        """Those of one role, in the order of their ends."""
        return [request for request in self.requests if request.role == role]

    def until(self, condition: Callable[[], object], timeout_s: float = 15) -> None:
        """Drains until CONDITION is true."""

        def met() -> object:
            self.drain()
            return condition()

        wait_until(met, timeout_s)

    def wait_for(self, count: int, role: int) -> list[Request]:
        """Waits for so many requests of one role; no more may have come."""
        self.until(lambda: len(self.of(role)) >= count)
        found = self.of(role)
        assert len(found) == count
        return found


def _request(record: Any, strings: Any) -> Request:
    values: dict[str, Any] = {name: int(record[name]) for name in _NUMBERS}
    values |= {name: strings[record[name]] for name in _TEXTS}
    method = pb.HttpMethod.Name(int(record["method"])).removeprefix("HTTP_METHOD_")
    return Request(method=method, **values)


@contextmanager
def seeing(*pids: int, without: tuple[str, ...] = (), **config: str) -> Iterator[Seen]:
    """`http_latency` of these processes, each request for itself; WITHOUT these features of the
    kernel."""
    features = bpf.probe().without(*without)
    support = HttpLatencyCollector.support(features)
    if not support.supported:
        pytest.skip(support.reason)
    config = {"pid": ",".join(map(str, pids)), "mode": "events", "ring": "16MiB", **config}
    with at_work(HttpLatencyCollector.create(config, None, features)) as collector:
        yield Seen(collector)


def seeing_plain(*pids: int, ring: str = "16MiB") -> AbstractContextManager[Seen]:
    """The same without the functions of OpenSSL, which the kernel takes seconds to let go of."""
    return seeing(*pids, tls="false", ring=ring)
