"""What rollups become as metrics, and what waits for receivers: step by step."""

from __future__ import annotations

import cramjam
import numpy as np
import pyarrow as pa
import pytest

from coral.agent.serving.prometheus import Registry
from coral.agent.sessions.supervisor import Supervisor
from coral.collectors.syscall_stats import measures as syscall_measures
from coral.collectors.tcp_metrics import measures as tcp_measures
from coral.colony.export.adding import Buckets, groups
from coral.colony.export.backlog import Backlog, Request
from coral.colony.export.measures import TABLES, Totals
from coral.colony.export.remote_write import MOST_SAMPLES, Encoder
from coral.colony.tables.layout import TABLES as TABLES_OF_ROWS
from tests.rollups import WEB, of_all_kinds, syscalls


def all_kinds() -> Totals:
    totals = Totals(100)
    for name, rows in of_all_kinds().items():
        totals.add(name, rows)
    return totals


async def test_names_types_and_buckets_are_those_of_the_agents() -> None:
    agents = {family.name: family.type for family in Registry(Supervisor()).collect()}
    bounds: dict[str, set[str]] = {}
    for family in all_kinds().collect():
        assert agents.get(family.name, family.type) == family.type
        assert family.name in agents or family.name.startswith(("http_", "coral_profile_"))
        bounds[family.name] = {it.labels["le"] for it in family.samples if "le" in it.labels}
    assert bounds["coral_syscall_duration_seconds"] == {
        *(end for end, _ in syscall_measures._BUCKETS), "+Inf",
    }  # fmt: skip
    nothing = np.zeros(len(tcp_measures._BUCKETS_US) + 2, np.uint64)
    ends = {end for end, _ in tcp_measures._buckets(nothing, tcp_measures._BUCKETS_US)}
    assert bounds["system_network_tcp_rtt_duration_seconds"] == ends


def test_each_slot_is_in_the_bucket_that_has_all_of_it() -> None:
    buckets = Buckets("latency", (256, 1024), 1e9)
    figures = {
        "latency_e6": 1, "latency_e7": 2, "latency_e8": 4, "latency_e9": 8, "latency_e10": 16,
        "latency_le_256": 32, "latency_le_257": 64, "latency_le_1025": 128, "latency_le_inf": 256,
        "latency_max": 1000, "other_e6": 1000,
    }  # fmt: skip
    assert buckets.of(figures) == [1 + 2 + 32, 4 + 8 + 64, 16 + 128 + 256]
    assert buckets.cumulative([1, 2, 3]) == [("2.56e-07", 1.0), ("1.024e-06", 3.0), ("+Inf", 6.0)]


def test_agents_are_added_up_and_what_is_missing_is_nothing() -> None:
    rows = pa.table(
        {
            "service": pa.array(["web", "web", None]),
            "syscall": pa.array(["read", "read", None]),
            "time_ns": pa.array([1, 2, 3]),
            "call_count": pa.array([1, None, 7]),
        }
    )
    found = sorted(groups(rows, ("syscall",)), key=lambda it: it.keys)
    assert [(it.service, it.keys, it.figures) for it in found] == [
        ("", ("",), {"call_count": 7}),
        ("web", ("read",), {"call_count": 1}),
    ]


def test_services_of_other_namespaces_are_others_and_the_rest_is_added_up() -> None:
    totals = Totals(2)
    for at, namespace in enumerate(("a", "b", "c", "d")):
        row = {**WEB, "namespace": namespace, "syscall": "read", "latency_e6": 10**at}
        totals.add("syscall_stats_1m", syscalls(row))
    calls = next(iter(totals.collect()))
    counted = {
        (getattr(it.labels["service"], "more", {}).get("namespace", ""), it.value)
        for it in calls.samples
        if it.name.endswith("_total")
    }
    assert counted == {("a", 1), ("b", 10), ("", 1100)}
    assert totals.dropped == 2


def test_requests_have_at_most_so_many_samples_and_the_same_ones_each_time() -> None:
    totals, encoder = Totals(10_000), Encoder({"job": "x"})
    rows = [{**WEB, "syscall": f"call{n}", "latency_e6": 1} for n in range(300)]
    totals.add("syscall_stats_1m", syscalls(*rows))
    families = list(totals.collect())
    total = sum(
        not sample.name.endswith("_created") for family in families for sample in family.samples
    )
    first = list(encoder.requests(families, 1_700_000_000_000))
    assert [count for _, count in first][:-1] == [MOST_SAMPLES] * (total // MOST_SAMPLES)
    assert sum(count for _, count in first) == total
    assert list(encoder.requests(families, 1_700_000_000_000)) == first
    plain = bytes(cramjam.snappy.decompress_raw(first[0][0]))
    name = b"\x0a\x08__name__\x12\x19coral_syscall_calls_total"
    assert plain.index(name) < plain.index(b"\x0a\x09container\x12\x03app")
    assert plain.count(b"\x0a\x03job\x12\x01x") == MOST_SAMPLES


def test_the_oldest_requests_give_way() -> None:
    backlog = Backlog(25)
    assert [backlog.add(Request(b"x" * 10, n)) for n in (1, 2, 3, 4)] == [0, 0, 1, 2]
    assert (backlog.size_bytes, backlog.samples, len(backlog)) == (20, 7, 2)
    assert backlog.add(Request(b"x" * 100, 5)) == 7
    assert backlog.take().samples == 5
    with pytest.raises(IndexError):
        backlog.take()


def ones(table: str, **keys: str) -> pa.Table:
    """A row of the rollup TABLE, as the colony's tables have it, all of whose figures are 1."""
    schema = TABLES_OF_ROWS[table].rollup_schema
    columns = {}
    for it in schema:
        value: object = 1 if pa.types.is_integer(it.type) else keys.get(it.name, "")
        columns[it.name] = pa.array([True if pa.types.is_boolean(it.type) else value], it.type)
    return pa.table(columns)


def test_the_columns_are_those_of_the_colonys_tables() -> None:
    totals = Totals(100)
    for name in TABLES:
        base = name.removesuffix("_1m")
        assert set(TABLES[name].keys) - {"error"} <= set(TABLES_OF_ROWS[base].keys)
        totals.add(name, ones(base, role="client", method="GET", service=base))
    found = {
        (sample.name, sample.labels["service"], sample.labels.get("error_type")): sample.value
        for family in totals.collect()
        for sample in family.samples
        if sample.labels.get("role", "client") == "client"
        and sample.labels.get("le", "+Inf") == "+Inf"
    }
    expected = {
        ("coral_syscall_calls_total", "syscall_stats", None): 32,  # slots
        ("http_client_request_duration_seconds_count", "http_latency", ""): 20,
        ("http_client_response_body_size_bytes_sum", "http_latency", ""): 1,
        ("system_network_tcp_rtt_duration_seconds_count", "tcp_metrics", None): 16,
        ("system_network_tcp_handshake_duration_seconds_count", "tcp_peers", None): 16,
        ("system_network_tcp_connections_total", "tcp_metrics", ""): 1,
        ("system_network_tcp_connections_total", "tcp_peers", "timed_out"): 1,
        ("system_network_tcp_connections_total", "tcp_peers", "_OTHER"): 1,
        ("system_network_tcp_io_bytes_total", "tcp_peers", None): 1,
        ("system_network_tcp_retransmits_total", "tcp_metrics", None): 1,
        ("coral_profile_cpu_seconds_total", "cpu_profile", None): 1e-9,
        ("coral_profile_samples_lost_total", "cpu_profile", None): 1,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["coral_syscall_errors_total", "syscall_stats", None] == 1
