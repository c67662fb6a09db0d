"""The store's work, step by step, without a thread and without a loop: commit, seal, retire,
recover. One thread calls it, except that a `SealJob` may run in another.

Every transaction has a number, in `marks`. After a failure nobody knows whether the disk has
the transaction: the number in the database does, once it is open again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import duckdb
import pyarrow as pa

from coral.colony.store.book import Book, entries_of, ledger_lines
from coral.colony.store.catalog import Catalog, Generation, Segment
from coral.colony.store.closing import Found, closing_of, found_in
from coral.colony.store.database import Database, is_damaged, is_fatal
from coral.colony.store.errors import StoreError
from coral.colony.store.making import UNTIL_NS, Commit, Making, Waiting
from coral.colony.store.rows import Rows, WithLosses
from coral.colony.store.sealing import SealJob, delete_orphans, found_segments
from coral.colony.store.settings import HOUR_NS, MINUTE_NS, Settings, Tier, rolled_up
from coral.colony.store.sources import Sources
from coral.colony.store.statements import (
    accepts,
    add_ledger_lines,
    add_segment,
    count,
    described,
    load_generations,
    load_marks,
    load_segments,
    named,
    set_marks,
    write_small_tables,
)

_BATCH_ROWS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Retired:
    """A segment that is gone from the catalog; its file is still there."""

    segment: Segment
    at_ns: int
    epoch: int  # of the database: the last one whose readers know of it


class Core:
    """DIRECTORY must be locked. `recover` comes first. Whatever raises `duckdb.Error`, `OSError` or
    `StoreError` may be tried again, after `recover` where `must_recover` says so."""

    def __init__(self, directory: Path, settings: Settings, rows: Rows) -> None:
        self.directory = directory
        self.settings = settings
        self.database = Database(directory, settings, self._begin)
        self.catalog = Catalog()
        self.book = Book()
        self.making = Making(rows, settings, self.book)
        self.retired: list[Retired] = []
        self.durable_items = 0
        """How many of what was given to `commit`, from the first on, are durable."""
        self.committed_ns = 0
        self.rows: Rows = WithLosses(rows)
        self._pending: Commit | None = None
        self._next_generation = 1
        self._retiring_ns = 0
        self._retiring: Sequence[Segment] = ()  # in a transaction that is not known to have failed
        self._closed: list[tuple[Generation, str]] = []  # in the transaction that is under way
        self._until_ns: Mapping[int, int] = {}
        self._found: Found | None = None

    @property
    def must_recover(self) -> bool:
        """Whether the database is closed, or invalid."""
        return self.database.closing or self.database.invalid.is_set()

    @property
    def has_pending(self) -> bool:
        """Whether a transaction was made that is not known to be durable."""
        return self._pending is not None

    @property
    def is_behind(self) -> bool:
        """Whether a minute is to be rolled up, although nothing may have come."""
        return self.making.rollup_until_ns() > self.making.watermarks[MINUTE_NS]

    def open(self) -> None:
        """Opens the directory, as it was left. Raises `StoreError`."""
        self.database.open(may_move_aside=True)
        try:
            self._load()
        except duckdb.Error as error:
            self.database.close()
            if not is_damaged(error):
                raise StoreError(f"{self.database.path}: {error}") from error
            self.database.condemn(error)
            self.database.open(may_move_aside=True)
            self._load()

    def _load(self) -> None:
        self._load_catalog()
        delete_orphans(self.directory, self.catalog.segments)
        lines = self.database.writer.sql("SELECT * FROM ledger").to_arrow_table()
        self.book = Book(entries_of(lines))
        self.making = Making(self.rows, self.settings, self.book)
        marks = load_marks(self.database.writer)
        self.making.number = marks["transaction"]
        self.making.watermarks = {width: marks[it] for width, it in UNTIL_NS.items()}
        self._until_ns = dict(self.making.watermarks)

    def rebuild(self) -> None:
        """Reads again what the rollups had not written when the store ended: the minutes and hours
        that were open. Needed once, before the first `commit`."""
        with self.database.cursor() as cursor:
            sources = Sources.of(cursor, self.directory, self.rows)
            for width_ns, suffix, rollup in (
                (MINUTE_NS, "", self.making.minutes),
                (HOUR_NS, f"_{Tier.MINUTE}", self.making.hours),
            ):
                for name in self.rows.rolled_up():
                    table = f"{name}{suffix}"
                    if table not in sources.tables:
                        continue
                    since_ns = self.making.watermarks[width_ns]
                    if self._found:
                        since_ns = self._found.until_ns.get(rolled_up(name, width_ns), 0)
                    query = f"SELECT * FROM ({sources.rows(table, since_ns)}) WHERE time_ns >= ?"
                    found = cursor.sql(query, params=[since_ns])
                    batches: pa.RecordBatchReader = found.to_arrow_reader(_BATCH_ROWS)
                    for batch in batches:
                        rollup.add(table, pa.Table.from_batches([batch]))
        self._found = None

    def recover(self) -> None:
        """Closes the database and opens it again. Raises `StoreError` where that cannot be done
        now; then `must_recover` stays true."""
        self.database.close()
        self.database.open()
        self._load_catalog()
        self._note_retired()
        pending = self._pending
        if pending and load_marks(self.database.writer)["transaction"] >= pending.number:
            self._done(pending)

    def commit(self, waiting: Iterable[Waiting] = ()) -> Commit:
        """Stores what a failed call before has left; else WAITING, which is not looked at while
        something is left. Returns what is durable now."""
        pending = self._pending = self._pending or self.making.make(waiting)
        changed: list[Generation] = []
        self._closed.clear()
        with self._transaction() as database:
            for table, rows in pending.tables.items():
                changed.append(self._insert(database, table, rows))
            write_small_tables(database, pending)
            set_marks(database, pending.marks)
        for hot, closing in self._closed:
            hot.closing = closing
        numbers = {it.number for it in changed}
        kept = [it for it in self.catalog.generations if it.number not in numbers]
        self.catalog.generations = sorted([*kept, *changed], key=lambda it: it.number)
        self._done(pending)
        return pending

    def next_seal(self, now_ns: int) -> SealJob | None:
        """The sealing that is due. Nothing is added to its generation from now on."""
        full = self.catalog.to_seal(self.settings, now_ns)
        if not full:
            return None
        full.closing = full.closing or self._closing(full.table)
        return SealJob(self.directory, self.database, full, self.rows.order(full.table), now_ns)

    def register(self, segment: Segment) -> None:
        """The segment takes the place of its generation: in one transaction, so a reader sees
        either."""
        hot = next((it for it in self.catalog.generations if it.number == segment.generation), None)
        if not hot:
            return  # an earlier call failed after all was done
        with self._transaction() as database:
            if count(database, hot.name) != segment.rows:
                raise StoreError(f"{segment.path}: not the rows of {hot.name}; it is sealed again")
            add_segment(database, segment)
            database.execute("DELETE FROM generations WHERE generation = ?", [hot.number])
            database.execute(f"DROP TABLE {hot.name}")
        self.catalog.generations.remove(hot)
        self.catalog.segments.append(segment)
        self._reuse()

    def retire(self, now_ns: int) -> Sequence[Segment]:
        """Drops the segments that are too old or too much; returns them. Their files are deleted
        by a later call, once no reader has them and `linger_s` is over."""
        self._delete_retired(now_ns)
        lingering = sum(it.segment.size_bytes for it in self.retired)
        gone = self.catalog.to_retire(self.settings, now_ns, self.database.size_bytes + lingering)
        if gone:
            numbers = [it.generation for it in gone]
            self._retiring, self._retiring_ns = gone, now_ns
            with self._transaction() as database:
                database.execute("DELETE FROM segments WHERE generation IN ?", [numbers])
            self.catalog.segments = [it for it in self.catalog.segments if it not in gone]
            self._note_retired()
        return gone

    def forget(self, now_ns: int) -> None:
        """Drops what the small tables say of times of which nothing else is kept."""
        longest_ns = int(max(self.settings.keep_s.values()) * 1e9)
        with self._transaction() as database:
            for table, ended in (
                ("ledger", "ended_ns"),
                ("gaps", "time_to_ns"),
                ("agents", "last_seen_ns"),
            ):
                database.execute(f"DELETE FROM {table} WHERE {ended} < ?", [now_ns - longest_ns])
        self.book.forget(
            now_ns - int(self.settings.known_ended_s * 1e9),
            now_ns - int(self.settings.known_lost_s * 1e9),
        )

    def close(self) -> None:
        """Closes the database; DuckDB writes its log into the file."""
        self.database.close()

    def _reuse(self) -> None:
        """Makes room in the file of what was dropped. DuckDB does so when its log is full, and rows
        that do not go through the log leave it nearly empty for an hour."""
        try:
            self.database.writer.execute("CHECKPOINT")
        except duckdb.Error as error:
            # It fails beside readers, too: there is a next time.
            if is_fatal(error):
                self.database.invalid.set()

    def _done(self, pending: Commit) -> None:
        self._pending = None
        self.durable_items = pending.items
        self.committed_ns = pending.committed_ns
        self._until_ns = {width: pending.marks[it] for width, it in UNTIL_NS.items()}
        self.book.publish(pending.standings)
        pending.confirmed()

    @contextmanager
    def _transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        database = self.database.writer
        try:
            database.execute("BEGIN")
            yield database
        except BaseException as error:
            with suppress(duckdb.Error):
                database.execute("ROLLBACK")
            if is_fatal(error):
                self.database.invalid.set()
            raise
        try:
            database.execute("COMMIT")
        except duckdb.Error:
            # What the log has of it, only opening it again can tell.
            self.database.invalid.set()
            raise

    def _insert(
        self, database: duckdb.DuckDBPyConnection, table: str, rows: pa.Table
    ) -> Generation:
        """Adds ROWS to the open generation of TABLE, or to a new one where that is full, or has
        other columns. Returns it as it is once the transaction is over."""
        with named(database, "incoming", rows):
            columns = described(database, "SELECT * FROM incoming")
            newest = self.catalog.open_generation(table)
            hot = newest
            if (
                not hot
                or hot.is_full(self.settings, self.settings.clock_ns())
                or not accepts(database, hot, columns)
            ):
                hot = self._new_generation(database, table, newest)
            database.execute(f"INSERT INTO {hot.name} BY NAME SELECT * FROM incoming")
        return replace(
            hot,
            rows=hot.rows + rows.num_rows,
            size_bytes=hot.size_bytes + rows.nbytes,
            accepts={*hot.accepts, columns},
        )

    def _new_generation(
        self, database: duckdb.DuckDBPyConnection, table: str, before: Generation | None
    ) -> Generation:
        """With the columns of the one BEFORE, and those of `incoming`."""
        now_ns = self.settings.clock_ns()
        hot = Generation(table, self._next_generation, now_ns)
        self._next_generation += 1
        columns = "SELECT * FROM incoming"
        if before:
            columns = f"SELECT * FROM {before.name} UNION ALL BY NAME {columns}"
            # Nothing of this transaction is in it: what was durable before is how it stands.
            closing = before.closing or self._closing(table)
            self._closed.append((before, closing))
            database.execute(
                "UPDATE generations SET closing = ? WHERE generation = ?",
                [closing, before.number],
            )
        database.execute(f"CREATE TABLE {hot.name} AS SELECT * FROM ({columns}) LIMIT 0")
        opened = [table, hot.number, now_ns, ""]
        database.execute("INSERT INTO generations VALUES (?, ?, ?, ?)", opened)
        set_marks(database, {"generation": hot.number})
        hot.columns = described(database, f"SELECT * FROM {hot.name}")
        return hot

    def _load_catalog(self) -> None:
        database = self.database.writer
        closings = {it.number: it.closing for it in self.catalog.generations}
        self.catalog = Catalog(
            list(load_generations(database, closings)), list(load_segments(database))
        )
        used = [it.generation for it in self.catalog.segments]
        used += [it.number for it in self.catalog.generations]
        used.append(load_marks(self.database.writer)["generation"])
        self._next_generation = max(used) + 1

    def _closing(self, table: str) -> str:
        return closing_of(table, self.book, self._until_ns)

    def _begin(self, database: duckdb.DuckDBPyConnection) -> None:
        """A new hot file learns of the segments that are there from their own files."""
        segments = list(found_segments(self.directory))
        for it, _ in segments:
            add_segment(database, it)
        found = self._found = found_in(segments)
        add_ledger_lines(database, ledger_lines(found.numbered))
        set_marks(database, {it: found.watermark_ns(width) for width, it in UNTIL_NS.items()})

    def _note_retired(self) -> None:
        """Those of the segments in the last transaction of `retire` that the catalog does not have
        any more: their files go, and count until then."""
        kept = {it.generation for it in self.catalog.segments}
        gone, self._retiring = [it for it in self._retiring if it.generation not in kept], ()
        if gone:
            epoch = self.database.next_epoch()
            self.retired += [Retired(it, self._retiring_ns, epoch) for it in gone]

    def _delete_retired(self, now_ns: int) -> None:
        oldest = self.database.oldest_epoch
        linger_ns = int(self.settings.linger_s * 1e9)
        for it in list(self.retired):
            if it.epoch < oldest and now_ns - it.at_ns >= linger_ns:
                (self.directory / it.segment.path).unlink(missing_ok=True)
                self.retired.remove(it)
