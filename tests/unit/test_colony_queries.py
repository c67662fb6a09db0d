"""Named queries on small, exact tables."""

from __future__ import annotations

import re
from typing import Any

import pytest

from coral.colony.answers import query
from coral.colony.answers.answer import Answer, answered
from coral.colony.answers.named import HTTP, NAMED, PROFILE, SERVICES, SYSCALLS, TCP, Named
from coral.colony.answers.query import Asked
from coral.colony.answers.refusals import NotFoundError, RefusedError
from coral.colony.answers.window import HOUR_NS, MINUTE_NS, SECOND_NS, Window
from coral.wire.http import BOUNDS_NS
from tests.colony_tables import PlainReads

NOON = 1_700_000_000_000_000_000 // HOUR_NS * HOUR_NS
NOW = NOON + 30 * MINUTE_NS
MS = 1_000_000
# Of wire/http.py, those that these tests fill: the slots begin at 0.5, 5, 75 and 100 ms.
BOUNDS = (1 * MS, 10 * MS, 100 * MS, 250 * MS)


def place(service: str = "checkout", agent: str = "n1") -> dict[str, Any]:
    return {
        "agent": agent,
        "session": "s1",
        "service": service,
        "namespace": "shop",
        "workload": f"deploy/{service}",
        "pod": "",
        "container": "",
    }


def requests(
    at_ns: int,
    counts: tuple[int, int, int, int],
    *,
    route: str = "/pay",
    status: int = 200,
    errors: int = 0,
    role: str = "server",
    most_ns: int = 0,
    tier: str = "",
    **where: Any,
) -> dict[str, Any]:
    return {
        "time_ns": at_ns,
        "interval_ns": MINUTE_NS if tier else 10 * SECOND_NS,
        **place(**where),
        "role": role,
        "method": "GET",
        "route": route,
        "status": status,
        "version": 1,
        "tls": False,
        "count": sum(counts),
        "errors": errors,
        "request_body_bytes": 10 * sum(counts),
        "response_body_bytes": 1000 * sum(counts),
        "sum_ns": sum(counts) * MS,
        "max_ns": most_ns or 200 * MS,
        "min_ns": 600_000,
        **{f"duration_le_{bound}": n for bound, n in zip(BOUNDS, counts, strict=True)},
        "first_byte_le_1000000": sum(counts),
    }


def syscalls(at_ns: int, **figures: Any) -> dict[str, Any]:
    return {
        "time_ns": at_ns,
        "interval_ns": 10 * SECOND_NS,
        **place(),
        "syscall": "read",
        "comm": "shop",
        "call_count": 10,
        "error_count": 1,
        "total_duration_ns": 5000,
        "max_duration_ns": 1900,
        "latency_e8": 5,
        "latency_e10": 5,
        **figures,
    }


@pytest.fixture
def reads() -> PlainReads:
    return PlainReads(NOW)


def ask(reads: PlainReads, named: Named, since_ns: int = NOON, **asked: Any) -> Answer:
    wanted = Asked(named, Window(since_ns, NOW), **asked).checked()
    return answered(reads.con.cursor(), reads.sources(), wanted)


def test_requests_are_added_up_by_route_and_quantiles_come_from_the_merged_histogram(
    reads: PlainReads,
) -> None:
    reads.add(
        "http_latency",
        requests(NOON + SECOND_NS, (90, 0, 0, 0)),
        requests(NOON + 11 * SECOND_NS, (0, 8, 0, 2), status=503, errors=10, agent="n2"),
        requests(NOON + 11 * SECOND_NS, (0, 5, 0, 0), route="/", status=404),
    )
    answer = ask(reads, HTTP)
    pay, root = answer.table.to_pylist()
    assert (pay["service"], pay["role"], pay["route"]) == ("checkout", "server", "/pay")
    assert (pay["count"], pay["errors"], pay["status_5xx"], pay["status_4xx"]) == (100, 10, 10, 0)
    assert pay["p50_ns"] == pytest.approx((0.6 + 0.4 * 50 / 90) * MS)  # from the least
    assert pay["p95_ns"] == pytest.approx((5 + 5 * 5 / 8) * MS)
    assert pay["p99_ns"] == pytest.approx((100 + 100 / 2) * MS)  # to the greatest, 200 ms
    assert [count for count in pay["histogram"] if count] == [90, 8, 2]
    assert len(pay["histogram"]) == len(BOUNDS_NS) + 1
    assert (root["count"], root["status_4xx"]) == (5, 5)
    bounds = answer.table.schema.field("histogram").metadata[b"bounds"].decode()
    assert bounds == ",".join(map(str, BOUNDS_NS))
    assert (answer.coverage.rows_used, answer.coverage.rows) == (3, 2)
    assert not answer.coverage.cut


