"""Rows of single requests, made by array."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from coral.agent.streams import Filter
from coral.collectors.clock import CLOCK
from coral.collectors.contract import EventRows
from coral.collectors.http_latency.events import RequestRows
from coral.collectors.http_latency.paths import Paths
from coral.collectors.http_latency.routes import Routes
from coral.collectors.targets import Targets
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import field_of
from coral.wire.rows import row_layout
from tests.http_parser import HOST_CUT, QUERY_CUT
from tests.summaries import DETAILED, exchanges

CHANGE = np.dtype([("tgid", "u4"), ("born", "u4"), ("change", "u4"), ("comm", "S16")])
NAMED, ENDED = 2, 3


class Names:
    """The names that the kernel's map has, in place of a session's `Targets`."""

    untold_changes = 0

    def event_resources(self) -> None:
        return None

    def __init__(self, names: dict[int, bytes]) -> None:
        self.names = names

    def name_of(self, process: int) -> bytes:
        return self.names.get(process & 0xFFFFFFFF, b"")


def maker(names: dict[int, bytes] | None = None, **filters: Any) -> RequestRows:
    return RequestRows(cast("Targets", Names(names or {})), Paths(Routes()), **filters)


def changes(*told: tuple[int, int, int, bytes]) -> NDArray[Any]:
    return np.array(list(told), CHANGE)


def messages(rows: EventRows) -> list[pb.HttpRequest]:
    """The rows as a subscriber reads them."""
    name = field_of(pb.HttpRequest.DESCRIPTOR).name
    wire = row_layout(pb.EbpfEventBatch.DESCRIPTOR, name).encode(rows.records)
    return list(pb.EbpfEventBatch.FromString(wire).http_requests)


def test_a_row_has_what_the_record_says() -> None:
    record = exchanges([b"/users/7"])
    given = {
        "began_ns": 5_000_000_000, "asked_ns": 5_000_001_000, "first_ns": 5_000_300_000,
        "ended_ns": 5_002_000_000, "connection": 77, "request_body_bytes": 10,
        "response_body_bytes": 2**40, "number": 3, "pid": 42, "born": 6, "network": 9,
        "local_port": 8080, "remote_port": 60_000, "status": 201, "method": 3, "version": 1,
        "role": 2, "outcome": 1, "tls": 1,
    }  # fmt: skip
    for name, value in given.items():
        record[name] = value
    record["local"] = np.frombuffer(ip_address("2001:db8::1").packed, np.uint8)
    record["remote"] = np.frombuffer(ip_address("::ffff:10.0.0.9").packed, np.uint8)
    rows = maker({42: b"shop"}).rows(record, changes())
    (row,) = messages(rows)
    assert row.time_ns == CLOCK.unix_ns(np.array([5_000_000_000]))[0]
    assert (row.duration_ns, row.request_ns, row.first_byte_ns) == (2_000_000, 1_000, 300_000)
    assert (row.local_high, row.local_low) == (0x20010DB8 << 32, 1)
    assert (row.remote_high, row.remote_low) == (0, 0xFFFF0A000009)
    assert rows.strings[row.path] == "/users/7"
    assert rows.strings[row.route] == "/users/{id}"
    assert rows.strings[row.comm] == "shop"
    assert (row.connection_id, row.network_namespace) == (77, 9)
    for name in (
        "request_body_bytes", "response_body_bytes", "local_port", "remote_port", "pid", "role",
        "method", "outcome", "status", "number", "version", "tls",
    ):  # fmt: skip
        assert getattr(row, name) == given[name]


def test_what_had_not_passed_has_no_time() -> None:
    record = exchanges([b"/"])
    record["began_ns"], record["ended_ns"], record["outcome"] = 10**9, 10**9 + 7, 2
    (row,) = messages(maker().rows(record, changes()))
    assert (row.duration_ns, row.request_ns, row.first_byte_ns, row.status) == (7, 0, 0, 0)


def test_a_subscriber_can_ask_for_those_that_failed() -> None:
    records = exchanges([b"/"] * 6)
    records["status"] = [200, 499, 500, 599, 0, 0]
    records["outcome"] = [1, 2, 1, 1, 3, 5]
    records["number"] = range(6)
    rows = maker().rows(records, changes())
    assert rows.records["failed"].tolist() == [0, 0, 1, 1, 1, 0]
    selected = rows.records[Filter(errors_only=True).mask(rows)]
    assert selected["number"].tolist() == [2, 3, 4]


def test_each_batch_has_the_strings_of_its_own_rows_alone() -> None:
    make = maker({1: b"a", 2: b"b"})
    first, second = exchanges([b"/x", b"/y/7"]), exchanges([b"/y/8", b"/y/9"])
    first["pid"], second["pid"] = 1, 2
    assert sorted(make.rows(first, changes()).strings) == ["", "/x", "/y/7", "/y/{id}", "a"]
    assert sorted(make.rows(second, changes()).strings) == ["", "/y/8", "/y/9", "/y/{id}", "b"]


def test_processes_have_the_names_that_records_tell() -> None:
    make, record = maker(), exchanges([b"/"])
    record["pid"], record["born"] = 7, 3

    def name(*told: tuple[int, int, int, bytes]) -> str:
        rows = make.rows(record.copy(), changes(*told))
        return str(rows.strings[rows.records["comm"][0]])

    assert name((7, 3, NAMED, b"shop")) == "shop"
    assert name() == "shop"
    assert name((7, 3, NAMED, b"store")) == "store"
    assert name((7, 4, NAMED, b"later")) == "store"  # the same id, another process
    assert name((7, 3, ENDED, b"store")) == "store"  # its last requests come with its end
    assert name() == ""


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"min_duration_ns": 2_000}, [1, 2, 3, 4, 5]),
        ({"min_duration_ns": 2_001}, [2, 3, 4, 5]),
        ({"errors_only": True}, [2, 3, 4]),
        ({"min_duration_ns": 4_000, "errors_only": True}, [3, 4]),
        ({"min_duration_ns": 10**12}, []),
    ],
)
def test_filters_leave_out_what_was_not_asked_for(
    filters: dict[str, Any], expected: list[int]
) -> None:
    records = exchanges([b"/"] * 6)
    records["began_ns"], records["ended_ns"] = 10**9, 10**9 + 1_000 * np.arange(1, 7)
    records["status"] = [200, 499, 500, 599, 0, 0]
    records["outcome"] = [1, 2, 1, 1, 3, 5]
    records["number"] = range(6)
    rows = maker(**filters).rows(records, changes())
    assert rows.records["number"].tolist() == expected
    assert len(messages(rows)) == len(expected)


def detailed(path: bytes, query: bytes = b"", host: bytes = b"", flags: int = 0) -> NDArray[Any]:
    """A request with details, as the kernel's record has them."""
    record = np.zeros(1, DETAILED)
    record["exchange"] = exchanges([path])
    target = record["exchange"]["path"].view(np.uint8)
    target[0, len(path) : len(path) + len(query)] = np.frombuffer(query, np.uint8)
    target[0, len(path) + len(query) :] = 0x78  # of a longer one before
    record["host"].view(np.uint8)[0, : len(host)] = np.frombuffer(host, np.uint8)
    record["query_bytes"], record["host_bytes"] = len(query), len(host)
    record["exchange"]["path_flags"] |= flags
    return record


