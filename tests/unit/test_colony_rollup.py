"""Rows added up over minutes and hours: the same sums whatever the order and the pieces in which
they come, whether or not the colony was restarted, and the same quantiles as those of the rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coral.client import Batch
from coral.colony.tables import (
    HOUR,
    LEVELS,
    MINUTE,
    TABLES,
    Intake,
    Level,
    Role,
    Rollup,
    base_of,
    counts_of,
    quantiles,
)
from coral.colony.tables import rollup as rollup_room
from coral.colony.tables.layout import PLACE
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.histogram import Buckets, Histogram
from coral.wire.http import BOUNDS_NS
from tests.deliveries import NOW_NS, delivered, delivery_of, message_of, wire_of
from tests.profiles import START_NS, Stack, batch_of
from tests.summaries import Make, connections, peers, requests, syscalls

MAKES: Final[Mapping[str, Make]] = {
    "syscall_stats": syscalls,
    "http_latency": requests,
    "tcp_metrics": connections,
    "tcp_peers": peers,
}
MINUTE_NS: Final = MINUTE.width_ns
HOUR_NS: Final = HOUR.width_ns
ALWAYS: Final = 2**62  # after every window

Group = tuple[Any, ...]
Figures = dict[str, int]


def rows_of(table: str, *deliveries: tuple[int, int, int, int]) -> pa.Table:
    """Raw rows: of each delivery the agent, the seed, the number of rows, and the end of the
    interval after NOW_NS."""
    gathered = Intake(lambda: NOW_NS)
    for agent, seed, count, after_ns in deliveries:
        made = MAKES[table](seed, count, 0)
        gathered.add(delivery_of(made, NOW_NS + after_ns, agent=f"node-{agent}"))
    return gathered.take().get(table)


def added_up(table: str, level: Level, tables: Iterable[pa.Table]) -> Mapping[Group, Figures]:
    """The same by Python, row by row: raw rows, or those of rollups."""
    layout = TABLES[base_of(table)[0]]
    groups: dict[Group, Figures] = defaultdict(lambda: defaultdict(int))
    for rows in tables:
        for row in rows.to_pylist():
            keys = [row["time_ns"] // level.width_ns * level.width_ns, *(row[it] for it in PLACE)]
            for name in layout.keys:
                other, words = layout.key_where.get(name, ("", ()))
                keys.append(row[name] if not other or row[other] in words else 0)
            figures = groups[tuple(keys)]
            figures["row_count"] += row.get("row_count", 1)
            for name, value in row.items():
                role = layout.figures.get(name)
                later = name.split("_")[0] in ("latency", "failures")
                if role is Role.MOST:
                    figures[name] = max(figures[name], value)
                elif role is Role.LEAST:
                    figures[name] = min(filter(None, (figures[name], value)), default=0)
                elif role is Role.SUM or later:
                    figures[name] += value or 0
    return {group: {k: v for k, v in it.items() if v} for group, it in groups.items()}


deliveries = st.lists(
    st.tuples(
        st.integers(1, 2),
        st.integers(0, 2**32 - 1),
        st.integers(0, 8),
        st.integers(-3, 3).map(lambda n: n * 25 * 10**9 + n),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("table", list(MAKES))
@pytest.mark.parametrize("level", LEVELS, ids=["1m", "1h"])
@given(come=deliveries, pieces=st.integers(1, 3))
@settings(max_examples=15)
def test_a_rollup_has_the_sums_of_the_rows(
    table: str, level: Level, come: list[tuple[int, int, int, int]], pieces: int
) -> None:
    raw = [rows for n in range(pieces) if (rows := rows_of(table, *come[n::pieces]))]
    rolled = Rollup(level)
    for rows in raw:
        rolled.add(table, rows)
    wanted = added_up(table, level, raw)
    assert rolled.groups == len(wanted)
    taken = rolled.take(ALWAYS)
    assert rolled.take(ALWAYS) == {}
    if not wanted:
        assert taken == {}
        return
    (found,) = taken.values()
    assert set(taken) == {level.name(table)}
    schema = TABLES[table].rollup_schema
    assert found.column_names[: len(schema.names)] == schema.names
    assert set(found["interval_ns"].to_pylist()) == {level.width_ns}
    assert found.num_rows == len(wanted)
    assert added_up(table, level, [found]) == wanted


def test_stacks_are_added_up_without_their_threads() -> None:
    gathered = Intake(lambda: NOW_NS)
    work, wait = Stack(["main", "work"], 3), Stack(["main", "wait"], 5)
    other_thread = Stack(["main", "work"], 4, thread="other", tid=99)
    gathered.add(delivered(batch_of(work, wait, other_thread, end_s=1, lost=7)))
    gathered.add(delivered(batch_of(work, end_s=2, lost=1)))
    raw = gathered.take()
    rolled = Rollup(MINUTE)
    for name, rows in raw.items():
        rolled.add(name, rows)
    (table,) = rolled.take(ALWAYS).values()
    by_count = {row["count"]: row for row in table.to_pylist()}
    assert set(by_count) == {10, 5}
    raw_ids = raw["cpu_profile"]["stack_id"].to_pylist()
    assert [by_count[10]["stack_id"], by_count[5]["stack_id"]] == raw_ids[:2]
    assert by_count[10]["cpu_ns"] == 10 * 10_101_010
    assert by_count[10]["row_count"] == 3
    assert sum(row["samples_lost"] for row in by_count.values()) == 8
    assert by_count[10]["time_ns"] == START_NS // MINUTE_NS * MINUTE_NS


def test_connections_are_added_up_by_the_port_that_says_what_they_are() -> None:
    rows = rows_of("tcp_metrics", (1, 1, 12, 0), (1, 2, 12, 0))
    rolled = Rollup(MINUTE)
    rolled.add("tcp_metrics", rows)
    found = rolled.take(ALWAYS)["tcp_metrics_1m"].to_pylist()
    assert {row["role"] for row in found} == {"client", "server", "listener"}
    for row in found:
        if row["role"] == "client":
            assert row["local_port"] == 0
            assert row["remote_port"] in (80, 81)
        else:
            assert row["local_port"] in (80, 81)
            assert row["remote_port"] == 0


# The watermark.


class Store:
    """A store that does what `Rollup` asks of it, in memory. Its process ends now and then."""

    def __init__(self, table: str) -> None:
        self.table = table
        self.raw: list[pa.Table] = []
        self.rolled: dict[Level, list[pa.Table]] = {level: [] for level in LEVELS}
        self.watermark_ns = dict.fromkeys(LEVELS, 0)
        self.restart()

    def restart(self) -> None:
        self.minutes, self.hours = Rollup(MINUTE), Rollup(HOUR)
        for rolled, stored in ((self.minutes, self.raw), (self.hours, self.rolled[MINUTE])):
            since_ns = self.watermark_ns[rolled.level]
            for rows in stored:
                times = rows["time_ns"].to_numpy()
                name = self.table if rolled is self.minutes else MINUTE.name(self.table)
                rolled.add(name, rows.filter(pa.array(times >= since_ns)))

    def commit(self, rows: pa.Table | None, until_ns: int) -> None:
        """One transaction. UNTIL_NS is the time of day."""
        for level in LEVELS:
            whole = until_ns // level.width_ns * level.width_ns
            self.watermark_ns[level] = max(self.watermark_ns[level], whole)
        if rows is not None:
            self.raw.append(rows)
            self.minutes.add(self.table, rows)
        for name, minutes in self.minutes.take(self.watermark_ns[MINUTE]).items():
            self.rolled[MINUTE].append(minutes)
            self.hours.add(name, minutes)
        self.rolled[HOUR] += self.hours.take(self.watermark_ns[HOUR]).values()

    def check(self) -> None:
        """The rollups have all rows of what is over, and nothing of what is not."""
        for level in LEVELS:
            over = added_up(self.table, level, self.raw)
            over = {k: it for k, it in over.items() if k[0] < self.watermark_ns[level]}
            assert added_up(self.table, level, self.rolled[level]) == over


steps = st.lists(
    st.tuples(
        st.booleans(),  # whether the process ends before
        st.integers(0, 40 * 60),  # how many seconds pass
        st.lists(
            st.tuples(
                st.integers(1, 2),
                st.integers(0, 2**32 - 1),
                st.integers(0, 4),
                st.integers(-7200, 5),  # seconds: late, or with a clock that is ahead
            ),
            max_size=3,
        ),
    ),
    max_size=6,
)


@pytest.mark.parametrize("table", ["http_latency", "tcp_peers"])
@given(steps=steps)
@settings(max_examples=25)
def test_rollups_are_exact_at_every_commit_however_late_rows_are(
    table: str, steps: list[tuple[bool, int, list[tuple[int, int, int, int]]]]
) -> None:
    store, now_s = Store(table), 0
    for restarts, passed_s, come in steps:
        if restarts:
            store.restart()
        now_s += passed_s
        at_ns = [(agent, seed, n, (now_s + s) * 10**9) for agent, seed, n, s in come]
        store.commit(rows_of(table, *at_ns) if come else None, NOW_NS + now_s * 10**9 - MINUTE_NS)
        store.check()


def test_late_rows_are_handed_over_at_once_as_further_rows() -> None:
    rolled = Rollup(MINUTE)
    rolled.add("syscall_stats", rows_of("syscall_stats", (1, 1, 5, 0)))
    assert rolled.take(NOW_NS + MINUTE_NS - 1) == {}
    first = rolled.take(NOW_NS + MINUTE_NS)["syscall_stats_1m"]
    rolled.add("syscall_stats", rows_of("syscall_stats", (1, 1, 5, 59 * 10**9)))
    again = rolled.take(NOW_NS + MINUTE_NS)["syscall_stats_1m"]
    names = ("time_ns", "agent", "syscall", "comm", "call_count", "latency_e6")
    key = {name: first[name].to_pylist() for name in names}
    assert {name: again[name].to_pylist() for name in names} == key
    assert rolled.groups == 0


def test_rows_read_back_from_the_database_add_up_the_same() -> None:
    raw = rows_of("tcp_metrics", (1, 5, 9, 0), (2, 6, 9, 0))
    connection = duckdb.connect()
    connection.register("raw", raw)
    connection.execute("create table stored as select * from raw")
    connection.execute("alter table stored add column rtt_us_le_7 bigint")
    connection.execute("alter table stored drop column reset_reason")
    read = connection.sql("select * from stored").to_arrow_table()
    rolled, again = Rollup(MINUTE), Rollup(MINUTE)
    rolled.add("tcp_metrics", raw)
    again.add("tcp_metrics", read)
    (one,), (other,) = rolled.take(ALWAYS).values(), again.take(ALWAYS).values()
    names = [name for name in one.column_names if name not in ("reset_reason", "row_count")]
    sums = [name for name in names if TABLES["tcp_metrics"].figures.get(name) is Role.SUM]
    for name in sums:
        assert sum(one[name].to_pylist()) == sum(other[name].to_pylist()), name
    assert set(other["reset_reason"].to_pylist()) == {""}


def test_columns_that_came_later_are_added_up_too() -> None:
    def finer(message: pb.EbpfEventBatch) -> pb.EbpfEventBatch:
        message.syscall_stats_columns.latency_first_exponent[0] = 4
        return message

    gathered = Intake(lambda: NOW_NS)
    message = finer(message_of(wire_of(syscalls(1, 6, 0))))
    gathered.add(delivered(Batch.parse(message.SerializeToString())))
    raw = gathered.take()["syscall_stats"]
    minutes, hours = Rollup(MINUTE), Rollup(HOUR)
    minutes.add("syscall_stats", raw)
    for name, rows in minutes.take(ALWAYS).items():
        hours.add(name, rows)
    (found,) = hours.take(ALWAYS).values()
    assert sum(found["latency_e4"].to_pylist()) == sum(raw["latency_e4"].to_pylist()) > 0
    assert found.column_names[-2:] == ["latency_e4", "latency_e5"]


def test_texts_that_no_group_has_any_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollup_room, "_MOST_IDLE_TEXTS", 3)
    rolled = Rollup(MINUTE)
    sizes = []
    for minute in range(6):
        rolled.add("http_latency", rows_of("http_latency", (minute, minute, 8, 0)))
        kept = rows_of("http_latency", (1, 3, 8, 5 * MINUTE_NS))
        rolled.add("http_latency", kept)
        rolled.take(NOW_NS + MINUTE_NS)
        sizes.append(len(rolled._texts))
    assert max(sizes) <= sizes[0] + 3
    (left,) = rolled.take(ALWAYS).values()
    assert added_up("http_latency", MINUTE, [left]) == added_up("http_latency", MINUTE, [kept] * 6)


def test_sums_beyond_sqls_are_its_greatest() -> None:
    rows = rows_of("syscall_stats", (1, 1, 3, 0))
    big = pa.array([2**62] * 3)
    rows = rows.set_column(rows.column_names.index("call_count"), "call_count", big)
    rolled = Rollup(HOUR)
    for _ in range(3):
        rolled.add("syscall_stats", rows)
    (found,) = rolled.take(ALWAYS).values()
    assert set(found["call_count"].to_pylist()) == {2**63 - 1}


def test_its_memory_is_known_and_freed() -> None:
    rolled = Rollup(MINUTE)
    before = rolled.size_bytes
    rolled.add("http_latency", rows_of("http_latency", (1, 1, 8, 0)))
    assert rolled.size_bytes > before
    rolled.take(ALWAYS)
    assert (rolled.groups, rolled.size_bytes < 1 << 20) == (0, True)


# Quantiles.

SHARES: Final = (0.0, 0.01, 0.5, 0.9, 0.99, 1.0)


@st.composite
def series(draw: st.DrawFn, slots: int) -> np.ndarray[Any, Any]:
    """The counts of a few histograms, some of them empty."""
    rows = draw(st.integers(1, 4))
    counts = st.lists(st.integers(0, 1000), min_size=slots, max_size=slots)
    return np.array([draw(st.one_of(counts, st.just([0] * slots))) for _ in range(rows)])


@given(counts=series(32), most=st.integers(0, 2**40))
def test_quantiles_of_many_are_those_of_each_by_powers_of_two(counts: Any, most: int) -> None:
    latency = TABLES["syscall_stats"].histograms["latency"]
    found = quantiles(latency, counts, SHARES, most=np.full(len(counts), most))
    for row, of_row in zip(counts, found, strict=True):
        one = Histogram(6, row.astype(np.uint64), most)
        assert [one.quantile_ns(q) for q in SHARES] == of_row.tolist()
    assert quantiles(latency, counts, 0.5, most=np.full(len(counts), most)).tolist() == [
        it[2] for it in found.tolist()
    ]


@given(
    counts=series(len(BOUNDS_NS) + 1),
    ends=st.none() | st.tuples(st.integers(0, 10**9), st.integers(0, 10**11)),
)
def test_quantiles_of_many_are_those_of_each_by_bounds(
    counts: Any, ends: tuple[int, int] | None
) -> None:
    duration = TABLES["http_latency"].histograms["duration"]
    known = {} if ends is None else {"least": ends[0], "most": sum(ends)}
    arrays: Any = {name: np.full(len(counts), value) for name, value in known.items()}
    found = quantiles(duration, counts, SHARES, **arrays)
    for row, of_row in zip(counts, found, strict=True):
        one = Buckets(BOUNDS_NS, row.tolist(), **known)
        assert [one.quantile(q) for q in SHARES] == pytest.approx(of_row.tolist(), rel=1e-12)


def year(seed: int, months: int) -> Sequence[pa.Table]:
    """Raw rows of a year, a few of each month."""
    when = [n * 30 * 86_400 * 10**9 for n in range(-months, 0)]
    return [rows_of("http_latency", (1, seed + n, 8, ns)) for n, ns in enumerate(when)]


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_quantiles_of_a_years_rollup_are_those_of_its_rows(seed: int) -> None:
    """From rows to minutes to hours, then all hours of the year as one histogram."""
    raw = year(seed, 12)
    minutes, hours = Rollup(MINUTE), Rollup(HOUR)
    for rows in raw:
        minutes.add("http_latency", rows)
    for name, rows in minutes.take(ALWAYS).items():
        hours.add(name, rows)
    (rolled,) = hours.take(ALWAYS).values()
    for histogram in TABLES["http_latency"].histograms.values():
        of_rows, names = counts_of(
            histogram, pa.concat_tables(it.unify_dictionaries() for it in raw)
        )
        of_year, names_then = counts_of(histogram, rolled)
        assert names == names_then == histogram.columns
        one, other = (it.sum(axis=0, keepdims=True) for it in (of_rows, of_year))
        assert quantiles(histogram, one, SHARES).tolist() == (
            quantiles(histogram, other, SHARES).tolist()
        )


@given(
    values=st.lists(st.integers(1, 2**36), min_size=1, max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    q=st.floats(0, 1),
)
def test_a_quantile_of_merged_histograms_is_within_the_slot_of_the_true_one(
    values: list[int], cuts: list[int], q: float
) -> None:
    latency = TABLES["syscall_stats"].histograms["latency"]
    pieces = np.split(np.array(values), sorted(min(cut, len(values)) for cut in cuts))
    counts = np.zeros((1, 32), np.int64)
    for piece in pieces:
        slots = np.floor(np.log2(np.maximum(piece, 2**6))).astype(int) - 6
        np.add.at(counts[0], slots, 1)
    (found,) = quantiles(latency, counts, q, most=np.array([max(values)]))
    true = sorted(values)[max(int(np.ceil(q * len(values))) - 1, 0)]
    lower, upper = latency.edges()
    slot = next(n for n, end in enumerate(upper) if true < end)
    assert lower[slot] <= found <= upper[slot]


def test_slots_that_came_later_stand_where_they_belong() -> None:
    latency = TABLES["syscall_stats"].histograms["latency"]
    rows = pa.table(
        {"latency_e6": [3, None], "latency_e4": [1, 1], "latency_e5": [0, 2], "x": [1, 1]}
    )
    counts, names = counts_of(latency, rows)
    assert names == ("latency_e4", "latency_e5", "latency_e6")
    assert counts.tolist() == [[1, 0, 3], [1, 2, 0]]
    assert latency.edges(names) == ((0.0, 32.0, 64.0), (32.0, 64.0, 128.0))
    assert quantiles(latency, counts, 1.0, names=names).tolist() == [128.0, 64.0]
    rtt = TABLES["tcp_peers"].histograms["rtt_us"]
    assert rtt.of(["rtt_us_le_inf", "connect_us_le_20", "rtt_us_le_5", "rtt_us_delta_sum"]) == (
        "rtt_us_le_5", "rtt_us_le_inf",
    )  # fmt: skip


def test_groups_beyond_the_most_of_an_agent_are_added_up_without_what_tells_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rollup_room, "MOST_GROUPS", 50)
    rollup, requests_made = Rollup(MINUTE), 0
    for seed in range(40):  # of each a route of its own, of the second half a service too
        rows = rows_of("http_latency", (0, seed, 20, 0))
        routes = pa.array([f"/{seed}/{row}" for row in range(rows.num_rows)])
        services = pa.array([f"service-{seed // 20 * row}" for row in range(rows.num_rows)])
        rows = rows.set_column(rows.column_names.index("route"), "route", routes)
        rows = rows.set_column(rows.column_names.index("service"), "service", services)
        rollup.add("http_latency", rows)
        requests_made += sum(rows["count"].to_pylist())
    before = rollup.groups
    assert 50 < before <= 2 * 50 + 2
    few = rows_of("http_latency", (1, 1, 3, 0))
    rollup.add("http_latency", few)
    assert rollup.groups == before + few.num_rows
    made = rollup.take(ALWAYS)["http_latency_1m"].to_pylist()
    mine = [it for it in made if it["agent"] == "node-0"]
    assert sum(it["count"] for it in mine) == requests_made
    assert {it["route"] for it in made} > {"", *few["route"].to_pylist()}
