"""Rows as plain as can be, and deliveries of them, for tests of the colony's store: every row has
the number of its event, so that a test can count them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coral.client import Batch, Kind
from coral.colony.delivery import Delivery, Ended, Session
from coral.colony.store import HOUR_NS, MINUTE_NS
from coral.mesh.v1 import ebpf_pb2 as pb

SECOND_NS = 10**9
# A minute's beginning, and an hour's.
BEGIN_NS = 1_800_000_000 * SECOND_NS // HOUR_NS * HOUR_NS
TABLE = "numbers"
SCHEMA = pa.schema(
    [
        ("time_ns", pa.int64()),
        ("agent", pa.string()),
        ("session", pa.string()),
        ("service", pa.string()),
        ("number", pa.uint64()),
        ("calls", pa.uint64()),
    ]
)


class PlainIntake:
    """Rows of batches whose columns have these names."""

    def __init__(self) -> None:
        self._waiting: list[pa.Table] = []
        self.confirmed = 0

    def add(self, delivery: Delivery) -> None:
        if not delivery.batch:
            return
        session, count = delivery.session, delivery.batch.count
        common = {
            "agent": pa.array([session.agent_id]).take(pa.array(np.zeros(count, int))),
            "session": pa.array([session.collector_id]).take(pa.array(np.zeros(count, int))),
            "service": pa.array([session.service]).take(pa.array(np.zeros(count, int))),
        }
        columns = {name: pa.array(it) for name, it in delivery.batch.columns.items()}
        names = [it for it in SCHEMA.names if it in {**common, **columns}]
        more = [it for it in columns if it not in SCHEMA.names]
        self._waiting.append(pa.table({it: {**common, **columns}[it] for it in names + more}))

    def take(self) -> Mapping[str, pa.Table]:
        waiting, self._waiting = self._waiting, []
        return {TABLE: pa.concat_tables(waiting, promote_options="default")} if waiting else {}

    def confirm(self, stored: Mapping[str, pa.Table]) -> None:
        self.confirmed += sum(it.num_rows for it in stored.values())


class PlainRollup:
    """Calls and rows by service and interval."""

    def __init__(self, width_ns: int) -> None:
        self._width_ns = width_ns
        self._suffix = "_1m" if width_ns == MINUTE_NS else "_1h"
        self._sums: dict[tuple[int, str], list[int]] = {}

    def add(self, table: str, rows: pa.Table) -> None:
        if table not in (TABLE, f"{TABLE}_1m"):
            return
        counts = (
            rows["row_count"] if "row_count" in rows.column_names else pa.array([1] * len(rows))
        )
        columns = (rows["time_ns"], rows["service"], rows["calls"], counts)
        for time_ns, service, calls, count in zip(*(it.to_pylist() for it in columns), strict=True):
            sums = self._sums.setdefault((time_ns // self._width_ns, service), [0, 0])
            sums[0] += calls
            sums[1] += count

    def take(self, until_ns: int) -> Mapping[str, pa.Table]:
        done = [it for it in self._sums if it[0] * self._width_ns < until_ns]
        if not done:
            return {}
        sums = [self._sums.pop(it) for it in done]
        rows = pa.table(
            {
                "time_ns": pa.array([slot * self._width_ns for slot, _ in done], pa.int64()),
                "service": [service for _, service in done],
                "calls": pa.array([it[0] for it in sums], pa.uint64()),
                "row_count": pa.array([it[1] for it in sums], pa.uint64()),
            }
        )
        return {f"{TABLE}{self._suffix}": rows}


class PlainRows:
    """The store's `Rows`, of one table."""

    def intake(self) -> PlainIntake:
        return PlainIntake()

    def rollup(self, width_ns: int) -> PlainRollup:
        return PlainRollup(width_ns)

    def order(self, table: str) -> Sequence[str]:
        return {
            TABLE: ["service", "agent", "time_ns"],
            f"{TABLE}_1m": ["service", "time_ns"],
            f"{TABLE}_1h": ["service", "time_ns"],
        }[table]

    def schema(self, table: str) -> pa.Schema | None:
        return SCHEMA if table == TABLE else None

    def rolled_up(self) -> Sequence[str]:
        return [TABLE]


class Sender:
    """One session: its deliveries follow on each other."""

    def __init__(self, agent: str = "a", collector: str = "c", service: str = "shop") -> None:
        self.session = Session(agent, collector, Kind.of("syscall_stats"), service, BEGIN_NS)
        self.last_seq = 0

    def next(
        self,
        rows: int,
        time_ns: int = BEGIN_NS,
        *,
        lost: Mapping[str, int] | None = None,
        lost_in_kernel: Mapping[str, int] | None = None,
        ended: Ended | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> Delivery:
        """ROWS rows of TIME_NS; every one says 2 calls and more random bytes than pack well."""
        after = self.last_seq
        numbers = np.arange(after + 1, after + rows + 1, dtype=np.uint64)
        batch = Batch(
            pb.EbpfEventBatch(kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, count=rows),
            np.empty(0),
            {
                "time_ns": np.full(rows, time_ns, np.int64),
                "number": numbers,
                "calls": np.full(rows, 2, np.uint64),
                **(columns or {}),
            },
            TABLE,
        )
        self.last_seq += rows + sum((lost or {}).values())
        return Delivery(
            self.session,
            batch if rows else None,
            after,
            self.last_seq,
            self.last_seq,
            time_ns,
            rows * 40,
            lost or {},
            lost_in_kernel or {},
            ended,
        )


def noise(rows: int, seed: int) -> Mapping[str, Any]:
    """A column that does not pack: 64 bytes a row."""
    rng = np.random.default_rng(seed)
    return {f"noise_{it}": rng.integers(0, 1 << 63, rows, np.uint64) for it in range(8)}


def minutes(table: pa.Table) -> Mapping[int, int]:
    """The sum of calls by minute, of a table of rows or of minutes."""
    slots = pc.divide(table["time_ns"], MINUTE_NS)
    found = (
        pa.table({"slot": slots, "calls": table["calls"]})
        .group_by("slot")
        .aggregate([("calls", "sum")])
    )
    return {int(it["slot"]): it["calls_sum"] for it in found.to_pylist()}


def each_tick(begin_ns: int, step_ns: int) -> Iterator[int]:
    """BEGIN_NS, and so on by STEP_NS."""
    while True:
        yield begin_ns
        begin_ns += step_ns
