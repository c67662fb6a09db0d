"""A full generation becomes a sorted Parquet file. It reads the hot file and writes beside it; the
writing thread registers the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from coral.colony.store.catalog import Generation, Segment, segment_path
from coral.colony.store.database import Database
from coral.colony.store.errors import StoreError
from coral.colony.store.files import sync_directory, sync_file
from coral.colony.store.statements import described

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_FACTS: Final = "coral"
_UNFINISHED: Final = ".unfinished"
_OURS: Final = frozenset({".parquet", _UNFINISHED})
_ROW_GROUP: Final = 65_536
_ZSTD_LEVEL: Final = 3
_ALWAYS_ASKED: Final = frozenset({"time_ns", "agent", "session"})
_PART_OF_MEMORY: Final = 7
_SAMPLE: Final = 2000


@dataclass(frozen=True)
class SealJob:
    """Seals GENERATION, sorted by ORDER. Whatever interrupts `run`, it can be run again; until the
    segment is registered, its file is an orphan."""

    directory: Path
    database: Database
    generation: Generation
    order: Sequence[str]
    sealed_ns: int

    def run(self) -> Segment:
        """Returns once the file is on the disk under its name. Raises `duckdb.Error`, `OSError`,
        `ArrowException`, `StoreError`."""
        relative = segment_path(self.generation.table, self.generation.number)
        path = self.directory / relative
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True)
            sync_directory(path.parent.parent)
            sync_directory(self.directory)
        unfinished = path.with_name(path.name + _UNFINISHED)
        try:
            facts = self._write(unfinished)
            sync_file(unfinished)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise
        unfinished.rename(path)
        sync_directory(path.parent)
        return _segment(str(relative), path.stat().st_size, facts)

    def _write(self, path: Path) -> Mapping[str, Any]:
        hot = self.generation
        with self.database.cursor() as cursor:
            columns = described(cursor, f"SELECT * FROM {hot.name}")
            names = [name for name, _ in columns]
            times = "min(time_ns), max(time_ns)" if "time_ns" in names else "NULL, NULL"
            ((from_ns, to_ns, rows),) = cursor.execute(
                f"SELECT {times}, count(*) FROM {hot.name}"
            ).fetchall()
            facts = {
                "table": hot.table,
                "generation": hot.number,
                "columns": hashlib.sha1(repr(columns).encode(), usedforsecurity=False).hexdigest(),
                "from_ns": from_ns or 0,
                "to_ns": to_ns or self.sealed_ns,
                "rows": rows,
                "sealed_ns": self.sealed_ns,
                "closing": hot.closing,
            }
            order = [it for it in self.order if it in names]
            with closing(_Sorted(cursor, hot.name, order, self._parts)) as batches:
                writer = pq.ParquetWriter(
                    path,
                    batches.schema,
                    compression="zstd",
                    compression_level=_ZSTD_LEVEL,
                    write_statistics=[it for it in names if it in {*order, *_ALWAYS_ASKED}],
                    store_schema=False,
                )
                written = 0
                with writer:
                    for batch in batches:
                        writer.write_batch(batch)
                        written += batch.num_rows
                    writer.add_key_value_metadata({_FACTS: json.dumps(facts)})
            if written != rows:
                raise StoreError(f"{path}: {written} rows of the {rows} of {hot.name}")
        return facts

    @property
    def _parts(self) -> int:
        """In how many parts it is sorted: DuckDB then sorts in memory, in a quarter of the time
        that it takes where it must spill."""
        at_once = max(1, self.database.memory_bytes // _PART_OF_MEMORY)
        return 1 + self.generation.size_bytes // at_once


class _Sorted:
    """The rows of a table in order, as batches: a range of its keys after the other, of about equal
    sizes."""

    def __init__(
        self, cursor: duckdb.DuckDBPyConnection, table: str, order: Sequence[str], parts: int
    ) -> None:
        self._cursor = cursor
        self._table = table
        self._keys = ", ".join(f'"{it}"' for it in order)
        self._first = f'"{order[0]}"' if order else ""
        self._bounds: list[tuple[object, ...]] = []
        if order and parts > 1:
            sample = f"SELECT {self._keys} FROM {table} USING SAMPLE {_SAMPLE}"
            keys = cursor.execute(f"SELECT * FROM ({sample}) ORDER BY ALL").fetchall()
            self._bounds = [keys[len(keys) * it // parts] for it in range(1, parts)]
        self._reader = self._part(0)
        self.schema: pa.Schema = self._reader.schema

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        yield from self._reader
        for number in range(1, len(self._bounds) + 1):
            self._reader = self._part(number)
            yield from self._reader

    def close(self) -> None:
        """Ends what is being read."""
        self._reader.close()

    def _part(self, number: int) -> pa.RecordBatchReader:
        conditions = ["true"]
        parameters: list[object] = []
        if number > 0:
            bound = self._bounds[number - 1]
            if bound[0] is not None:
                # The first key alone leaves out most rows, at a fraction of the price of them all.
                conditions.append(f"({self._first} >= ? OR {self._first} IS NULL)")
                parameters.append(bound[0])
            conditions.append(f"row({self._keys}) >= row({self._marks})")
            parameters += bound
        if number < len(self._bounds):
            bound = self._bounds[number]
            if bound[0] is not None:
                conditions.append(f"{self._first} <= ?")
                parameters.append(bound[0])
            conditions.append(f"row({self._keys}) < row({self._marks})")
            parameters += bound
        query = f"SELECT * FROM {self._table} WHERE {' AND '.join(conditions)}"
        if self._keys:
            query += f" ORDER BY {self._keys}"
        return self._cursor.sql(query, params=parameters or None).to_arrow_reader(_ROW_GROUP)

    @property
    def _marks(self) -> str:
        return ", ".join("?" for _ in self._bounds[0])


def found_segments(directory: Path) -> Iterator[tuple[Segment, str]]:
    """The segments below DIRECTORY by their own files, each with its generation's `closing`: for a
    hot file that knows nothing."""
    for path in sorted((directory / "segments").glob("*/*.parquet")):
        try:
            metadata = pq.read_metadata(path).metadata or {}
            facts = json.loads(metadata[_FACTS.encode()])
            segment = _segment(str(path.relative_to(directory)), path.stat().st_size, facts)
            yield segment, facts.get("closing", "")
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            path.rename(path.with_name(f"{path.name}.unreadable"))
            log.error("not a segment; renamed", file=str(path), error=str(error))


def delete_orphans(directory: Path, registered: Sequence[Segment]) -> int:
    """Deletes what a crash left: files of sealings that were not registered, or retired and not
    deleted. Returns their number."""
    known = {directory / it.path for it in registered}
    files = (directory / "segments").glob("*/*")
    orphans = [it for it in files if it.suffix in _OURS and it not in known]
    for it in orphans:
        it.unlink(missing_ok=True)
    return len(orphans)


def _segment(path: str, size_bytes: int, facts: Mapping[str, Any]) -> Segment:
    return Segment(
        table=facts["table"],
        generation=facts["generation"],
        path=path,
        columns=facts["columns"],
        from_ns=facts["from_ns"],
        to_ns=facts["to_ns"],
        rows=facts["rows"],
        size_bytes=size_bytes,
        sealed_ns=facts["sealed_ns"],
    )