def test_details_are_strings_of_the_batch() -> None:
    records = np.concatenate(
        [
            detailed(b"/a", b"b=c", b"shop:80"),
            detailed(b"/a", b"b=c", b"shop:80", QUERY_CUT | HOST_CUT),
            detailed(b"/a"),
            detailed(b"/users/7", b"e=\x1b[1m\xff", b"h" * 64),
            detailed(b"/", b"q" * 255),
            detailed(b"/" * 256, b"", b"", QUERY_CUT),
        ]
    )
    records["trace"][0], records["parent"][0] = (0x4BF9, 2**63), 255
    records["trace"][3], records["parent"][3] = (0, 1), 2**64 - 1
    rows = maker().rows(records, changes())
    texts = {
        name: [rows.strings[at] for at in rows.records[name].tolist()]
        for name in ("query", "host", "trace_id", "parent_span_id", "path", "route")
    }
    assert texts["query"] == ["b=c", "b=c…", "", "e=%1B[1m%FF", "q" * 255, "…"]
    assert texts["host"] == ["shop:80", "shop:80…", "", "h" * 64, "", ""]
    assert texts["trace_id"] == [f"{0x4BF9:016x}{2**63:016x}", "", "", f"{1:032x}", "", ""]
    assert texts["parent_span_id"] == [f"{255:016x}", "", "", "f" * 16, "", ""]
    assert texts["path"] == ["/a"] * 3 + ["/users/7", "/", "/" * 256]
    assert texts["route"][3] == "/users/{id}"
    assert len(messages(rows)) == 6


def test_filters_apply_to_requests_with_details() -> None:
    records = np.concatenate([detailed(b"/a", b"x"), detailed(b"/b", b"y")])
    records["exchange"]["ended_ns"] = [1_000, 2_000]
    rows = maker(min_duration_ns=2_000).rows(records, changes())
    assert [rows.strings[at] for at in rows.records["query"].tolist()] == ["y"]


def test_what_is_in_progress_has_no_duration() -> None:
    records = exchanges([b"/"] * 2)
    records["began_ns"], records["ended_ns"] = 10**9, 10**9 + 5_000
    records["outcome"] = [1, 6]
    rows = maker(min_duration_ns=5_000).rows(records, changes())
    assert rows.records["duration_ns"].tolist() == [5_000, 0]
    assert rows.records["failed"].tolist() == [0, 0]
