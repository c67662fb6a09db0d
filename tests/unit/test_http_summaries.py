"""Summaries of requests against sums that are made row by row."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coral.collectors.http_latency.paths import Paths
from coral.collectors.http_latency.routes import Routes
from coral.collectors.http_latency.summaries import summaries
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.summaries import exchanges, random_exchanges, requests

MS = 1_000_000
# The boundaries of OpenTelemetry's http.server.request.duration, extended below.
BOUNDS_MS = [
    0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 75, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10_000,
]  # fmt: skip
METHODS = (
    "", "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "_OTHER",
)  # fmt: skip
OUTCOMES = ("", "complete", "aborted_by_client", "aborted_by_server", "upgraded", "unknown")
ROLES = ("", "client", "server")
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(0, 60)
few = settings(max_examples=40)

Key = tuple[tuple[str, str], ...]


def rows_of(records: NDArray[Any], top: int = 0) -> list[pb.HttpLatencyHistogram]:
    found = summaries(records, Paths(Routes()), top).as_messages()
    return [row for row in found if isinstance(row, pb.HttpLatencyHistogram)]


def request(**fields: int) -> NDArray[Any]:
    """A GET of / by a client, that was answered; FIELDS are other fields of its record."""
    made = exchanges([b"/"])
    given_fields = {"role": 1, "method": 1, "outcome": 1, "status": 200, "began_ns": 10**9}
    for name, value in {**given_fields, **fields}.items():
        made[name] = value
    return made


def slot(time_ns: int) -> int:
    return sum(time_ns > bound * MS for bound in BOUNDS_MS)


def labels_of(record: Any) -> dict[str, str]:
    status = int(record["status"])
    path = record["path"].tobytes()[: record["path_bytes"]].decode()
    labels = {
        "role": ROLES[record["role"]],
        "method": METHODS[record["method"]],
        "route": "/".join("{id}" if it.isdigit() else it for it in path.split("/")),
        "status": str(status or ""),
        "status_class": f"{status // 100}xx" if status else "",
        "version": f"1.{record['version']}",
        "scheme": "https" if record["tls"] else "http",
    }
    return labels if status else {**labels, "outcome": OUTCOMES[record["outcome"]]}


def added_up(key: Key, records: list[Any]) -> pb.HttpLatencyHistogram:
    """The row of RECORDS, by the words of the contract."""
    one: dict[str, Any] = {
        name: int(records[0][name]) for name in ("role", "method", "status", "version")
    }
    row = pb.HttpLatencyHistogram(unit="ms", buckets=BOUNDS_MS, labels=dict(key), **one)
    row.tls, row.route = bool(records[0]["tls"]), dict(key)["route"]
    row.counts.extend([0] * 20)
    row.first_byte_counts.extend([0] * 20)
    totals, firsts = [], []
    for record in records:
        totals.append(int(record["ended_ns"]) - int(record["began_ns"]))
        row.counts[slot(totals[-1])] += 1
        if record["status"]:
            firsts.append(int(record["first_ns"]) - int(record["began_ns"]))
            row.first_byte_counts[slot(firsts[-1])] += 1
        row.errors += bool(record["status"] >= 500 or (record["status"] == 0 and
                           record["outcome"] in (2, 3)))  # fmt: skip
        row.request_body_bytes += int(record["request_body_bytes"])
        row.response_body_bytes += int(record["response_body_bytes"])
        if record["outcome"] != 1:
            row.outcomes[OUTCOMES[record["outcome"]]] += 1
    row.count = len(records)
    row.sum, row.min, row.max = sum(totals) / 1e6, min(totals) / 1e6, max(totals) / 1e6
    if firsts:
        row.first_byte_sum = sum(firsts) / 1e6
        row.first_byte_min, row.first_byte_max = min(firsts) / 1e6, max(firsts) / 1e6
    return row


@few
@given(seed=seeds, count=counts)
def test_rows_are_sums_over_requests(seed: int, count: int) -> None:
    records = random_exchanges(seed, count)
    records["status"][records["outcome"] > 3] = 0  # several outcomes without a response
    groups: defaultdict[Key, list[Any]] = defaultdict(list)
    for record in records:
        groups[tuple(sorted(labels_of(record).items()))].append(record)
    rows = rows_of(records)
    got = {tuple(sorted(row.labels.items())): row for row in rows}
    assert len(got) == len(rows) == len(groups)
    for key, alike in groups.items():
        assert got[key] == added_up(key, alike)
    assert [row.count for row in rows] == sorted((row.count for row in rows), reverse=True)


@pytest.mark.parametrize("index", range(19))
@pytest.mark.parametrize(("more_ns", "further"), [(-1, 0), (0, 0), (1, 1)])
def test_a_time_on_a_bound_is_within_its_bucket(index: int, more_ns: int, further: int) -> None:
    began_ns = 10**9
    time_ns = round(BOUNDS_MS[index] * MS) + more_ns
    records = request(began_ns=began_ns, first_ns=began_ns + time_ns, ended_ns=began_ns + time_ns)
    (row,) = rows_of(records)
    expected = [number == index + further for number in range(20)]
    assert list(row.counts) == list(row.first_byte_counts) == expected
    assert list(row.buckets) == BOUNDS_MS


def test_requests_without_a_response_have_no_first_byte_and_are_told_apart_by_their_ends() -> None:
    records = np.concatenate(
        [request(status=0, outcome=outcome, ended_ns=10**9 + 3 * MS) for outcome in (2, 3, 3, 5)]
    )
    rows = {row.labels["outcome"]: row for row in rows_of(records)}
    assert {name: (row.count, row.errors, dict(row.outcomes)) for name, row in rows.items()} == {
        "aborted_by_client": (1, 1, {"aborted_by_client": 1}),
        "aborted_by_server": (2, 2, {"aborted_by_server": 2}),
        "unknown": (1, 0, {"unknown": 1}),  # it may have been answered
    }
    for row in rows.values():
        assert (row.status, row.labels["status"], row.labels["status_class"]) == (0, "", "")
        assert not any(row.first_byte_counts)
        assert (row.first_byte_sum, row.first_byte_min, row.first_byte_max) == (0, 0, 0)
        assert (row.min, row.max) == (3, 3)


def test_responses_that_were_aborted_are_with_their_status() -> None:
    ended = {"first_ns": 10**9 + MS, "ended_ns": 10**9 + 2 * MS}
    records = np.concatenate([request(outcome=outcome, **ended) for outcome in (1, 2, 1)])
    (row,) = rows_of(records)
    assert (row.count, row.status, row.errors) == (3, 200, 0)
    assert dict(row.outcomes) == {"aborted_by_client": 1}
    assert (row.first_byte_min, row.first_byte_sum) == (1, 3)


def test_a_response_before_its_request_took_no_time() -> None:
    (row,) = rows_of(request(first_ns=10**9 - 5, ended_ns=10**9 - 1))
    assert (row.count, row.sum, row.max, row.first_byte_sum) == (1, 0, 0, 0)
    assert row.counts[0] == row.first_byte_counts[0] == 1


@few
@given(seed=seeds, count=st.integers(1, 60), top=st.integers(1, 8))
def test_top_adds_up_the_rest_for_each_role(seed: int, count: int, top: int) -> None:
    everything = requests(seed, count, 0).as_messages()
    some: list[Any] = list(requests(seed, count, top).as_messages())
    assert some[:top] == everything[:top]
    others = {other.role: other for other in some[top:]}
    rest: list[Any] = list(everything[top:])
    assert sorted(others) == sorted({row.role for row in rest})
    assert len(others) == len(some[top:])
    for role, other in others.items():
        rows = [row for row in rest if row.role == role]
        assert dict(other.labels) == {"role": ROLES[role], "route": "other"}
        assert (other.route, other.method, other.status, other.version) == ("other", 0, 0, 0)
        for name in ("count", "errors", "request_body_bytes", "response_body_bytes"):
            assert getattr(other, name) == sum(getattr(row, name) for row in rows)
        assert other.sum == pytest.approx(sum(row.sum for row in rows))
        assert other.min == min(row.min for row in rows)
        assert other.max == max(row.max for row in rows)
        answered = [row for row in rows if any(row.first_byte_counts)]
        assert other.first_byte_min == min((row.first_byte_min for row in answered), default=0)
        for name in ("counts", "first_byte_counts"):
            sums = [sum(values) for values in zip(*(getattr(row, name) for row in rows))]  # noqa: B905
            assert list(getattr(other, name)) == sums
        assert sum(other.outcomes.values()) == sum(sum(row.outcomes.values()) for row in rows)


def test_an_interval_without_requests_has_no_rows() -> None:
    nothing = summaries(exchanges([]), Paths(Routes()))
    assert len(nothing) == 0
    assert nothing.as_messages() == []
