"""What rows cost on their way from the wire into a colony's tables and rollups, beside what the
same takes with an object for each row, or in SQL.

The rows are a collector's own, drained from a program that fills it, and sent by so many agents.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa

from benchmarks import many
from benchmarks.bench import Bench
from benchmarks.report import Aim, Report, Samples, times
from coral.agent.streams import Frame
from coral.client import Batch, Kind
from coral.collectors.contract import Summaries
from coral.colony.delivery import Delivery, Session
from coral.colony.tables import HOUR, MINUTE, TABLES, Intake, Role, Rollup, TableLayout
from coral.colony.tables.layout import PLACE

AGENTS: Final = 1000
ROWS: Final = 200
_ROUNDS: Final = 5
_BY_OBJECTS: Final = 20  # agents
_AIM_NS: Final = 1500.0  # of the 5,000 that a colony has for a row, at 200,000 rows/s on one core
_LATER_NS: Final = 2 * HOUR.width_ns
_PARSE: Final = "parse a batch (the client's)"
_ADD: Final = "`Intake.add`: check it, intern its strings"
_TAKE: Final = "`Intake.take`: one table of all"
_MINUTES: Final = "`Rollup.add`: into open minutes"
_HOURS: Final = "minutes that are over, added to hours"
_STEPS: Final = (_PARSE, _ADD, _TAKE, _MINUTES, _HOURS)
_TOTAL: Final = "coral, in all"
_OBJECTS: Final = "a table from an object a row, without parsing"
_SQL: Final = "minutes by SQL's GROUP BY (DuckDB, one thread)"
_INSTEAD_OF: Final = {_OBJECTS: _TAKE, _SQL: _MINUTES}


@dataclass(frozen=True)
class _Sent:
    """What one agent sends: a batch, and the interval's end."""

    wire: bytes
    end_ns: int


async def measure(bench: Bench) -> Report:
    """The section: every step, of every type of row, _ROUNDS times."""
    samples: dict[tuple[str, str], list[float]] = {}
    for name, workload in many.WORKLOADS.items():
        with workload(bench) as program:
            (drained,) = program.fill()
        sent = as_sent(drained)
        for _ in range(_ROUNDS):
            for step, ns in _round(sent).items():
                samples.setdefault((step, name), []).append(ns)
        bench.say(f"{name}: {_ROUNDS} rounds of {AGENTS * ROWS:,} rows")
    of = {key: Samples(values) for key, values in samples.items()}
    names = list(many.WORKLOADS)
    rows = []
    for step in (*_STEPS, _TOTAL, _OBJECTS, _SQL):
        ours = _INSTEAD_OF.get(step)
        ratios = [
            times(of[step, name].median, of[ours, name].median) if ours else "" for name in names
        ]
        rows.append((step, *(of[step, name].show(0) for name in names), *ratios))
    return Report(
        title="Rows into a colony's tables, in ns a row",
        how=f"Median (middle half) of {_ROUNDS} rounds, CPU time of one thread: {ROWS} rows of "
        f"each of {AGENTS:,} agents, taken as one table.",
        columns=("", *names, *(f"{name}: of ours" for name in names)),
        rows=rows,
        aims=[Aim(f"{it}, {_TOTAL}", of[_TOTAL, it].median, _AIM_NS, " ns a row") for it in names],
        samples={f"{step}, {name}, ns": it.values for (step, name), it in of.items()},
    )


def as_sent(drained: Summaries) -> Sequence[_Sent]:
    """Batches of ROWS rows each, as the agent sends them."""
    end_ns = time.time_ns() // MINUTE.width_ns * MINUTE.width_ns
    header = many.header_of(drained)
    made = []
    for first in range(0, len(drained) - ROWS, ROWS):
        rows = drained.take(np.arange(first, first + ROWS))
        frame = Frame(header, 1, ROWS, end_ns - 10**10, end_ns, rows)
        made.append(_Sent(frame.wire(columns=True), end_ns))
    return made


def _round(sent: Sequence[_Sent]) -> Mapping[str, float]:
    """How long each step takes for a row, in ns."""
    count = AGENTS * ROWS
    took: dict[str, float] = {}
    each = [sent[number % len(sent)] for number in range(AGENTS)]
    batches = _timed(took, _PARSE, count, lambda: [Batch.parse(it.wire) for it in each])
    deliveries = [_delivery(number, batch) for number, batch in enumerate(batches)]
    intake, minutes, hours = Intake(), Rollup(MINUTE), Rollup(HOUR)
    _timed(took, _ADD, count, lambda: [intake.add(it) for it in deliveries])  # type: ignore[func-returns-value]
    tables = _timed(took, _TAKE, count, intake.take)
    (table, rows), *_ = tables.items()
    _timed(took, _MINUTES, count, lambda: minutes.add(table, rows))
    until_ns = each[0].end_ns + _LATER_NS

    def over() -> None:
        for name, added_up in minutes.take(until_ns).items():
            hours.add(name, added_up)

    _timed(took, _HOURS, count, over)
    took[_TOTAL] = sum(took.values())
    few = deliveries[:_BY_OBJECTS]
    _timed(took, _OBJECTS, len(few) * ROWS, lambda: pa.Table.from_pylist(_objects(few)))
    statement = _group_by(TABLES[table])
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("rows", rows)
        _timed(took, _SQL, count, lambda: connection.execute(statement).fetchall())
    return took


def _timed(took: dict[str, float], step: str, count: int, run: Callable[[], Any]) -> Any:
    began_ns = time.process_time_ns()
    result = run()
    took[step] = (time.process_time_ns() - began_ns) / count
    return result


def _delivery(number: int, batch: Batch) -> Delivery:
    kind = Kind(batch.message.kind)
    session = Session(f"node-{number}", f"{kind}-{number}", kind, f"service-{number % 50}", 0)
    end_ns = batch.message.interval_end_ns
    return Delivery(session, batch, 0, batch.last_seq, batch.last_seq, end_ns, 0)


def _objects(deliveries: Sequence[Delivery]) -> list[dict[str, Any]]:
    """The rows as Python's objects; matrices as lists, which is less than the table has."""
    made = []
    for delivery in deliveries:
        assert delivery.batch
        columns = {
            name: values.tolist()
            for name, values in delivery.batch.columns.items()
            if len(values) == delivery.batch.count
        }
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            row |= {"agent": delivery.session.agent_id, "service": delivery.session.service}
            made.append(row)
    return made


def _group_by(table: TableLayout) -> str:
    """The statement that adds up what `Rollup` does."""
    functions = {Role.SUM: "sum", Role.MOST: "max", Role.LEAST: "min"}
    keys = ", ".join(f'"{name}"' for name in (*PLACE, *table.keys))
    figures = ", ".join(f'{functions[role]}("{name}")' for name, role in table.figures.items())
    minute = f"time_ns // {MINUTE.width_ns}"
    return f"create temp table made as select {minute}, {keys}, {figures} from rows group by all"
