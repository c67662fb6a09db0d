"""A full generation becomes a sorted Parquet file. It reads the hot file and writes beside it; the
writing thread registers the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from coral.colony.store.catalog import Generation, Segment, segment_path
from coral.colony.store.database import Database
from coral.colony.store.files import sync_directory, sync_file

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_FACTS: Final = "coral"
_UNFINISHED: Final = ".unfinished"
_OURS: Final = frozenset({".parquet", _UNFINISHED})
_ROW_GROUP: Final = 122_880  # DuckDB's own: zone maps of the file are as fine as the hot table's


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
        `StoreUnavailableError`."""
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
            described = cursor.execute(f"DESCRIBE {hot.name}").fetchall()
            columns = [(name, kind) for name, kind, *_ in described]
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
            }
            order = ", ".join(f'"{it}"' for it in self.order if it in names)
            metadata = json.dumps(facts).replace("'", "''")
            cursor.execute(
                f"COPY (SELECT * FROM {hot.name}{f' ORDER BY {order}' if order else ''}) TO "
                f"'{_quoted(path)}' (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 1, "
                f"ROW_GROUP_SIZE {_ROW_GROUP}, KV_METADATA {{{_FACTS}: '{metadata}'}})"
            )
        return facts


def found_segments(directory: Path) -> Iterator[Segment]:
    """The segments below DIRECTORY by their own files, for a hot file that knows nothing."""
    for path in sorted((directory / "segments").glob("*/*.parquet")):
        try:
            metadata = pq.read_metadata(path).metadata or {}
            facts = json.loads(metadata[_FACTS.encode()])
            yield _segment(str(path.relative_to(directory)), path.stat().st_size, facts)
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


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
