"""What a worker gets of the store: the segments' paths, and the hot rows as Arrow in memory that
nobody can change."""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import pyarrow as pa

from coral.colony.answers.coverage import LOSSES
from coral.colony.answers.refusals import BusyError, RefusedError, unknown
from coral.colony.answers.sources import Sources
from coral.colony.answers.window import Window
from coral.colony.quoting import quoted
from coral.colony.tables import LEVELS, STACKS, TABLES

BOOKS: Final = ("agents", "gaps", "ledger", "losses")
"""Small tables that can be asked for too; they have no window."""
_OWN: Final = {"generations", "marks", "segments"}
MOST_HOT_BYTES: Final = 128 << 20
_BATCH_ROWS: Final = 65_536
_FOREVER_NS: Final = 1 << 62
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class Shipment:
    """The tables of a statement as `worker.py` takes them, and the descriptors that go with them.
    `window` is None where all rows were asked for. One that nobody gets, because its caller went
    away while it was made, closes itself: it holds up to MOST_HOT_BYTES."""

    tables: Mapping[str, Any]
    fds: list[int]
    window: Window | None
    rows: int

    def __post_init__(self) -> None:
        """Arranges for the end."""
        weakref.finalize(self, _close_all, self.fds)

    def close(self) -> None:
        """Closes the descriptors, once: the worker has its own."""
        _close_all(self.fds)


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def tables_of(sources: Sources) -> Sequence[str]:
    """All that a statement may name, whether or not they have rows: not the store's own lists."""
    names = [STACKS, *TABLES, *(level.name(name) for level in LEVELS for name in _rolled_up())]
    return sorted({*names, *BOOKS, *set(sources.tables) - _OWN})


def _rolled_up() -> Sequence[str]:
    return [name for name, table in TABLES.items() if table.is_rolled_up]


def ship(
    cursor: duckdb.DuckDBPyConnection,
    sources: Sources,
    named: Sequence[str],
    words: Sequence[str] | None,
    window: Window | None,
) -> Shipment:
    """The tables NAMED, of their hot rows only the columns in WORDS, unless that is None. Raises
    `RefusedError` for a table that there is not, `BusyError` where too much is hot."""
    known = tables_of(sources)
    for name in named:
        if name not in known and not name.startswith(("duckdb_", "sqlite_", "pg_")):
            raise RefusedError(f"sql: {unknown('table', name, known)}")
    tables: dict[str, Any] = {}
    fds: list[int] = []
    rows = 0
    try:
        for name in (each for each in known if each in named):
            bounds = None if name in BOOKS else window
            from_ns, to_ns = (bounds.from_ns, bounds.to_ns) if bounds else (0, _FOREVER_NS)
            hot = _hot_sql(sources, name, bounds)
            room = MOST_HOT_BYTES - sum(os.fstat(fd).st_size for fd in fds)
            fd, count = _in_memory(cursor, _columns(cursor, hot, words), room)
            tables[name] = {
                "hot": len(fds),
                "files": [str(each) for each in sources.files(name, from_ns, to_ns)],
                "window": [from_ns, to_ns] if bounds else None,
            }
            fds.append(fd)
            rows += count
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return Shipment(tables, fds, window, rows)


def _hot_sql(sources: Sources, table: str, window: Window | None) -> str:
    if table in BOOKS and table != LOSSES:  # never sealed
        return sources.rows(table, 0, _FOREVER_NS)
    where = f" WHERE time_ns >= {window.from_ns} AND time_ns < {window.to_ns}" if window else ""
    return f"SELECT * FROM ({sources.hot(table)}){where}"


def _columns(cursor: duckdb.DuckDBPyConnection, sql: str, words: Sequence[str] | None) -> str:
    """SQL with those of its columns alone that are among WORDS, and with the time."""
    if words is None:
        return sql
    there = cursor.sql(f"SELECT * FROM ({sql}) LIMIT 0").columns
    wanted = {*words, "time_ns"}
    picked = [name for name in there if name.lower() in wanted] or there[:1]
    return f"SELECT {', '.join(map(quoted, picked))} FROM ({sql})"


def _in_memory(cursor: duckdb.DuckDBPyConnection, sql: str, room_bytes: int) -> tuple[int, int]:
    """A descriptor of the rows as an Arrow IPC file, sealed; and how many there are."""
    fd = os.memfd_create("coral-hot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rows = 0
        with os.fdopen(os.dup(fd), "wb") as file:
            reader = cursor.sql(sql).to_arrow_reader(_BATCH_ROWS)
            with pa.ipc.new_file(file, reader.schema) as writer:
                for batch in reader:
                    writer.write_batch(batch)
                    rows += batch.num_rows
                    if file.tell() > room_bytes:
                        raise BusyError(
                            "sql: more rows of this window are not sealed yet than a statement "
                            f"may take ({MOST_HOT_BYTES >> 20} MiB): narrow it by --since"
                        )
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd, rows
