"""From the bytes that agents send to tables: every value of every kind, whatever the shape of the
batches, and nothing of a batch that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coral.client import Batch, ContractError
from coral.collectors.contract import EventRows, Summaries
from coral.collectors.tcp_metrics.connections import BOUNDS_US, NAMES
from coral.colony.tables import (
    HOUR,
    LEVELS,
    MINUTE,
    STACKS,
    TABLES,
    ContractRows,
    Intake,
    Rollup,
    schema_of,
)
from coral.colony.tables import layout as tables_layout
from coral.colony.tables import stacks as stacks_room
from coral.colony.tables.checks import check_numbers
from coral.colony.tables.matrices import MOST_COLUMNS
from coral.colony.tables.texts import MOST_CHARACTERS, Texts
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.cpu_profile.profile import Frame
from coral.views.data import short_name
from coral.wire.http import BOUNDS_NS
from coral.wire.kinds import rows_fields
from coral.wire.rows import row_layout
from tests.deliveries import (
    INTERVAL_NS,
    NOW_NS,
    delivered,
    delivery_of,
    message_of,
    session_of,
    wire_of,
)
from tests.profiles import HOSTILE, Stack, batch_of
from tests.summaries import Make, connections, peers, requests, syscalls

SECOND_NS: Final = 10**9
DAY_NS: Final = 86_400 * SECOND_NS

Row = Mapping[str, Any]


def intake(now_ns: int = NOW_NS) -> Intake:
    return Intake(lambda: now_ns)


def word(enum: Any, number: int) -> str:
    """The word of a value, as tables have it."""
    text = short_name(enum.DESCRIPTOR, number)
    return "" if text == "unspecified" else text


def bounded(name: str, counts: Sequence[int], bounds: Sequence[int]) -> Row:
    """The columns of a histogram by bounds, none of which has to be sent."""
    padded = [*counts, *[0] * (len(bounds) + 1 - len(counts))]
    return {
        f"{name}_le_{bound}": count for bound, count in zip((*bounds, "inf"), padded, strict=True)
    }


def of_syscalls(row: pb.SyscallStats) -> Row:
    counts = [*row.latency_ns.counts, *[0] * 32][:32]
    return {
        "syscall": row.syscall_name,
        "syscall_number": row.syscall_number,
        "pid": row.pid,
        "comm": row.labels.get("comm", ""),
        "call_count": row.call_count,
        "error_count": row.error_count,
        "total_duration_ns": row.total_duration_ns,
        "max_duration_ns": row.max_duration_ns,
        **{f"latency_e{6 + slot}": count for slot, count in enumerate(counts)},
        **{f"errors_{name}": count for name, count in row.errors_by_class.items()},
    }


def of_requests(row: pb.HttpLatencyHistogram) -> Row:
    complete = row.count - sum(row.outcomes.values())
    return {
        "role": word(pb.HttpRole, row.role),
        "method": row.labels.get("method", ""),
        "route": row.route,
        "status": row.status,
        "version": row.version,
        "tls": row.tls,
        "count": row.count,
        "errors": row.errors,
        "request_body_bytes": row.request_body_bytes,
        "response_body_bytes": row.response_body_bytes,
        **{
            f"{name}_ns": round(getattr(row, name) * 1e6)
            for name in ("min", "first_byte_min", "max")
        },
        **bounded("duration", row.counts, BOUNDS_NS),
        **bounded("first_byte", row.first_byte_counts, BOUNDS_NS),
        "outcomes_complete": complete,
        **{f"outcomes_{name}": count for name, count in row.outcomes.items()},
    }


def of_connections(row: pb.TcpMetrics) -> Row:
    ended = row.end != pb.TCP_END_OPEN and row.role != pb.TCP_ROLE_LISTENER
    same = (
        "connection_id", "local_address", "local_port", "remote_address", "remote_port", "pid",
        "comm", "network_namespace", "start_ns", "duration_ns", "connect_ns", "error",
        "reset_reason", "preexisting", "rtt_us", "rtt_variation_us", "rtt_min_us", "connections",
        "congestion_window", "slow_start_threshold", "segment_bytes", "opened", "established",
        "was_established", "backlog", "backlog_limit",
    )  # fmt: skip
    return {
        **{name: getattr(row, name) for name in same},
        "role": word(pb.TcpRole, row.role),
        "state": word(pb.TcpState, row.state),
        "end": word(pb.TcpEnd, row.end),
        "closed": int(ended),
        "failed": int(ended and not row.was_established),
        "rtt_us_delta_sum": row.rtt_us_delta.sum,
        **{name: getattr(row.delta, name) for name in NAMES},
        **bounded("rtt_us", row.rtt_us_delta.counts, BOUNDS_US),
    }


# Errors without a good name.
FAILURES: Final = {"": "failures_none", "4000": "failures_other"}


def of_peers(row: pb.TcpPeerMetrics) -> Row:
    names = ("opened", "closed", "failed", "open", "established")
    return {
        "remote_address": row.remote_address,
        "port": row.port,
        "role": word(pb.TcpRole, row.role),
        **{f"connections_{name}": getattr(row, f"connections_{name}") for name in names},
        "rtt_us_delta_sum": row.rtt_us_delta.sum,
        "connect_us_delta_sum": row.connect_us_delta.sum,
        **{name: getattr(row.delta, name) for name in NAMES},
        **bounded("rtt_us", row.rtt_us_delta.counts, BOUNDS_US),
        **bounded("connect_us", row.connect_us_delta.counts, BOUNDS_US),
        **{f"ends_{name}": count for name, count in row.ends.items()},
        **{FAILURES.get(name, f"failures_{name.lower()}"): n for name, n in row.failures.items()},
    }


EVERY_SUMMARY: Final[Sequence[tuple[str, Make, Callable[[Any], Row]]]] = (
    ("syscall_stats", syscalls, of_syscalls),
    ("http_latency", requests, of_requests),
    ("tcp_metrics", connections, of_connections),
    ("tcp_peers", peers, of_peers),
)


@pytest.mark.parametrize(("table", "make", "told"), EVERY_SUMMARY)
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 5)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@settings(max_examples=20)
def test_a_table_says_what_the_row_messages_say(
    table: str, make: Make, told: Callable[[Any], Row], sizes: list[tuple[int, int, int]]
) -> None:
    gathered, wanted = intake(), list[Row]()
    for number, (seed, count, top) in enumerate(sizes):
        made = make(seed, count, top)
        # Other strings, and other widths of matrices, in each batch.
        end_ns = NOW_NS - number * INTERVAL_NS
        gathered.add(delivery_of(made, end_ns, agent=f"node-{number}"))
        common = {"agent": f"node-{number}", "time_ns": end_ns, "interval_ns": INTERVAL_NS}
        wanted += [{**told(row), **common} for row in made.as_messages()]
    assert gathered.rows == len(wanted)
    taken = gathered.take()
    assert gathered.take() == {}
    if not wanted:
        assert taken == {}
        return
    rows = taken[table].to_pylist()
    always = schema_of(table).names
    assert taken[table].column_names[: len(always)] == always
    assert len(rows) == len(wanted)
    for row, expected in zip(rows, wanted, strict=True):
        for name, value in expected.items():
            assert row[name] == value, name
        for name in row.keys() - expected.keys():
            if row[name] and name in TABLES[table].figures:
                assert name in ("sum_ns", "first_byte_sum_ns", "first_byte_max_ns"), name


def test_the_contracts_rows_are_the_tables() -> None:
    assert set(TABLES) == {
        "syscall_stats", "syscall_calls", "tcp_metrics", "tcp_peers", "tcp_state_changes",
        "http_latency", "http_requests", "cpu_profile",
    }  # fmt: skip
    assert TABLES["syscall_stats"].keys == ("syscall", "syscall_number", "comm")
    assert TABLES["http_latency"].keys == ("role", "method", "route", "status", "version", "tls")
    assert TABLES["tcp_peers"].keys == ("remote_address", "port", "role")
    assert TABLES["cpu_profile"].keys == ("stack_id", "process", "end", "unwinding", "in_kernel")
    figures = {name: role.name for name, role in TABLES["http_latency"].figures.items()}
    assert {name: role for name, role in figures.items() if role != "SUM"} == {
        "min_ns": "LEAST", "max_ns": "MOST", "first_byte_min_ns": "LEAST",
        "first_byte_max_ns": "MOST",
    }  # fmt: skip
    for table in TABLES.values():
        assert len(set(table.schema.names)) == len(table.schema.names), table.name
        assert set(table.sort_by) <= set(table.schema.names)


def changed(make: Summaries | EventRows, change: Callable[[pb.EbpfEventBatch], object]) -> Batch:
    """A batch as an agent would send it that does one thing in another way."""
    message = message_of(wire_of(make))
    change(message)
    return Batch.parse(message.SerializeToString())


def test_a_histogram_from_another_exponent_up_gets_columns_of_its_own() -> None:
    made = syscalls(3, 5, 0)

    def finer(message: pb.EbpfEventBatch) -> None:
        message.syscall_stats_columns.latency_first_exponent[0] = 4

    gathered = intake()
    gathered.add(delivery_of(made))
    assert "latency_e4" not in gathered.take()["syscall_stats"].column_names
    gathered.add(delivery_of(made))
    gathered.add(delivered(changed(made, finer)))
    table = gathered.take()["syscall_stats"]
    always = schema_of("syscall_stats").names
    assert table.column_names == [*always, "latency_e4", "latency_e5"]
    ours, theirs = table.slice(0, 5).to_pylist(), table.slice(5).to_pylist()
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine["latency_e4"], mine["latency_e5"]) == (0, 0)
        assert [other[f"latency_e{e}"] for e in range(4, 36)] == [
            mine[f"latency_e{e}"] for e in range(6, 38)
        ]
    # What a table has come to have, it keeps.
    gathered.add(delivery_of(made))
    assert gathered.take()["syscall_stats"].column_names == table.column_names


def failing(*names: str) -> Batch:
    """A batch of one peer, with one failure by each name."""

    def change(message: pb.EbpfEventBatch) -> None:
        columns = message.tcp_peers_columns
        first = len(message.strings)
        message.strings.extend(names)
        columns.failure_names[:] = range(first, first + len(names))
        columns.failures[:] = [1] * len(names)

    return changed(peers(1, 1, 0), change)


def test_names_that_came_later_are_columns_and_others_count_together() -> None:
    gathered = intake()
    gathered.add(delivered(failing("ETIMEDOUT", "", "ENETDOWN", "errno 4000", "x" * 60)))
    (row,) = gathered.take()["tcp_peers"].to_pylist()
    found = {name: n for name, n in row.items() if name.startswith("failures_") and n}
    assert found == {
        "failures_etimedout": 1, "failures_none": 1, "failures_enetdown": 1, "failures_other": 2,
    }  # fmt: skip


def test_nobody_can_make_a_table_wide_without_end() -> None:
    gathered = intake()
    for first in range(0, 1000, 50):
        gathered.add(delivered(failing(*(f"e{n}" for n in range(first, first + 50)))))
    table = gathered.take()["tcp_peers"]
    names = [name for name in table.column_names if name.startswith("failures_")]
    assert 100 <= len(names) <= MOST_COLUMNS
    assert sum(sum(table[name].to_pylist()) for name in names) == 1000

    def bounded_from(first: int) -> Batch:
        return changed(peers(1, 3, 0), replacing("rtt_us_bounds", *range(first, first + 15)))

    for first in range(2000, 2000 + 7 * 15, 15):
        gathered.add(delivered(bounded_from(first)))
    with pytest.raises(ContractError, match="rtt_us_bounds: 15 new columns for rtt_us_delta"):
        gathered.add(delivered(bounded_from(3000)))


def test_what_is_said_of_pods_is_in_the_row() -> None:
    of_session = {"k8s.namespace.name": "shop", "service.name": "front"}
    of_batch = {
        "k8s.pod.name": "front-7", "k8s.container.name": "web", "k8s.workload.kind": "deployment",
        "k8s.workload.name": "front",
    }  # fmt: skip
    gathered = intake()
    made = syscalls(1, 2, 0)
    session = session_of(pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, attributes=of_session)
    gathered.add(delivery_of(made, attributes=of_batch, session=session))
    gathered.add(delivery_of(made, agent="node-2"))
    pod, bare = gathered.take()["syscall_stats"].to_pylist()[::2]
    names = ("agent", "session", "service", "namespace", "workload", "pod", "container")
    assert [pod[name] for name in names] == [
        "node-1", "node-1-syscall_stats", "front", "shop", "deployment/front", "front-7", "web",
    ]  # fmt: skip
    assert [bare[name] for name in names] == [
        "node-2", "node-2-syscall_stats", "shop", "", "", "", "",
    ]  # fmt: skip


def of_containers(message: pb.EbpfEventBatch) -> None:
    """A batch of a session that watches two containers."""
    message.attributes["k8s.namespace.name"] = "shop"
    message.attributes["service.name"] = "front"
    for name in ("web", "proxy"):
        message.resources.add(attributes={"k8s.container.name": name, "service.name": name})


def test_each_row_is_of_its_container() -> None:
    def change(message: pb.EbpfEventBatch) -> None:
        of_containers(message)
        columns_of(message).resource[:] = [2, 0, 1]

    gathered = intake()
    gathered.add(delivered(changed(syscalls(1, 3, 0), change)))
    gathered.add(delivery_of(syscalls(2, 2, 0), agent="node-2"))
    records = records_of("syscall_calls", 2)
    records["ended_ns"], records["syscall"], records["comm"] = NOW_NS, 0, 0
    gathered.add(delivered(changed(EventRows(pb.SyscallCall, records, ("",)), of_containers)))
    taken = gathered.take()
    rows = taken["syscall_stats"].to_pylist()
    assert [row["container"] for row in rows] == ["proxy", "", "web", "", ""]
    assert [row["service"] for row in rows] == ["proxy", "front", "web", "shop", "shop"]
    assert [row["namespace"] for row in rows] == ["shop", "shop", "shop", "", ""]
    rolled = Rollup(MINUTE)
    rolled.add("syscall_stats", taken["syscall_stats"])
    found = rolled.take(2**62)["syscall_stats_1m"].to_pylist()
    assert {row["container"] for row in found} == {"proxy", "", "web"}
    # Rows of single events need not say it.
    assert [row["service"] for row in taken["syscall_calls"].to_pylist()] == ["front", "front"]


def test_a_container_without_a_name_that_others_share_has_none() -> None:
    shared = {"k8s.namespace.name": "shop", "k8s.workload.name": "web"}

    def change(message: pb.EbpfEventBatch) -> None:
        message.attributes.update(shared)
        message.resources.add(attributes={"k8s.pod.name": "bare", "k8s.workload.name": ""})
        columns_of(message).resource[:] = [1, 0]

    gathered = intake()
    session = session_of(pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, attributes=shared)
    gathered.add(delivered(changed(syscalls(1, 2, 0), change), session))
    rows = gathered.take()["syscall_stats"].to_pylist()
    assert [(row["pod"], row["workload"]) for row in rows] == [("bare", ""), ("", "web")]


def test_single_events_are_of_their_containers() -> None:
    layout = row_layout(pb.EbpfEventBatch.DESCRIPTOR, "syscall_calls", of_pods=True)
    records = np.zeros(3, layout.dtype)
    records["ended_ns"], records["resource"] = NOW_NS, [1, 2, 0]
    batch = changed(EventRows(pb.SyscallCall, records, ("read",)), of_containers)
    gathered = intake()
    gathered.add(delivered(batch))
    gathered.add(delivered(batch, agent="node-2"))
    rows = gathered.take()["syscall_calls"].to_pylist()
    assert [row["container"] for row in rows] == ["web", "proxy", ""] * 2
    assert [row["agent"] for row in rows] == ["node-1"] * 3 + ["node-2"] * 3


def test_counts_beyond_sqls_are_its_greatest() -> None:
    def change(message: pb.EbpfEventBatch) -> None:
        message.syscall_stats_columns.call_count[0] = 2**64 - 1
        message.syscall_stats_columns.latency_ns[0] = 2**63

    gathered = intake()
    gathered.add(delivered(changed(syscalls(1, 2, 0), change)))
    row = gathered.take()["syscall_stats"].to_pylist()[0]
    assert (row["call_count"], row["latency_e6"]) == (2**63 - 1, 2**63 - 1)


# Single events.


def records_of(field: str, count: int) -> Any:
    """Rows of single events, of which every value is another."""
    layout = row_layout(pb.EbpfEventBatch.DESCRIPTOR, field)
    made = np.zeros(count, layout.dtype)
    for number, name in enumerate(layout.dtype.names or ()):
        made[name] = np.arange(count) * 50 + number + 1
    return made


def test_single_calls_are_rows_at_their_own_time() -> None:
    records = records_of("syscall_calls", 3)
    records["ended_ns"] = NOW_NS - np.arange(3) * SECOND_NS
    records["syscall"], records["comm"] = [1, 2, 1], 3
    records["return_value"] = [-2, 0, 7]
    rows = EventRows(pb.SyscallCall, records, ("", "read", "write", "shop"), 5)
    gathered = intake()
    gathered.add(delivery_of(rows))
    table = gathered.take()["syscall_calls"]
    assert table.column_names == schema_of("syscall_calls").names
    found = table.to_pylist()
    assert [row["time_ns"] for row in found] == [NOW_NS, NOW_NS - SECOND_NS, NOW_NS - 2 * SECOND_NS]
    assert [row["syscall"] for row in found] == ["read", "write", "read"]
    assert [row["return_value"] for row in found] == [-2, 0, 7]
    assert {(row["comm"], row["sample_every"], row["agent"]) for row in found} == {
        ("shop", 5, "node-1")
    }
    assert [row["duration_ns"] for row in found] == records["duration_ns"].tolist()


def test_single_events_have_addresses_words_and_names_of_errors() -> None:
    records = records_of("tcp_state_changes", 2)
    records["time_ns"] = NOW_NS
    records["local_high"], records["local_low"] = 0, 0xFFFF_0A00_0001
    records["remote_high"], records["remote_low"] = [0xFE80 << 48, 0x2001 << 48], [1, 2]
    records["scope_id"] = 3
    records["role"], records["what"] = pb.TCP_ROLE_CLIENT, pb.TcpStateChange.WHAT_RESET_SENT
    records["old_state"], records["new_state"] = [1, 99], [pb.TCP_STATE_CLOSE, 70_000]
    records["end"], records["error"] = pb.TCP_END_RESET_LOCAL, [104, 0]
    records["comm"] = records["reason"] = 0
    records["connection_id"] = [2**64 - 1, 1]
    gathered = intake()
    gathered.add(delivery_of(EventRows(pb.TcpStateChange, records, ("shop",))))
    one, other = gathered.take()["tcp_state_changes"].to_pylist()
    assert (one["local_address"], one["remote_address"]) == ("10.0.0.1", "fe80::1%3")
    assert other["remote_address"] == "2001::2"
    assert (one["role"], one["what"], one["end"]) == ("client", "reset_sent", "reset_local")
    assert (one["old_state"], one["new_state"]) == ("established", "close")
    assert (other["old_state"], other["new_state"]) == ("99", "70000")
    assert (one["error"], other["error"]) == ("ECONNRESET", "")
    assert (one["connection_id"], one["comm"]) == (2**64 - 1, "shop")


def test_single_requests_are_rows() -> None:
    records = records_of("http_requests", 2)
    records["time_ns"] = NOW_NS
    for name in ("comm", "path", "route", "query", "host", "trace_id", "parent_span_id"):
        records[name] = 1
    records["role"], records["method"] = pb.HTTP_ROLE_SERVER, [pb.HTTP_METHOD_GET, 10]
    records["outcome"], records["tls"] = pb.HTTP_OUTCOME_ABORTED_BY_CLIENT, [0, 1]
    gathered = intake()
    gathered.add(delivery_of(EventRows(pb.HttpRequest, records, ("", "/users/7"))))
    one, other = gathered.take()["http_requests"].to_pylist()
    assert (one["role"], one["method"], other["method"]) == ("server", "GET", "_OTHER")
    assert (one["outcome"], one["path"], one["tls"]) == ("aborted_by_client", "/users/7", False)
    assert other["tls"] is True


# Stacks.

WORK: Final = Stack(["main", "work"], 3)
IDLE: Final = Stack(["main", "idle", "wait"], 2, tid=79)


def profiled(*stacks: Stack, **head: Any) -> Any:
    return delivered(batch_of(*stacks, **head))


def test_equal_stacks_have_one_id_in_every_batch_and_forever() -> None:
    gathered = intake(NOW_NS + SECOND_NS)
    gathered.add(profiled(WORK, IDLE, lost=4, truncated=1))
    gathered.add(profiled(IDLE, Stack(["start", "main"]), WORK, Stack([])))
    taken = gathered.take()
    rows = taken["cpu_profile"].to_pylist()
    of_row = [row["stack_id"] for row in rows]
    work, idle, idle_again, _, work_again, empty = of_row
    assert (work, idle) == (work_again, idle_again)
    assert len(set(of_row)) == 4
    # Another version of this program must find the same ids in what an earlier one stored.
    assert (work, idle, empty) == (WORK_ID, IDLE_ID, EMPTY_ID)
    frames = {row["stack_id"]: row for row in taken[STACKS].to_pylist()}
    assert frames.keys() == set(of_row)
    assert frames[idle]["functions"] == ["main", "idle", "wait"]
    assert frames[idle]["modules"] == ["/usr/bin/shop"] * 3
    assert frames[work]["addresses"] == [0x1000 + len("main"), 0x1000 + len("work")]
    assert frames[empty]["functions"] == []
    assert [row["count"] for row in rows] == [3, 2, 2, 1, 3, 1]
    assert [row["cpu_ns"] for row in rows[:2]] == [3 * 10_101_010, 2 * 10_101_010]
    # What is of a whole batch is in one of its rows, so that it adds up.
    assert [row["samples_lost"] for row in rows] == [4, 0, 0, 0, 0, 0]
    assert sum(row["samples_truncated"] for row in rows) == 1
    assert {row["end"] for row in rows} == {"bottom"}
    assert rows[0]["in_kernel"] is False


WORK_ID: Final = 832412150122868591
IDLE_ID: Final = 16470841029876992948
EMPTY_ID: Final = 16294208416658607535


def ids_of(*frames: Frame | str) -> int:
    gathered = intake(NOW_NS + SECOND_NS)
    gathered.add(profiled(Stack(frames)))
    (row,) = gathered.take()["cpu_profile"].to_pylist()
    found: int = row["stack_id"]
    return found


def test_a_stacks_id_is_of_its_functions_and_of_addresses_without_one() -> None:
    one = Frame("work", "shop", 10, "aa", 0)
    same = Frame("work", "shop", 99, "aa", 0)
    others = [
        Frame("work", "shop", 10, "bb", 0), Frame("work", "lib", 10, "aa", 0),
        Frame("play", "shop", 10, "aa", 0), Frame("work", "shop", 10, "aa", 1),
        Frame("shop", "work", 10, "aa", 0),
    ]  # fmt: skip
    assert ids_of(one) == ids_of(same)
    assert len({ids_of(it) for it in (one, *others)}) == 6
    assert ids_of(Frame("", "shop", 10)) != ids_of(Frame("", "shop", 11))
    assert len({ids_of("a", "b"), ids_of("b", "a"), ids_of("a"), ids_of("a", "b", "b")}) == 4


def stacks_taken(gathered: Intake, *stacks: Stack, day: int = 0) -> set[int]:
    """Whose frames come with a batch of these stacks."""
    gathered.add(profiled(*stacks, start_s=day * 86_400, end_s=day * 86_400 + 1))
    taken = gathered.take()
    return set(taken[STACKS]["stack_id"].to_pylist()) if STACKS in taken else set()


def test_frames_come_until_they_are_stored_and_again_the_next_day() -> None:
    gathered = intake(NOW_NS + SECOND_NS)
    first = stacks_taken(gathered, WORK)
    assert stacks_taken(gathered, WORK) == first  # nobody has confirmed it
    gathered.add(profiled(WORK))
    gathered.confirm(gathered.take())
    assert stacks_taken(gathered, WORK) == set()
    assert len(stacks_taken(gathered, WORK, IDLE)) == 1
    assert stacks_taken(gathered, WORK, day=1) == first


def test_the_memory_of_stacks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks_room, "_MOST_KNOWN", 3)
    gathered = intake(NOW_NS + SECOND_NS)
    for number in range(10):
        gathered.add(profiled(Stack(["main", f"f{number}"])))
        gathered.confirm(gathered.take())
        assert len(gathered._known) <= 3


def test_the_worst_names_of_functions_come_through() -> None:
    gathered = intake(NOW_NS + SECOND_NS)
    gathered.add(profiled(Stack(HOSTILE)))
    (row,) = gathered.take()[STACKS].to_pylist()
    assert row["functions"] == list(HOSTILE)


# What is refused.


def columns_of(message: pb.EbpfEventBatch) -> Any:
    ((_, columns),) = [it for it in message.ListFields() if it[0].name.endswith("_columns")]
    return columns


def setting(name: str, *values: int) -> Callable[[pb.EbpfEventBatch], None]:
    """Sets the first values of a column."""

    def change(message: pb.EbpfEventBatch) -> None:
        column = getattr(columns_of(message), name)
        column[: len(values)] = values

    return change


def replacing(name: str, *values: int) -> Callable[[pb.EbpfEventBatch], None]:
    """Sets all of a column."""

    def change(message: pb.EbpfEventBatch) -> None:
        getattr(columns_of(message), name)[:] = values

    return change


def at(name: str, time_ns: int) -> Callable[[pb.EbpfEventBatch], None]:
    return lambda message: setattr(message, name, time_ns)


def stack_batch() -> pb.EbpfEventBatch:
    batch = batch_of(WORK, IDLE)
    message = pb.EbpfEventBatch()
    message.CopyFrom(batch.message)
    for name, values in batch.columns.items():
        getattr(message.cpu_profile_columns, name).extend(values.tolist())
    return message


def wrong() -> Iterator[tuple[str, Callable[[], pb.EbpfEventBatch], Any, str]]:
    """Batches that agents do not send: how each is made, changed, and refused."""

    def of(make: Make) -> Callable[[], pb.EbpfEventBatch]:
        return lambda: message_of(wire_of(make(1, 3, 0)))

    calls, http, tcp, by_peer = map(of, (syscalls, requests, connections, peers))
    yield "string", calls, setting("syscall", 10**9), "syscall: index 1000000000, and there are"
    yield "class", calls, setting("error_classes", 4_000_000), "error_classes: index 4000000"
    yield "route", http, setting("route", 77), "route: index 77"
    yield "exponent", calls, replacing("latency_first_exponent", 60), "latency_first_exponent: a"
    yield "exponents", calls, replacing("latency_first_exponent", 1, 2), "latency_first_exponent"
    yield "bounds", http, replacing("bounds_ns", 1, 2), "bounds_ns: 2 bounds for 20 counts"
    yield "order", tcp, setting("rtt_us_bounds", 50, 20), "rtt_us_bounds: the bounds do not ascend"
    yield (
        "width", by_peer, replacing("rtt_us_delta", *[1] * 3 * 200), "rtt_us_bounds: 15 bounds for",
    )  # fmt: skip
    yield "names", by_peer, replacing("failures", *[1] * 3 * 9), "failure_names: "
    yield "wide", by_peer, replacing("ends", *[1] * 3 * 500), "ends: 500 columns"
    yield "counters", tcp, replacing("delta", *[1] * 3 * 500), "TcpCounters: 500 counters"
    yield "resource", calls, replacing("resource", 0, 1, 0), "resource: index 1, and there are 1 r"
    yield "odd", tcp, replacing("delta", *[1] * 46), "column delta has 46 values for 3 rows"
    far = NOW_NS + 400 * DAY_NS
    yield "future", calls, at("interval_end_ns", far), "interval_end_ns: 2024-12-18 .* clock"
    yield "past", calls, at("interval_end_ns", 1), "interval_end_ns: 1970-01-01"
    yield "start", calls, at("interval_start_ns", -(2**63)), "interval_start_ns: 1677-09-21"
    yield "swapped", calls, at("interval_start_ns", NOW_NS + 1), "interval_start_ns: .* ends at"
    yield "stack", stack_batch, setting("stack", 2), "stack: index 2, and there are 2 stacks"
    yield "frame", stack_batch, setting("stack_frames", 9), "stack_frames: index 9, and there are 4"
    yield "length", stack_batch, setting("stack_length", 3), "stack_length: 6 frames, and stack_fr"
    yield "deep", stack_batch, setting("stack_length", 2**32 - 1), "a stack of 4294967295 frames"
    yield "table", stack_batch, replacing("frame_flags", 0), "frame_flags: 1 values for 4 frames"
    yield "build", stack_batch, setting("frame_build_id", 88), "frame_build_id: index 88"
    yield "periods", stack_batch, replacing("period_ns", 1, 2), "period_ns: 2 values for a batch"


@pytest.mark.parametrize(
    ("make", "change", "message"), [it[1:] for it in wrong()], ids=[it[0] for it in wrong()]
)
def test_a_batch_that_is_wrong_is_refused_whole_and_its_field_named(
    make: Callable[[], pb.EbpfEventBatch],
    change: Callable[[pb.EbpfEventBatch], object],
    message: str,
) -> None:
    gathered = intake(NOW_NS + SECOND_NS)
    sent = make()
    good = delivered(Batch.parse(sent.SerializeToString()))
    change(sent)
    with pytest.raises(ContractError, match=message):
        gathered.add(delivered(Batch.parse(sent.SerializeToString())))
    assert gathered.rows == 0
    assert gathered.take() == {}
    gathered.add(good)
    (table,) = (it for name, it in gathered.take().items() if name != STACKS)
    assert table.column_names == schema_of(good.batch.rows).names  # type: ignore[union-attr]


numbers = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 2, 3, 15, 63, 64, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]),
)
mistakes = st.lists(
    st.tuples(
        st.integers(0, 100),  # which column
        st.sampled_from(["set", "fill", "cut", "double", "clear"]),
        st.integers(0, 2000),  # which of its values
        numbers,
    ),
    min_size=1,
    max_size=4,
)


def mistaken(columns: Any, column: int, what: str, place: int, number: int) -> None:
    """One thing that is wrong with columns."""
    fields = [it for it in columns.DESCRIPTOR.fields if len(getattr(columns, it.name))]
    if not fields:
        return
    field = fields[column % len(fields)]
    values = getattr(columns, field.name)
    is_long = field.type == field.TYPE_FIXED64
    value = number if is_long else number % 2 ** (63 if field.type == field.TYPE_SFIXED64 else 32)
    if what == "set":
        values[place % len(values)] = value
    elif what == "fill":
        values[:] = [value] * len(values)
    elif what == "cut":
        del values[place % len(values) :]
    elif what == "double":
        values.extend(list(values))
    else:
        del values[:]


@pytest.mark.parametrize("table", [*(it[0] for it in EVERY_SUMMARY), "cpu_profile"])
@given(seed=st.integers(0, 2**31), wrong=mistakes)
@settings(max_examples=40)
def test_whatever_an_agent_sends_is_refused_or_becomes_rows(
    table: str, seed: int, wrong: list[tuple[int, str, int, int]]
) -> None:
    makes = {name: make for name, make, _ in EVERY_SUMMARY}
    sent = message_of(wire_of(makes[table](seed, 5, 0))) if table in makes else stack_batch()
    for mistake in wrong:
        mistaken(columns_of(sent), *mistake)
    gathered = intake(NOW_NS + SECOND_NS)
    try:
        gathered.add(delivered(Batch.parse(sent.SerializeToString())))
    except ContractError:
        assert gathered.take() == {}
        return
    taken = gathered.take()
    assert taken[table].num_rows == sent.count
    rolled = Rollup(MINUTE)
    rolled.add(table, taken[table])
    (found,) = rolled.take(2**62).values()
    assert sum(found["row_count"].to_pylist()) == taken[table].num_rows
    for column in (*taken[table].columns, *found.columns):
        assert column.null_count == 0
        if column.type == pa.int64():
            assert min(column.to_pylist()) >= 0


def test_events_from_nowhere_in_time_are_refused() -> None:
    records = records_of("syscall_calls", 2)
    records["syscall"] = records["comm"] = 0
    records["ended_ns"] = [NOW_NS, NOW_NS + 2 * DAY_NS]
    gathered = intake()
    with pytest.raises(ContractError, match=r"ended_ns: 2023-11-16 .*, and here it is 2023-11-14"):
        gathered.add(delivery_of(EventRows(pb.SyscallCall, records, ("read",))))


def test_what_is_no_number_is_refused() -> None:
    check_numbers("load", np.array([0.0, 1e300]))
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(ContractError, match="load: a value that is no number"):
            check_numbers("load", np.array([1.0, value]))


def test_rows_as_messages_are_refused() -> None:
    message = pb.EbpfEventBatch(
        kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, count=1, first_seq=1, last_seq=1,
        syscall_stats=[pb.SyscallStats(syscall_name="read")], interval_end_ns=NOW_NS,
    )  # fmt: skip
    with pytest.raises(ContractError, match="syscall_stats: rows came as messages"):
        intake().add(delivered(Batch.parse(message.SerializeToString())))


def test_few_bytes_do_not_become_many_rows() -> None:
    columns = pb.TcpMetricsColumns(pid=[1] * 100_000)
    message = pb.EbpfEventBatch(
        kind=pb.EBPF_COLLECTOR_KIND_TCP_METRICS, count=100_000, first_seq=1, last_seq=100_000,
        tcp_metrics_columns=columns, interval_end_ns=NOW_NS,
    )  # fmt: skip
    with pytest.raises(ContractError, match="count: 100000 rows in 400000 bytes of columns"):
        intake().add(delivered(Batch.parse(message.SerializeToString())))


def test_rows_of_another_kind_than_the_sessions_are_refused() -> None:
    other = session_of(pb.EBPF_COLLECTOR_KIND_TCP_METRICS)
    with pytest.raises(ContractError, match="rows: syscall_stats in a session of tcp_metrics"):
        intake().add(delivery_of(syscalls(1, 2, 0), session=other))


def test_a_delivery_without_rows_is_none() -> None:
    gathered = intake()
    empty = pb.EbpfEventBatch(kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, first_seq=1)
    gathered.add(delivered(Batch.parse(empty.SerializeToString())))
    assert gathered.take() == {}


def test_long_texts_are_cut() -> None:
    texts = Texts()
    number = texts.id("x" * 10_000)
    assert texts[number] == "x" * MOST_CHARACTERS
    assert texts.id("x" * 10_000) == texts.id("x" * MOST_CHARACTERS) == number
    assert len(texts) == 2


def test_the_store_learns_the_tables_here() -> None:
    rows = ContractRows()
    assert rows.rolled_up() == (
        "syscall_stats", "tcp_metrics", "tcp_peers", "http_latency", "cpu_profile",
    )  # fmt: skip
    for table in (
        STACKS,
        *TABLES,
        *(level.name(it) for level in LEVELS for it in rows.rolled_up()),
    ):
        schema = rows.schema(table)
        assert schema is not None
        assert set(rows.order(table)) <= set(schema.names), table
        assert "time_ns" in rows.order(table)
    assert rows.schema("ledger") is None
    assert rows.order("cpu_profile_1h") == (
        "service", "stack_id", "process", "end", "unwinding", "in_kernel", "agent", "time_ns",
    )  # fmt: skip
    assert [rows.rollup(it.width_ns).level for it in LEVELS] == [MINUTE, HOUR]


def test_a_kind_without_words_has_a_table_by_the_rules() -> None:
    field = rows_fields()["tcp_peers_columns"]
    plain = tables_layout._layout(field, "a kind of tomorrow", "")
    assert plain.keys == ("remote_address", "port", "role")
    assert plain.figures["connections_opened"].name == "SUM"
    assert set(plain.matrices) == {"delta", "rtt_us_delta", "connect_us_delta", "ends", "failures"}
    assert plain.matrices["ends"].names(3, np.zeros(0), ()) == ("ends_0", "ends_1", "ends_2")
