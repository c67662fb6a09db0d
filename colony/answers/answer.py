"""A named query from the request to the table and its coverage, in one snapshot. No loop here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from coral.colony.answers.comparing import compared
from coral.colony.answers.coverage import Scope, covered, watches_of
from coral.colony.answers.figures import finished
from coral.colony.answers.frames import with_frames
from coral.colony.answers.named import NAMED
from coral.colony.answers.query import (
    ACCOUNT,
    Asked,
    conditions,
    statement,
    table_of,
)
from coral.colony.answers.refusals import NotFoundError, unknown
from coral.colony.answers.repeats import repeats
from coral.colony.answers.sources import Sources
from coral.colony.answers.window import WIDTHS_NS, Window
from coral.colony.tables.layout import STACK
from coral.mesh.colony.v1 import colony_pb2 as pb


@dataclass(frozen=True)
class Answer:
    """A table, and what it covers."""

    table: pa.Table
    coverage: pb.Coverage


def answered(cursor: duckdb.DuckDBPyConnection, sources: Sources, asked: Asked) -> Answer:
    """The answer to a checked request. Raises `RefusedError`, `duckdb.Error`."""
    answer = _answered(cursor, sources, asked)
    if STACK not in asked.by:
        return answer
    window = Window(
        getattr(answer.coverage, "from").ToNanoseconds() - asked.against_ns,
        answer.coverage.to.ToNanoseconds(),
    )
    return Answer(with_frames(cursor, sources, answer.table, window), answer.coverage)


def _answered(cursor: duckdb.DuckDBPyConnection, sources: Sources, asked: Asked) -> Answer:
    if not asked.against_ns:
        answer = _of_window(cursor, sources, asked, asked.window, asked.top)
        if not answer.table.num_rows:
            _check_agent(cursor, asked)
            _check_services(cursor, sources, asked)
        return answer
    before_window = asked.window.earlier(asked.against_ns)
    now = _of_window(cursor, sources, asked, asked.window, 0)
    before = _of_window(cursor, sources, asked, before_window, 0)
    if not now.table.num_rows and not before.table.num_rows:
        _check_agent(cursor, asked)
        _check_services(cursor, sources, asked)
    coverage = now.coverage
    table = compared(
        asked.named, now.table, before.table, asked.by,
        now_is_cut=coverage.cut, before_is_cut=before.coverage.cut,
    )  # fmt: skip
    coverage.against.CopyFrom(before.coverage)
    _cut(coverage, table.num_rows, asked.top)
    table = table.slice(0, asked.top) if asked.top else table
    coverage.rows = table.num_rows
    return Answer(table, coverage)


def _of_window(
    cursor: duckdb.DuckDBPyConnection, sources: Sources, asked: Asked, window: Window, top: int
) -> Answer:
    scope = scope_of(asked)
    watches = watches_of(cursor, window, scope)
    made = statement(asked, window, sources, top=top, left_out=list(repeats(watches)))
    coverage = covered(cursor, sources, window, scope, plans=made.plans.values(), watches=watches)
    if asked.needs_raw:
        coverage.notes.extend(_raw_notes(asked, sources, made.plans))
    sums: pa.Table = cursor.sql(made.sql).to_arrow_table()
    rows_used, groups = (_first(sums, name) for name in ACCOUNT)
    coverage.rows_used = rows_used
    coverage.rows = sums.num_rows
    _cut(coverage, groups, sums.num_rows)
    return Answer(finished(sums, made, asked.named.times), coverage)


def _raw_notes(asked: Asked, sources: Sources, tables: Iterable[str]) -> Iterator[str]:
    """That a column which rollups do not have shortens the window."""
    from_ns = asked.window.from_ns
    for table in tables:
        raw_ns, rolled_ns = (sources.kept_from_ns(table_of(table, it)) for it in ("raw", "1m"))
        width_ns = WIDTHS_NS["1m"]
        if raw_ns and rolled_ns and rolled_ns < raw_ns - width_ns and from_ns < raw_ns:
            columns = ", ".join(asked.needs_raw)
            yield f"rows of {table} with {columns} are kept only for the last part of the window"


def _first(sums: pa.Table, name: str) -> int:
    return int(sums.column(name)[0].as_py() or 0) if sums.num_rows else 0


def _cut(coverage: pb.Coverage, rows: int, most: int) -> None:
    """Notes that of ROWS at most MOST are answered, unless that is 0."""
    if most and rows > most:
        coverage.cut = True
        coverage.left_out += rows - most


def scope_of(asked: Asked) -> Scope:
    """Whose losses concern the answer. A session without a service watches several."""
    services = list(conditions(Asked(asked.named, asked.window, services=asked.services)))
    agents = {"agent": asked.where["agent"]} if "agent" in asked.where else {}
    chosen = list(conditions(Asked(asked.named, asked.window, where=agents)))
    named = [f"({each} OR service = '')" for each in services]
    return Scope(asked.named.kinds, named, chosen)


def _check_agent(cursor: duckdb.DuckDBPyConnection, asked: Asked) -> None:
    """An answer is empty: raises `NotFoundError` for an agent that nobody knows."""
    wanted = asked.where.get("agent", "*")
    sql = "SELECT agent FROM agents UNION SELECT agent FROM ledger"
    known = [] if "*" in wanted else [str(agent) for (agent,) in cursor.execute(sql).fetchall()]
    if known and wanted not in known:
        raise NotFoundError(f"where: {unknown('agent', wanted, known)}")


def _check_services(cursor: duckdb.DuckDBPyConnection, sources: Sources, asked: Asked) -> None:
    """An answer is empty: raises `NotFoundError` for a service that has no rows of any kind."""
    wanted = [each for each in asked.services if "*" not in each]
    if not wanted:
        return
    known = known_services(cursor, sources)
    for service in wanted:
        if service not in known:
            raise unknown("service", service, known)


def known_services(cursor: duckdb.DuckDBPyConnection, sources: Sources) -> Sequence[str]:
    """The services of all rows that are kept; of the rollups where there are any, which is less to
    read."""
    found: set[str] = set()
    for table in dict.fromkeys(it.table for named in NAMED.values() for it in named.sources):
        minutes = table_of(table, "1m")
        pieces = [(minutes, 0), (table, sources.watermark_ns(WIDTHS_NS["1m"]))]
        for name, from_ns in pieces:
            rows = sources.rows(name, from_ns, _FOREVER_NS)
            sql = f"SELECT DISTINCT service FROM ({rows}) WHERE time_ns >= {from_ns}"
            found.update(name for (name,) in cursor.execute(sql).fetchall() if name)
    return sorted(found)


_FOREVER_NS = 1 << 62
