"""What the store says to DuckDB: the statements, and how their rows become the store's own data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Final

import duckdb

from coral.colony.store.catalog import Columns, Generation, Segment
from coral.colony.store.making import Commit

_ADD_SEGMENT: Final = "INSERT INTO segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_LEDGER_CHANGES: Final = (
    "attributes", "last_seq", "produced", "stored", "lost", "lost_by_stage", "lost_in_kernel",
    "updated_ns", "ended", "ended_detail", "ended_ns",
)  # fmt: skip
_AGENT_CHANGES: Final = (
    "address", "version", "kernel", "connected", "detail", "attributes", "last_seen_ns",
)  # fmt: skip
_ROUGHLY_A_ROW: Final = 200  # bytes in memory, of rows that were there before this process


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
    database: duckdb.DuckDBPyConnection, closed: AbstractSet[int]
) -> Iterator[Generation]:
    """All there are, as large as they are; the numbers of those CLOSED are known."""
    rows = database.execute("SELECT * FROM generations ORDER BY generation").fetchall()
    for table, number, opened_ns in rows:
        hot = Generation(table, number, opened_ns, closed=number in closed)
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


def write_small_tables(database: duckdb.DuckDBPyConnection, commit: Commit) -> None:
    """The part of COMMIT that is no rows: `ledger`, `agents`, `gaps`."""
    if commit.new_lines.num_rows:
        database.register("lines", commit.new_lines)
        database.execute("INSERT INTO ledger BY NAME SELECT * FROM lines")
    if commit.changed_lines.num_rows:
        database.register("lines", commit.changed_lines)
        database.execute(
            f"UPDATE ledger SET {_from_lines(_LEDGER_CHANGES)} FROM lines "
            "WHERE ledger.id = lines.id"
        )
    if commit.agents.num_rows:
        database.register("lines", commit.agents)
        same = "agents.agent = lines.agent"
        database.execute(f"UPDATE agents SET {_from_lines(_AGENT_CHANGES)} FROM lines WHERE {same}")
        database.execute(
            "INSERT INTO agents BY NAME SELECT * FROM lines "
            f"WHERE NOT EXISTS (SELECT 1 FROM agents WHERE {same})"
        )
    if commit.gaps.num_rows:
        database.register("lines", commit.gaps)
        same = "gaps.agent = lines.agent AND gaps.time_from_ns = lines.time_from_ns"
        database.execute(
            f"UPDATE gaps SET {_from_lines(('time_to_ns', 'why'))} FROM lines WHERE {same}"
        )
        database.execute(
            "INSERT INTO gaps BY NAME SELECT * FROM lines "
            f"WHERE NOT EXISTS (SELECT 1 FROM gaps WHERE {same})"
        )
    database.unregister("lines")


def _from_lines(columns: tuple[str, ...]) -> str:
    return ", ".join(f"{it} = lines.{it}" for it in columns)