def test_top_leaves_out_the_rest_and_says_how_many(reads: PlainReads) -> None:
    routes = [requests(NOON, (n, 0, 0, 0), route=f"/{n}") for n in range(1, 8)]
    reads.add("http_latency", *routes)
    answer = ask(reads, HTTP, top=3)
    assert answer.table.column("route").to_pylist() == ["/7", "/6", "/5"]
    assert (answer.coverage.cut, answer.coverage.left_out, answer.coverage.rows) == (True, 4, 3)
    assert answer.coverage.rows_used == 7


def test_minutes_are_used_where_they_are_whole_and_raw_rows_elsewhere(reads: PlainReads) -> None:
    raw = [requests(NOON + at * SECOND_NS, (1, 0, 0, 0)) for at in range(0, 180, 10)]
    reads.add("http_latency", *raw)
    # Twice as many as there are raw rows: so a test sees which were used.
    minutes = [requests(NOON + at * MINUTE_NS, (12, 0, 0, 0), tier="1m") for at in (0, 1)]
    reads.add("http_latency_1m", *minutes)
    reads.watermarks[MINUTE_NS] = NOON + 2 * MINUTE_NS
    answer = ask(reads, HTTP, NOON + 30 * SECOND_NS)
    (row,) = answer.table.to_pylist()
    assert row["count"] == 3 + 12 + 6
    pieces = [(it.tier, it.to.ToNanoseconds() - NOON) for it in answer.coverage.pieces]
    assert pieces == [("raw", MINUTE_NS), ("1m", 2 * MINUTE_NS), ("raw", NOW - NOON)]


def test_what_rollups_do_not_have_is_read_from_raw_rows(reads: PlainReads) -> None:
    reads.add("syscall_stats", syscalls(NOON, pid=7), syscalls(NOON, pid=8))
    reads.add("syscall_stats_1m", syscalls(NOON, call_count=12))
    reads.watermarks[MINUTE_NS] = NOON + MINUTE_NS
    rows = ask(reads, SYSCALLS, by=("pid",)).table.to_pylist()
    assert [(row["pid"], row["calls"]) for row in rows] == [(7, 10), (8, 10)]
    assert ask(reads, SYSCALLS).table.to_pylist()[0]["calls"] == 12


