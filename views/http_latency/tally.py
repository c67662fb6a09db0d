"""Batches of `http_latency`: the last interval, and sums of all, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.client import Batch, Buckets
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.data import event_rows
from coral.views.http_latency.words import OTHER, is_error, outcome_of
from coral.views.intervals import Intervals
from coral.views.pods import pod_words, row_pods
from coral.wire.http import BOUNDS_NS

# Fields of an event that point to strings.
TEXTS: Final = ("comm", "path", "route", "query", "host", "trace_id", "parent_span_id")
_NS_PER_MS: Final = 1_000_000
_MOST_ROUTES: Final = 10_000
_MOST_SLOWEST: Final = 20

_Key = tuple[int, int, str, str]
_Events = NDArray[Any]


@dataclass
class Requests:
    """Requests of one role, method and route, and of one pod where the session watches several; or
    several such added up."""

    role: int = pb.HTTP_ROLE_UNSPECIFIED
    method: int = pb.HTTP_METHOD_UNSPECIFIED
    route: str = ""
    pod: str = ""
    count: int = 0
    errors: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    outcomes: Counter[int] = field(default_factory=Counter)  # other than complete
    total: Buckets = field(default_factory=Buckets)  # ns
    first_byte: Buckets = field(default_factory=Buckets)  # ns
    request_bytes: int = 0
    response_bytes: int = 0

    @property
    def key(self) -> _Key:
        """What its rows have in common."""
        return self.role, self.method, self.route, self.pod

    def merge(self, more: Requests) -> None:
        """Adds others; role, method, route and pod stay as they were."""
        self.count += more.count
        self.errors += more.errors
        self.statuses.update(more.statuses)
        self.outcomes.update(more.outcomes)
        self.total.add(more.total)
        self.first_byte.add(more.first_byte)
        self.request_bytes += more.request_bytes
        self.response_bytes += more.response_bytes


def of_row(row: pb.HttpLatencyHistogram, pod: str = "") -> Requests:
    """A row of figures."""
    bounds = tuple(round(bound * _NS_PER_MS) for bound in row.buckets)
    requests = Requests(
        role=row.role,
        method=row.method,
        route=row.route,
        pod=pod,
        count=row.count,
        errors=row.errors,
        total=_buckets(bounds, row.counts, row.sum, row.min, row.max),
        first_byte=_buckets(
            bounds,
            row.first_byte_counts,
            row.first_byte_sum,
            row.first_byte_min,
            row.first_byte_max,
        ),
        request_bytes=row.request_body_bytes,
        response_bytes=row.response_body_bytes,
    )
    requests.statuses[row.status] = row.count
    for name, count in row.outcomes.items():
        requests.outcomes[outcome_of(name)] = count
    return requests


def _buckets(
    bounds: tuple[int, ...], counts: Sequence[int], total: float, least: float, most: float
) -> Buckets:
    """A histogram of the contract, in ms, as one in ns. Without values, the least and the most of
    it are no values either."""
    if not any(counts):
        return Buckets()
    sum_ns, least_ns, most_ns = (round(ms * _NS_PER_MS) for ms in (total, least, most))
    return Buckets(bounds, list(counts), sum_ns, least_ns, most_ns)


def _of_times(times_ns: _Events) -> Buckets:
    """A histogram of single times."""
    if not len(times_ns):
        return Buckets()
    slots = np.searchsorted(BOUNDS_NS, times_ns)
    counts = np.bincount(slots, minlength=len(BOUNDS_NS) + 1).tolist()
    total, least, most = (int(f(times_ns)) for f in (np.sum, np.min, np.max))
    return Buckets(BOUNDS_NS, counts, total, least, most)


def of_events(batch: Batch) -> Iterator[Requests]:
    """Single requests, added up by role, method, route and pod."""
    events, pods, resources = batch.events, pod_words(batch), batch.row_resources
    if not len(events):
        return
    columns = [*(events[name] for name in ("role", "method", "route")), resources]
    ended = events["outcome"] != pb.HTTP_OUTCOME_IN_PROGRESS
    events, keys = events[ended], np.stack(columns, axis=1)[ended]
    found, which = np.unique(keys, axis=0, return_inverse=True)
    which = which.reshape(-1)
    for number, (role, method, route, resource) in enumerate(found.tolist()):
        alike = events[which == number]
        yield _of_alike(alike, role, method, str(batch.strings[route]), pods[resource])


def _of_alike(events: _Events, role: int, method: int, route: str, pod: str) -> Requests:
    statuses, times = np.unique(events["status"], return_counts=True)
    outcomes, ends = np.unique(events["outcome"], return_counts=True)
    requests = Requests(
        role,
        method,
        route,
        pod,
        count=len(events),
        statuses=Counter(dict(zip(statuses.tolist(), times.tolist(), strict=True))),
        outcomes=Counter(dict(zip(outcomes.tolist(), ends.tolist(), strict=True))),
        total=_of_times(events["duration_ns"]),
        first_byte=_of_times(events["first_byte_ns"][events["status"] > 0]),
        request_bytes=int(events["request_body_bytes"].sum()),
        response_bytes=int(events["response_body_bytes"].sum()),
    )
    requests.outcomes.pop(pb.HTTP_OUTCOME_COMPLETE, None)
    pairs = zip(events["status"].tolist(), events["outcome"].tolist(), strict=True)
    requests.errors = sum(is_error(status, outcome) for status, outcome in pairs)
    return requests


def _ended(events: _Events) -> _Events:
    """Without requests that were in progress when the session ended: nobody knows their times."""
    return events[events["outcome"] != pb.HTTP_OUTCOME_IN_PROGRESS] if len(events) else events


class Tally:
    """Everything that the batches of a tap have reported."""

    def __init__(self) -> None:
        self.intervals = Intervals()
        self.latest: dict[_Key, Requests] = {}
        self.all: dict[_Key, Requests] = {}
        self.slowest_latest: list[dict[str, Any]] = []  # single requests, the slowest first
        self.slowest: list[dict[str, Any]] = []
        self.unread: Mapping[str, tuple[int, int]] = {}

    def add(self, batch: Batch) -> None:
        """Takes in figures, or single requests, and what could not be read so far."""
        self.unread = batch.unread
        if not batch.count:
            return
        if self.intervals.add(batch.message):
            self.latest = {}
            self.slowest_latest = []
        figures = map(of_row, batch.message.http_latency, row_pods(batch))
        for requests in (*figures, *of_events(batch)):
            for rows in (self.latest, self.all):
                _take(rows, requests)
        if len(batch.events):
            slow = list(_slowest_of(batch))
            self.slowest_latest = _slowest(self.slowest_latest + slow)
            self.slowest = _slowest(self.slowest + slow)


def _take(rows: dict[_Key, Requests], requests: Requests) -> None:
    key = requests.key
    if key not in rows and len(rows) >= _MOST_ROUTES:
        key = requests.role, pb.HTTP_METHOD_UNSPECIFIED, OTHER, ""
    rows.setdefault(key, Requests(*key)).merge(requests)


def _slowest_of(batch: Batch) -> Iterator[dict[str, Any]]:
    """The slowest of a batch, without a Python object for each of the others."""
    events = _ended(batch.events)
    order = np.argsort(events["duration_ns"], kind="stable")[-_MOST_SLOWEST:]
    yield from event_rows(Batch(batch.message, events[order]), *TEXTS)


def _slowest(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(requests, key=lambda one: -one["duration_ns"])[:_MOST_SLOWEST]


def sum_of(several: Iterable[Requests]) -> Requests:
    """Several as one, with the role of all where they have only one."""
    one = Requests()
    roles = set()
    for requests in several:
        roles.add(requests.role)
        one.merge(requests)
    if len(roles) == 1:
        (one.role,) = roles
    return one
