"""Where the rows of a table are, as SQL: one snapshot of the hot file and of the segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import duckdb
import pyarrow as pa

from coral.colony.quoting import literal
from coral.colony.store.catalog import Columns, Segment
from coral.colony.store.database import SMALL_TABLES, size_of
from coral.colony.store.errors import StoreError
from coral.colony.store.making import UNTIL_NS
from coral.colony.store.rows import Rows
from coral.colony.store.statements import described, load_marks, load_segments


@dataclass
class Sources:
    """Valid in the transaction that CURSOR is in, and not longer. Windows are
    FROM_NS <= time_ns < UNTIL_NS; None is no bound."""

    cursor: duckdb.DuckDBPyConnection
    committed_ns: int
    """When the last transaction that it sees was made, by the colony's clock."""
    _directory: Path
    _rows: Rows
    _hot: Mapping[str, Sequence[str]]
    _segments: Mapping[str, Sequence[Segment]]
    _marks: Mapping[str, int]
    _known: dict[str, Columns] = field(default_factory=dict)
    _missing: dict[str, Segment] = field(default_factory=dict)

    @classmethod
    def of(cls, cursor: duckdb.DuckDBPyConnection, directory: Path, rows: Rows) -> Self:
        """As the transaction of CURSOR sees them."""
        hot: dict[str, list[str]] = {}
        found = cursor.execute("SELECT table_name, generation FROM generations ORDER BY generation")
        for table, number in found.fetchall():
            hot.setdefault(table, []).append(f"hot_{table}_{number}")
        segments: dict[str, list[Segment]] = {}
        for it in load_segments(cursor):
            segments.setdefault(it.table, []).append(it)
        marks = load_marks(cursor)
        return cls(cursor, marks["committed_ns"], directory, rows, hot, segments, marks)

    @property
    def tables(self) -> Sequence[str]:
        """Those with rows, and the small tables of the hot file itself."""
        return sorted({*self._hot, *self._segments, *SMALL_TABLES})

    @property
    def missing(self) -> Sequence[Segment]:
        """The segments that were asked for so far, and whose files are gone, or have another size
        than when they were written. Their rows are left out."""
        return tuple(self._missing.values())

    def rows(self, table: str, from_ns: int | None = None, until_ns: int | None = None) -> str:
        """A SELECT of all rows of TABLE in the window, and possibly some outside of it. Raises
        `StoreError` for a table that there never is."""
        if table in SMALL_TABLES:
            return f"SELECT * FROM {table}"
        parts = [*self._hot_parts(table), *self._segment_parts(table, from_ns, until_ns)]
        return " UNION ALL BY NAME ".join(parts or [self._empty(table)])

    def hot(self, table: str) -> str:
        """As `rows`, of those that are in no segment yet."""
        return " UNION ALL BY NAME ".join([*self._hot_parts(table)] or [self._empty(table)])

    def files(
        self, table: str, from_ns: int | None = None, until_ns: int | None = None
    ) -> Sequence[Path]:
        """The segments that overlap the window. They stay for `linger_s` after the snapshot."""
        return [self._directory / it.path for it in self._readable(table, from_ns, until_ns)]

    def columns(self, table: str) -> Sequence[str]:
        """The names of its columns, of all generations and segments."""
        if table not in self._known:
            self._known[table] = described(self.cursor, f"({self.rows(table)})")
        return [name for name, _ in self._known[table]]

    def kept_from_ns(self, table: str) -> int | None:
        """The time of the oldest row; None where there is none."""
        times = [it.from_ns for it in self._segments.get(table, ())]
        for hot in self._hot.get(table, ()):
            ((oldest,),) = self.cursor.execute(f"SELECT min(time_ns) FROM {hot}").fetchall()
            times += [] if oldest is None else [oldest]
        return min(times, default=None)

    def watermark_ns(self, width_ns: int) -> int:
        """All rows of intervals of WIDTH_NS (a minute, an hour) that begin before it are in the
        rollups, and no others."""
        return self._marks[UNTIL_NS[width_ns]]

    def _hot_parts(self, table: str) -> Iterator[str]:
        yield from (f"SELECT * FROM {it}" for it in self._hot.get(table, ()))

    def _segment_parts(
        self, table: str, from_ns: int | None, until_ns: int | None
    ) -> Iterator[str]:
        """One for all files with equal columns: then DuckDB need not open each beforehand."""
        alike: dict[str, list[str]] = {}
        for it in self._readable(table, from_ns, until_ns):
            alike.setdefault(it.columns, []).append(literal(str(self._directory / it.path)))
        for paths in alike.values():
            yield f"SELECT * FROM read_parquet([{', '.join(paths)}])"

    def _readable(self, table: str, from_ns: int | None, until_ns: int | None) -> Iterator[Segment]:
        for it in self._segments.get(table, ()):
            if it.overlaps(from_ns, until_ns):
                if size_of(self._directory / it.path) == it.size_bytes:
                    yield it
                else:
                    self._missing[it.path] = it

    def _empty(self, table: str) -> str:
        schema = self._rows.schema(table)
        if schema is None:
            raise StoreError(f"there is no table {table!r}")
        name = f"empty_{table}"
        self.cursor.register(name, pa.Table.from_pylist([], schema))
        return f"SELECT * FROM {name}"