def test_rows_by_time_are_in_parts_of_the_window(reads: PlainReads) -> None:
    at = (0, 10, 50, 60, 119, 300)
    reads.add("http_latency", *(requests(NOON + s * SECOND_NS, (1, 0, 0, 0)) for s in at))
    reads.add("http_latency_1h", requests(NOON, (999, 0, 0, 0), tier="1h"))
    reads.watermarks[HOUR_NS] = NOW + HOUR_NS
    table = ask(reads, HTTP, by=("time",)).table
    rows = table.to_pylist()
    parts = [((row["time"] - NOON) // SECOND_NS, row["count"]) for row in rows]
    assert parts == [(0, 2), (30, 1), (60, 1), (90, 1), (300, 1)]
    assert table.schema.field("time").metadata[b"step_ns"] == b"30000000000"
    with pytest.raises(RefusedError, match="against: rows by time are not compared"):
        ask(reads, HTTP, by=("time",), against_ns=HOUR_NS)


def test_services_and_values_choose_rows(reads: PlainReads) -> None:
    reads.add(
        "http_latency",
        *(requests(NOON, (n, 0, 0, 0), service=s) for n, s in enumerate(("a-1", "a-2", "b'%_"), 1)),
        requests(NOON, (10, 0, 0, 0), service="a_1", status=404),
    )

    def chosen(**asked: Any) -> dict[str, int]:
        rows = ask(reads, HTTP, by=("service",), **asked).table.to_pylist()
        return {row["service"]: row["count"] for row in rows}

    assert chosen(services=("a-1",)) == {"a-1": 1}
    assert chosen(services=("a-*",)) == {"a-1": 1, "a-2": 2}
    assert chosen(services=("a-1", "b'%_")) == {"a-1": 1, "b'%_": 3}
    assert chosen(services=("b'*",)) == {"b'%_": 3}
    assert chosen(where={"status": "404"}) == {"a_1": 10}


def test_requests_that_cannot_be_answered_name_what_is_there(reads: PlainReads) -> None:
    reads.add("http_latency", requests(NOON, (1, 0, 0, 0)))
    with pytest.raises(RefusedError, match=r"by: no such column: 'servce'; did you mean service"):
        ask(reads, HTTP, by=("servce",))
    with pytest.raises(RefusedError, match="where: no such column: 'x'"):
        ask(reads, HTTP, where={"x": "1"})
    with pytest.raises(NotFoundError, match="no such service: 'chekout'; did you mean checkout"):
        ask(reads, HTTP, services=("chekout",))


@pytest.mark.parametrize(
    ("named", "column", "wrong", "accepted", "right"),
    [
        (HTTP, "status", ("abc", "", "-1", "0503", "5x*"), "a whole number", ("503", "5*")),
        (TCP, "port", ("https", "4.0"), "a whole number", ("443", "*", "0")),
        (SYSCALLS, "pid", ("self",), "a whole number", ("7", "1*7")),
        (PROFILE, "tgid", ("x",), "a whole number", ("7",)),
        (HTTP, "role", ("foo", "listener"), "one of client, server", ("client", "s*", "")),
        (TCP, "role", ("foo",), "one of client, server, listener", ("listener",)),
        (HTTP, "method", ("get",), "one of GET, HEAD, POST", ("GET", "_OTHER")),
        (HTTP, "tls", ("yes",), "true or false", ("true", "false", "t*")),
        (HTTP, "route", (), "", ("anything",)),
    ],
)
def test_a_value_that_a_column_never_has_is_refused(
    named: Named, column: str, wrong: tuple[str, ...], accepted: str, right: tuple[str, ...]
) -> None:
    for text in right:
        Asked(named, Window(NOON, NOW), where={column: text}).checked()
    for text in wrong:
        words = f"where: {column}={text!r} is not accepted; give {column} as {accepted}"
        with pytest.raises(RefusedError, match=re.escape(words)):
            Asked(named, Window(NOON, NOW), where={column: text}).checked()


def test_a_service_that_is_known_has_an_empty_answer(reads: PlainReads) -> None:
    reads.add("http_latency", requests(NOON - HOUR_NS, (1, 0, 0, 0)))
    answer = ask(reads, HTTP, services=("checkout",))
    assert answer.table.num_rows == 0
    assert list(answer.coverage.notes) == ["nothing of http_latency was collected in this time"]


def test_an_empty_answer_begins_when_somebody_began_to_look(reads: PlainReads) -> None:
    session = {"kind": "http_latency", "service": "checkout", "stored": 0, "agent": "n1"}
    began_ns = NOON + MINUTE_NS
    reads.add("ledger", {**session, "session": "s1", "started_ns": began_ns, "updated_ns": NOW})
    coverage = ask(reads, HTTP).coverage
    assert getattr(coverage, "from").ToNanoseconds() == began_ns
    with pytest.raises(NotFoundError, match="where: no such agent: 'n9'; there is n1"):
        ask(reads, HTTP, where={"agent": "n9"})


def test_no_quantile_of_a_service_is_above_its_slowest_request(reads: PlainReads) -> None:
    slow = (0, 0, 0, 9)
    made = requests(NOON, slow, role="client", most_ns=240 * MS)
    reads.add("http_latency", requests(NOON, slow), made)
    (row,) = ask(reads, SERVICES).table.to_pylist()
    assert 199 * MS <= row["p99_ns"] <= row["max_ns"] == 200 * MS


def test_an_empty_colony_answers(reads: PlainReads) -> None:
    for named in NAMED.values():
        assert ask(reads, named).table.num_rows == 0
        assert ask(reads, named, against_ns=HOUR_NS).table.num_rows == 0


def test_two_windows_side_by_side_tell_slower_failing_new_and_gone(reads: PlainReads) -> None:
    before = NOON - HOUR_NS
    reads.add(
        "http_latency",
        requests(before, (100, 0, 0, 0), route="/slow", most_ns=MS),
        requests(NOON, (0, 100, 0, 0), route="/slow", most_ns=10 * MS),
        requests(before, (100, 0, 0, 0), route="/failing"),
        requests(NOON, (100, 0, 0, 0), route="/failing", errors=20),
        requests(before, (100, 0, 0, 0), route="/chance", errors=3),
        requests(NOON, (95, 5, 0, 0), route="/chance", errors=5),
        requests(before, (1, 0, 0, 0), route="/gone"),
        requests(NOON, (1, 0, 0, 0), route="/new"),
        requests(before, (1, 0, 0, 0), route="/few"),
        requests(NOON, (0, 0, 1, 0), route="/few"),
        requests(before, (100, 0, 0, 0), route="/same"),
        requests(NOON, (200, 0, 0, 0), route="/same"),
    )
    answer = ask(reads, HTTP, by=("route",), against_ns=HOUR_NS)
    rows = {row["route"]: row for row in answer.table.to_pylist()}
    assert {route: row["verdict"] for route, row in rows.items()} == {
        "/failing": "failing",
        "/slow": "slower",
        "/new": "new",
        "/gone": "gone",
        "/few": "",
        "/chance": "",
        "/same": "",
    }
    assert list(rows)[:2] == ["/failing", "/slow"]
    assert (rows["/slow"]["count"], rows["/slow"]["count_before"]) == (100, 100)
    assert rows["/slow"]["p50_ns"] == pytest.approx(7.5 * MS)
    assert rows["/gone"]["count"] is None
    against = answer.coverage.against
    assert getattr(against, "from").ToNanoseconds() == before
    assert (answer.coverage.rows_used, against.rows_used) == (6, 6)


def test_what_was_left_out_of_a_window_is_neither_new_nor_gone(
    reads: PlainReads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query, "MOST_GROUPS", 2)
    for at_ns, counts in ((NOON - HOUR_NS, (1, 50, 100)), (NOON, (100, 50, 1))):
        by_route = zip(("/a", "/b", "/c"), counts, strict=True)
        reads.add("http_latency", *(requests(at_ns, (n, 0, 0, 0), route=it) for it, n in by_route))
    answer = ask(reads, HTTP, by=("route",), against_ns=HOUR_NS)
    verdicts = {row["route"]: row["verdict"] for row in answer.table.to_pylist()}
    assert verdicts == {"/a": "", "/b": "", "/c": ""}
    coverage = answer.coverage
    assert [(it.cut, it.left_out) for it in (coverage, coverage.against)] == [(True, 1)] * 2


def test_syscalls_have_log2_quantiles(reads: PlainReads) -> None:
    reads.add("syscall_stats", syscalls(NOON))
    (row,) = ask(reads, SYSCALLS).table.to_pylist()
    assert (row["calls"], row["errors"], row["total_ns"], row["max_ns"]) == (10, 1, 5000, 1900)
    assert row["p50_ns"] == 512
    assert row["p95_ns"] == 1900  # 1024 + 1024 * 4.5 / 5, and never above the greatest


def test_tcp_has_peers_and_connections_under_one_name(reads: PlainReads) -> None:
    common = {"time_ns": NOON, "interval_ns": 10**10, **place(), "role": "client"}
    counters = {
        "bytes_sent": 100,
        "bytes_received": 50,
        "segments_sent": 10,
        "retransmits": 1,
        "retransmits_timeout": 0,
        "listen_drops": 0,
        "rtt_us_le_100": 4,
        "rtt_us_le_inf": 0,
    }
    reads.add(
        "tcp_peers",
        {
            **common,
            "remote_address": "10.0.0.1",
            "port": 5432,
            "connections_opened": 3,
            "connections_established": 2,
            "connections_closed": 1,
            "connections_failed": 1,
            **counters,
            "ends_refused": 1,
        },
    )
    reads.add(
        "tcp_metrics",
        {
            **common,
            "remote_address": "10.0.0.1",
            "remote_port": 5432,
            "local_port": 40000,
            "opened": 1,
            "established": 1,
            "closed": 1,
            "failed": 0,
            "end": "reset_remote",
            **counters,
        },
    )
    (row,) = ask(reads, TCP).table.to_pylist()
    assert (row["remote_address"], row["port"]) == ("10.0.0.1", 5432)
    assert (row["opened"], row["established"], row["closed"], row["failed"]) == (4, 3, 2, 1)
    assert (row["refused"], row["resets"], row["bytes_sent"]) == (1, 1, 200)
    assert row["rtt_p50_us"] == 75  # the slot begins at 50


def test_services_are_seen_by_all_kinds(reads: PlainReads) -> None:
    reads.add(
        "http_latency",
        requests(NOON, (5, 0, 0, 0), errors=1),
        requests(NOON, (0, 0, 0, 7), role="client", agent="n2"),
    )
    common = {"time_ns": NOON, "interval_ns": 10**10, **place("db", "n2")}
    reads.add(
        "syscall_stats",
        {**common, "syscall": "read", "call_count": 9, "error_count": 2},
    )
    rows = ask(reads, SERVICES).table.to_pylist()
    checkout, db = sorted(rows, key=lambda row: row["service"])
    assert (checkout["agents"], checkout["requests"], checkout["requests_made"]) == (2, 5, 7)
    assert checkout["p99_ns"] < MS
    assert (db["agents"], db["calls"], db["requests"]) == (1, 9, 0)


def test_counts_that_no_sum_can_hold_make_no_answer_fail(reads: PlainReads) -> None:
    most = (1 << 63) - 1
    counts = {"count": most, "sum_ns": most, "duration_le_1000000": most, "status": 500}
    calls = {"call_count": most, "total_duration_ns": most, "latency_e10": most}
    peers = {"remote_address": "10.0.0.1", "ends_reset_local": most, "ends_reset_remote": most}
    traffic = {"bytes_sent": most, "bytes_received": most, "rtt_us_le_100": most}
    figures = {"opened": 1, "established": 1, "closed": 1, "failed": 1}
    lost = {"time_ns": NOON, "time_from_ns": NOON, "time_to_ns": NOON, "kind": "http_latency"}
    for table, row in {
        "http_latency": {**requests(NOON, (1, 0, 0, 0)), **counts},
        "syscall_stats": syscalls(NOON, **calls),
        "tcp_peers": {"time_ns": NOON, **place(), "role": "client", **peers, **traffic},
        "tcp_metrics": {"time_ns": NOON, **place(), "role": "client", **traffic, **figures},
        "losses": {**lost, "agent": "n1", "service": "checkout", "stage": "x", "count": most},
    }.items():
        reads.add(table, *[row] * 3)
    for named in (HTTP, SYSCALLS, TCP, SERVICES):
        assert ask(reads, named).table.num_rows
    answer = ask(reads, HTTP)
    assert answer.table["count"].to_pylist() == [1 << 60]
    assert answer.coverage.lost[0].count == 1 << 60


def test_coverage_says_what_was_lost_and_who_was_away(reads: PlainReads) -> None:
    reads.add("http_latency", requests(NOON, (1, 0, 0, 0)))
    loss = {"agent": "n1", "session": "s1", "kind": "http_latency", "in_kernel": True}
    at = {"time_ns": NOON, "time_from_ns": NOON - SECOND_NS, "time_to_ns": NOON + SECOND_NS}
    reads.add(
        "losses",
        {**loss, **at, "service": "checkout", "stage": "kernel_buffer", "count": 300},
        {**loss, **at, "service": "checkout", "stage": "kernel_buffer", "count": 12},
        {**loss, **at, "service": "other", "stage": "kernel_buffer", "count": 1},
        {**loss, **at, "service": "", "stage": "agent_lost", "count": 2},
        {**loss, **at, "kind": "cpu_profile", "service": "checkout", "stage": "x", "count": 9},
    )
    reads.add(
        "gaps",
        {"agent": "n3", "time_from_ns": NOON, "time_to_ns": NOON + MINUTE_NS, "why": "refused"},
        {"agent": "n4", "time_from_ns": NOON, "time_to_ns": None, "why": "no such host"},
        {"agent": "n5", "time_from_ns": NOON - 9, "time_to_ns": NOON, "why": "before"},
    )
    session = {"kind": "http_latency", "service": "checkout", "started_ns": NOON, "stored": 1}
    reads.add(
        "ledger",
        {**session, "agent": "n1", "session": "s1", "updated_ns": NOW - 5 * SECOND_NS},
        {**session, "agent": "n4", "session": "s2", "updated_ns": NOW - HOUR_NS},
    )
    reads.add(
        "agents",
        {"agent": "n4", "connected": False, "last_seen_ns": NOON, "detail": "no such host"},
        {"agent": "n1", "connected": True},
    )
    coverage = ask(reads, HTTP, services=("checkout",)).coverage
    assert [(it.stage, it.count, it.service) for it in coverage.lost] == [
        ("kernel_buffer", 312, "checkout"),
        ("agent_lost", 2, ""),
    ]
    assert getattr(coverage.lost[0], "from").ToNanoseconds() == NOON - SECOND_NS
    assert [(gap.agent, gap.HasField("to"), gap.why) for gap in coverage.gaps] == [
        ("n3", True, "refused"),
        ("n4", False, "no such host"),
    ]
    assert coverage.complete_to.ToNanoseconds() == NOW - 5 * SECOND_NS


def test_of_sessions_that_saw_the_same_only_the_first_counts(reads: PlainReads) -> None:
    first = requests(NOON + 2 * SECOND_NS, (1, 0, 0, 0))
    again = [
        {**requests(NOON + at * SECOND_NS, (10, 0, 0, 0)), "session": "s2"} for at in (2, 60, 61)
    ]
    reads.add("http_latency", first, *again)
    session = {"kind": "http_latency", "service": "checkout", "stored": 1, "agent": "n1"}
    reads.add(
        "ledger",
        {
            **session,
            "session": "s1",
            "started_ns": NOON - HOUR_NS,
            "ended_ns": NOON + MINUTE_NS,
            "config": '{"interval":"10s"}',
        },
        {**session, "session": "s2", "started_ns": NOON, "config": '{"interval":"1s"}'},
    )
    answer = ask(reads, HTTP)
    assert answer.table.to_pylist()[0]["count"] == 1 + 10
    note = answer.coverage.notes[0]
    assert note.startswith("a session on n1 saw the same as another at the time: it is left out")


def test_sessions_that_saw_part_of_the_same_are_noted(reads: PlainReads) -> None:
    session = {"kind": "http_latency", "service": "checkout", "stored": 1, "agent": "n1"}
    reads.add(
        "ledger",
        {**session, "session": "s1", "started_ns": NOON - HOUR_NS, "config": "{}"},
        {**session, "session": "s2", "started_ns": NOON, "config": '{"pid":"7"}'},
        {**session, "session": "s3", "started_ns": NOON, "config": '{"mode":"events"}'},
    )
    note = ask(reads, HTTP).coverage.notes[0]
    assert note.startswith("several sessions of http_latency with different options watched")


def test_profiles_are_stacks_with_their_frames(reads: PlainReads) -> None:
    def samples(stack: int, count: int, process: str = "shop") -> dict[str, Any]:
        row = {"time_ns": NOON, "interval_ns": 10**10, **place(), "stack_id": stack}
        own = {"process": process, "tid": count, "end": "bottom", "unwinding": "eh_frame"}
        own |= {"samples_lost": int(count == 5), "samples_truncated": 2}
        return {**row, **own, "in_kernel": False, "count": count, "cpu_ns": count * 10**7}

    reads.add("cpu_profile", samples(1, 5), samples(1, 6), samples(2**63 + 1, 2), samples(3, 1))
    frames = {"functions": ["main", "work"], "modules": ["shop", "shop"], "build_ids": ["", ""]}
    numbers = {"addresses": [1, 2], "flags": [0, 4]}
    reads.add(
        "cpu_stacks",
        {"stack_id": 1, "time_ns": NOON - 20 * HOUR_NS, **frames, **numbers},
        {"stack_id": 1, "time_ns": NOON, **frames, **numbers},
        {"stack_id": 2**63 + 1, "time_ns": NOON, **frames, **numbers, "functions": ["main", "b"]},
    )
    one, two, three = ask(reads, PROFILE).table.to_pylist()
    assert (one["service"], one["process"], one["count"], one["cpu_ns"]) == (
        *("checkout", "shop", 11, 11 * 10**7),
    )
    assert (one["functions"], one["flags"]) == (["main", "work"], [0, 4])
    assert (one["samples_lost"], one["samples_truncated"]) == (1, 4)
    assert two["functions"] == ["main", "b"]
    assert (three["count"], three["functions"]) == (1, None)
    assert "stack_id" not in one
