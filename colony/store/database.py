"""The hot DuckDB file: opened, opened again after a fatal error, moved aside where it cannot be
read. It knows the small tables' layout, and nothing of what they mean.

No table has a PRIMARY KEY or an index, and nothing is UPSERTed: the writer is alone, so it knows
itself what is there, and DuckDB's indexes have been found corrupt (duckdb #23788, #23645).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import duckdb
import structlog

from coral.colony.quoting import literal
from coral.colony.store.errors import StoreError, StoreUnavailableError
from coral.colony.store.files import sync_directory
from coral.colony.store.settings import Settings

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

# Readable by DuckDB 1.5 and everything after it.
_STORAGE_VERSION: Final = "v1.5.0"
# How large the log grows before it is written into the file: many transactions' worth, because that
# writes what is begun of each table anew.
_LOG: Final = "16MB"
# Rows of so many of one table in one transaction go into the file at once, compressed, and not
# through the log, from which each checkpoint would write what is begun of the table anew. DuckDB's
# own 122,880 is more than a second of most fleets. A multiple of 2,048.
_ROW_GROUP: Final = 16_384
_NAME: Final = "hot"
_MOST_SPILLED: Final = 8  # times the memory
# Of the small tables; counted up when their columns change.
_FORMAT: Final = 1
_CLOSING_S: Final = 30.0
# What DuckDB says of a file that is not, or not any more, a database that it can read. Every other
# error may pass: a full disk, a missing right, memory.
_UNREADABLE: Final = (
    "Corrupt", "not a valid DuckDB database", "Could not read enough bytes",
    "storage version number", "Serialization Error", "replaying WAL", "Failed to load",
    "INTERNAL Error",
)  # fmt: skip

_DAMAGED: Final = "Corrupt database file"
# Errors that quote what callers have written: their words say nothing of the file.
_OF_STATEMENTS: Final = (
    duckdb.BinderException, duckdb.CatalogException, duckdb.ConversionException,
    duckdb.InvalidInputException, duckdb.OutOfRangeException, duckdb.ParserException,
)  # fmt: skip

SMALL_TABLES: Final[Mapping[str, str]] = {
    "ledger": """id BIGINT, agent VARCHAR, session VARCHAR, kind VARCHAR, service VARCHAR,
        started_ns BIGINT, config VARCHAR, attributes VARCHAR, last_seq UBIGINT, produced UBIGINT,
        stored UBIGINT, lost UBIGINT, lost_by_stage VARCHAR, lost_in_kernel VARCHAR,
        updated_ns BIGINT, ended VARCHAR, ended_detail VARCHAR, ended_ns BIGINT,
        rows_of VARCHAR""",
    "gaps": "time_from_ns BIGINT, time_to_ns BIGINT, agent VARCHAR, why VARCHAR",
    "agents": """agent VARCHAR, address VARCHAR, version VARCHAR, kernel VARCHAR,
        connected BOOLEAN, detail VARCHAR, attributes VARCHAR, first_seen_ns BIGINT,
        last_seen_ns BIGINT""",
    "generations": "table_name VARCHAR, generation BIGINT, opened_ns BIGINT, closing VARCHAR",
    "segments": """table_name VARCHAR, generation BIGINT, path VARCHAR, columns VARCHAR,
        from_ns BIGINT, to_ns BIGINT, row_count BIGINT, size_bytes BIGINT, sealed_ns BIGINT""",
    "marks": """format BIGINT, transaction BIGINT, generation BIGINT, committed_ns BIGINT,
        minutes_until_ns BIGINT, hours_until_ns BIGINT""",
}
"""By name, their columns. JSON where a VARCHAR holds a mapping. `marks` has one row: the format of
these tables, the numbers of the last transaction and generation, how far rows are rolled up."""


def is_fatal(error: BaseException) -> bool:
    """Whether the database must be opened again after ERROR."""
    return (
        isinstance(error, duckdb.FatalException | duckdb.InternalException)
        # What an attached file says of itself alone.
        or _says(error, "has been invalidated")
    )


def is_damaged(error: BaseException) -> bool:
    """Whether ERROR says that a part of the file is not what was written."""
    return _says(error, _DAMAGED)


def _says(error: BaseException, words: str) -> bool:
    return not isinstance(error, _OF_STATEMENTS) and words in str(error)


def is_full(error: BaseException) -> bool:
    """Whether ERROR says that there is no room on the disk, or in its quota."""
    text = str(error)
    return "No space left" in text or "quota exceeded" in text


class Database:
    """DIRECTORY/hot.duckdb; a new one begins with what FIRST puts into it. `writer` is the writing
    thread's own; every other thread reads by a `cursor`. After `open`, `moved_aside` names the file
    that could not be read, if there was one.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        first: Callable[[duckdb.DuckDBPyConnection], None],
    ) -> None:
        self.path = directory / "hot.duckdb"
        self.moved_aside: Path | None = None
        self.memory_bytes = settings.memory_bytes
        self.invalid = threading.Event()
        """Set by whoever meets a fatal error."""
        self.damage = ""
        """What was found where a part of the file cannot be read any more."""
        self._first = first
        self._temporary = directory / "spill"
        self._identity: tuple[int, int] | None = None
        self._root: duckdb.DuckDBPyConnection | None = None
        self._writer: duckdb.DuckDBPyConnection | None = None
        self._live: dict[duckdb.DuckDBPyConnection, int] = {}
        self._epoch = 0
        self._turn = threading.Condition()

    @property
    def writer(self) -> duckdb.DuckDBPyConnection:
        """Raises `StoreUnavailableError` while the database is closed."""
        if not self._writer:
            raise StoreUnavailableError("the database is being opened again")
        return self._writer

    def open(self, *, may_move_aside: bool = False) -> None:
        """Raises `StoreError` where the file cannot be opened. One that can never be is put out
        of the way and replaced if it MAY_MOVE_ASIDE."""
        if may_move_aside and self._verdict.exists():
            self._move_aside(self._verdict.read_text(errors="replace"))
        if not self.path.exists():
            self._make()
        if not self.path.is_file():  # opening a FIFO would wait for ever
            raise StoreError(f"{self.path}: it is not a regular file")
        try:
            root = self._checked()
        except (duckdb.Error, _OtherFormatError) as error:
            if not may_move_aside or not _can_never_be_read(error):
                raise StoreError(f"{self.path}: {_first_line(error)}") from error
            self._move_aside(_first_line(error))
            self._make()
            root = self._checked()
        self._identity = self._found_identity()
        with self._turn:
            self.invalid.clear()
            self._root = root
            self._writer = _cursor(root)
            self._turn.notify_all()

    def condemn(self, error: BaseException) -> None:
        """A part of the file is damaged: the next process that opens it moves it aside. This one
        has deliveries in its books that go on after what is in there."""
        self.damage = self.damage or _first_line(error)
        with suppress(OSError):
            self._verdict.write_text(self.damage)

    def close(self) -> None:
        """Interrupts all readers and waits for them. Raises `StoreError` where one does not end."""
        with self._turn:
            root, self._root = self._root, None
            for cursor in self._live:
                cursor.interrupt()
            if not self._turn.wait_for(lambda: not self._live, _CLOSING_S):
                self._root = root  # the next try may have more luck
                raise StoreError(f"{self.path}: a reader does not end")
        if self._writer:
            self._writer.close()
            self._writer = None
        if root:
            # A fatal error has been told where it was met.
            with suppress(duckdb.Error):
                root.close()

    @contextmanager
    def cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection of one's own, for any thread; a fatal error in it is noted. Raises
        `StoreUnavailableError` while the database is closed."""
        with self._turn:
            if not self._root:
                raise StoreUnavailableError("the database is being opened again")
            cursor = _cursor(self._root)
            self._live[cursor] = self._epoch
        try:
            yield cursor
        except duckdb.Error as error:
            if is_damaged(error):
                self.condemn(error)
            elif is_fatal(error):
                self.invalid.set()
            raise
        finally:
            cursor.close()
            with self._turn:
                del self._live[cursor]
                self._turn.notify_all()

    def next_epoch(self) -> int:
        """Begins one, and returns the one before: see `oldest_epoch`."""
        with self._turn:
            self._epoch += 1
            return self._epoch - 1

    @property
    def oldest_epoch(self) -> int:
        """That of the oldest cursor: nobody reads what was there in epochs before it alone."""
        with self._turn:
            return min(self._live.values(), default=self._epoch)

    @property
    def is_in_place(self) -> bool:
        """Whether the file still has its name: what is written to it otherwise goes with this
        process."""
        return self._identity is None or self._found_identity() == self._identity

    @property
    def closing(self) -> bool:
        """Whether cursors have to end."""
        return self._root is None

    @property
    def size_bytes(self) -> int:
        """The file and its log."""
        return size_of(self.path) + size_of(self._log)

    @property
    def spilled_bytes(self) -> int:
        """What sorting and questions have beyond the memory, for as long as they last."""
        return sum(size_of(it) for it in self._temporary.glob("*"))

    @property
    def _log(self) -> Path:
        return self.path.with_name(f"{self.path.name}.wal")

    def _found_identity(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    @property
    def _verdict(self) -> Path:
        return self.path.with_name(f"{self.path.name}.damaged")

    def _connect(self, path: Path) -> duckdb.DuckDBPyConnection:
        """A database of its own that has the file, because only `ATTACH` takes _ROW_GROUP."""
        root = duckdb.connect(
            config={
                "memory_limit": f"{self.memory_bytes}B",
                # Whoever calls does the work: the writer's pace does not depend on readers.
                "threads": 1,
                "temp_directory": str(self._temporary),
                # By default a question may take nearly all that is free on the disk.
                "max_temp_directory_size": f"{_MOST_SPILLED * self.memory_bytes}B",
                "checkpoint_threshold": _LOG,
                "python_enable_replacements": False,
                "autoinstall_known_extensions": False,
                "preserve_insertion_order": False,
            },
        )
        options = [f"ROW_GROUP_SIZE {_ROW_GROUP}"]
        if not path.exists():  # one that is there has its version
            options.append(f"STORAGE_VERSION '{_STORAGE_VERSION}'")
        try:
            root.execute(f"ATTACH {literal(str(path))} AS {_NAME} ({', '.join(options)})")
            root.execute(f"USE {_NAME}")
        except BaseException:
            root.close()
            raise
        return root

    def _checked(self) -> duckdb.DuckDBPyConnection:
        root = self._connect(self.path)
        try:
            ((number,),) = root.execute("SELECT format FROM marks").fetchall()
            if number != _FORMAT:
                raise _OtherFormatError(f"its tables have format {number}, not {_FORMAT}")
        except (duckdb.CatalogException, duckdb.BinderException) as error:
            root.close()
            raise _OtherFormatError("its tables are not a colony's of this version") from error
        except BaseException:
            root.close()
            raise
        return root

    def _make(self) -> None:
        """A new file, which has its name once everything is in it, whatever interrupts this."""
        unfinished = self.path.with_name(f"{self.path.name}.new")
        for left in (unfinished, unfinished.with_name(f"{unfinished.name}.wal")):
            left.unlink(missing_ok=True)
        try:
            with self._connect(unfinished) as connection:
                for name, columns in SMALL_TABLES.items():
                    connection.execute(f"CREATE TABLE {name} ({columns})")
                connection.execute("INSERT INTO marks VALUES (?, 0, 0, 0, 0, 0)", [_FORMAT])
                self._first(connection)
        except duckdb.Error as error:
            raise StoreError(f"{self.path}: {_first_line(error)}") from error
        unfinished.rename(self.path)
        sync_directory(self.path.parent)

    def _move_aside(self, why: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.unreadable-{time.time_ns()}")
        for file in (self._log, self.path):  # the log first: it belongs to no other file
            if file.exists():
                file.rename(aside if file == self.path else f"{aside}.wal")
        self._verdict.unlink(missing_ok=True)
        self.damage = ""
        sync_directory(self.path.parent)
        self.moved_aside = aside
        log.error(
            "the hot file cannot be read and was moved aside; sealed segments are all there",
            file=str(self.path),
            moved_to=str(aside),
            error=why,
        )


def size_of(path: Path) -> int:
    """In bytes; 0 for a file that is not there any more."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _cursor(root: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """A connection of its own to the same file."""
    cursor = root.cursor()
    cursor.execute(f"USE {_NAME}")
    return cursor


class _OtherFormatError(Exception):
    """A DuckDB file, with other tables."""


def _can_never_be_read(error: Exception) -> bool:
    return isinstance(error, _OtherFormatError) or any(it in str(error) for it in _UNREADABLE)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
