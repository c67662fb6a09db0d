"""What the store says to DuckDB: the statements, and how their rows become the store's own data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import duckdb
import pyarrow as pa

from coral.colony.store.catalog import Columns, Generation, Segment
from coral.colony.store.making import Commit

_ADD_SEGMENT: Final = "INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_LEDGER_CHANGES: Final = (
    "attributes", "last_seq", "produced", "stored", "lost", "lost_by_stage", "lost_in_kernel",
    "updated_ns", "ended", "ended_detail", "ended_ns", "rows_of",
)  # fmt: skip
_AGENT_CHANGES: Final = (
    "address", "version", "kernel", "connected", "detail", "attributes", "last_seen_ns",
)  # fmt: skip
_ROUGHLY_A_ROW: Final = 500  # bytes in memory, of rows that were there before this process


def described(database: duckdb.DuckDBPyConnection, query: str) -> Columns:
    """The columns of QUERY."""
    rows = database.execute(f"DESCRIBE {query}").fetchall()
    return tuple((name, kind) for name, kind, *_ in rows)


def accepts(database: duckdb.DuckDBPyConnection, hot: Generation, columns: Columns) -> bool:
    """Whether the rows of `incoming`, with COLUMNS, go into HOT without a change of it: it has all
    of them, in types at least as wide."""
    if columns in hot.accepts:
        return True
    both = f"SELECT * FROM {hot.name} UNION ALL BY NAME SELECT * FROM incoming"
    return described(database, both) == hot.columns


def count(database: duckdb.DuckDBPyConnection, table: str) -> int:
    """The rows of TABLE."""
    ((found,),) = database.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(found)


def add_segment(database: duckdb.DuckDBPyConnection, segment: Segment) -> None:
    """Registers it."""
    database.execute(
        _ADD_SEGMENT,
        [
            segment.table,
            segment.generation,
            segment.path,
            segment.columns,
            segment.from_ns,
            segment.to_ns,
            segment.rows,
            segment.size_bytes,
            segment.sealed_ns,
        ],
    )


def load_segments(database: duckdb.DuckDBPyConnection) -> Iterator[Segment]:
    """All that are registered."""
    rows = database.execute("SELECT * FROM segments ORDER BY generation").fetchall()
    yield from (Segment(*it) for it in rows)


def load_generations(
    database: duckdb.DuckDBPyConnection, closings: Mapping[int, str]
) -> Iterator[Generation]:
    """All there are, as large as they are. By number, CLOSINGS of some are known."""
    rows = database.execute("SELECT * FROM generations ORDER BY generation").fetchall()
    for table, number, opened_ns, closing in rows:
        hot = Generation(table, number, opened_ns)
        hot.closing = closing or closings.get(number, "")
        hot.rows = count(database, hot.name)
        hot.size_bytes = hot.rows * _ROUGHLY_A_ROW
        hot.columns = described(database, f"SELECT * FROM {hot.name}")
        yield hot


def load_marks(database: duckdb.DuckDBPyConnection) -> Mapping[str, int]:
    """The row of `marks`, by column."""
    found = database.execute("SELECT * FROM marks")
    names = [it[0] for it in found.description]
    (row,) = found.fetchall()
    return dict(zip(names, row, strict=True))


def set_marks(database: duckdb.DuckDBPyConnection, marks: Mapping[str, int]) -> None:
    """Changes those columns of `marks`."""
    changes = ", ".join(f"{name} = ?" for name in marks)
    database.execute(f"UPDATE marks SET {changes}", list(marks.values()))


@contextmanager
def named(
    database: duckdb.DuckDBPyConnection, name: str, rows: pa.Table
) -> Iterator[duckdb.DuckDBPyConnection]:
    """ROWS are a table NAME for the duration of a block."""
    database.register(name, rows)
    try:
        yield database
    finally:
        with suppress(duckdb.Error):  # as every statement of a transaction that failed
            database.unregister(name)


def write_small_tables(database: duckdb.DuckDBPyConnection, commit: Commit) -> None:
    """The part of COMMIT that is no rows: `ledger`, `agents`, `gaps`."""
    add_ledger_lines(database, commit.new_lines)
    _change(database, "ledger", commit.changed_lines, ("id",), _LEDGER_CHANGES)
    for table, lines, keys, changes in (
        ("agents", commit.agents, ("agent",), _AGENT_CHANGES),
        ("gaps", commit.gaps, ("agent", "time_from_ns"), ("time_to_ns", "why")),
    ):
        _change(database, table, lines, keys, changes)
        _add_missing(database, table, lines, keys)


def add_ledger_lines(database: duckdb.DuckDBPyConnection, lines: pa.Table) -> None:
    """Adds LINES of sessions that are new."""
    if lines.num_rows:
        with named(database, "lines", lines):
            database.execute("INSERT INTO ledger BY NAME SELECT * FROM lines")


def _change(
    database: duckdb.DuckDBPyConnection,
    table: str,
    lines: pa.Table,
    keys: Sequence[str],
    columns: Sequence[str],
) -> None:
    """Gives the rows of TABLE that are equal to one of LINES in KEYS its values of COLUMNS."""
    if lines.num_rows:
        changes = ", ".join(f"{it} = lines.{it}" for it in columns)
        with named(database, "lines", lines):
            database.execute(f"UPDATE {table} SET {changes} FROM lines WHERE {_equal(table, keys)}")


def _add_missing(
    database: duckdb.DuckDBPyConnection, table: str, lines: pa.Table, keys: Sequence[str]
) -> None:
    """Adds those of LINES that are equal to no row of TABLE in KEYS."""
    if lines.num_rows:
        with named(database, "lines", lines):
            database.execute(
                f"INSERT INTO {table} BY NAME SELECT * FROM lines "
                f"WHERE NOT EXISTS (SELECT 1 FROM {table} WHERE {_equal(table, keys)})"
            )


def _equal(table: str, keys: Sequence[str]) -> str:
    return " AND ".join(f"{table}.{it} = lines.{it}" for it in keys)
