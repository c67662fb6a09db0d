"""The colony's storage beside SQLite and plain Parquet files: the same rows, the same questions.

    python -P -m benchmarks.colony_store [--rows N] [--without NAME] [--recording DIRECTORY]

measures as the section does, on so many rows. The rows are a collector's own, drained from a
program that fills it, as a thousand agents send them; each store begins with the batches as the
client has read them. One interval of all agents is a transaction, or a file: it is on the disk
before the next. All of them answer with one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks import kernel
from benchmarks.bench import Bench, BenchError
from benchmarks.colony_intake import AGENTS, ROWS
from benchmarks.recorded import TABLE, recorded
from benchmarks.report import Aim, Report, Samples, show, times
from coral.cli.signals import exiting
from coral.client import Batch, Kind
from coral.colony.answers.answer import answered
from coral.colony.answers.named import NAMED
from coral.colony.answers.query import Asked
from coral.colony.answers.window import Window
from coral.colony.delivery import Delivery, Session
from coral.colony.store import Settings, Store
from coral.colony.tables import TABLES, ContractRows, Intake
from tests import simulated

DEFAULT_ROWS: Final = 2_000_000
_INTERVAL_NS: Final = 10 * 10**9
_LAYOUT: Final = TABLES[TABLE]
_SERVICE: Final = "service-07"
_SEAL_ROWS: Final = Settings().seal_rows
_SEALED_S: Final = 600.0
_ROUNDS: Final = 5
_DEADLINE_S: Final = 300.0
_CHUNK: Final = 20_000
_PARQUET_ZSTD: Final = 3  # as in the colony's segments
_MEMORY: Final = "256MB"  # as the colony's database

COLONY: Final = "coral's colony"
SQLITE: Final = "SQLite"
PARQUET: Final = "Parquet"

# What issue 15 asks for.
_AIM_BYTES: Final = 11.0
_AIM_CPU_US: Final = 5.0
_AIM_SERVICE_MS: Final = {10**7: 200.0, 10**8: 5000.0}
"""By the number of rows, at least."""
_AIM_ALL_MS: Final = 500.0


@dataclass(frozen=True)
class Question:
    """A SELECT that adds up rows by one column, in SQL that DuckDB and SQLite read."""

    name: str
    by: str
    service: str = ""
    from_ns: int = 0
    until_ns: int = 1 << 62

    def sql(self, rows: str) -> str:
        """Of the table or the subquery ROWS."""
        sums = ["call_count", "error_count", "total_duration_ns"]
        sums += _LAYOUT.histograms["latency"].columns
        picked = [f'CAST(coalesce(sum("{it}"), 0) AS BIGINT) AS "{it}"' for it in sums]
        where = [f"time_ns >= {self.from_ns} AND time_ns < {self.until_ns}"]
        if self.service:
            where.append(f"service = '{self.service}'")
        return (
            f"SELECT {self.by}, {', '.join(picked)}, max(max_duration_ns) AS most FROM {rows} "
            f"WHERE {' AND '.join(where)} GROUP BY {self.by} ORDER BY {self.by}"
        )

    def asked(self) -> Asked:
        """The same of a named query."""
        services = (self.service,) if self.service else ()
        window = Window(self.from_ns, self.until_ns)
        return Asked(NAMED["syscalls"], window, (self.by,), services=services).checked()


@dataclass(frozen=True)
class Traffic:
    """What agents send, interval after interval."""

    sessions: Sequence[simulated.Session]
    intervals: int
    began_ns: int

    @property
    def rows(self) -> int:
        """In all."""
        return len(self.sessions) * ROWS * self.intervals

    @property
    def end_ns(self) -> int:
        """When the last interval has ended for all agents."""
        return self.began_ns + (self.intervals + 1) * _INTERVAL_NS

    def questions(self) -> Sequence[Question]:
        """What is asked of it."""
        minute = self.end_ns - 60 * 10**9
        until = self.end_ns + 1
        return (
            Question("a service, by call", "syscall", _SERVICE, self.began_ns, until),
            Question("its last minute", "syscall", _SERVICE, minute, until),
            Question("all services", "service", "", self.began_ns, until),
        )

    def interval(self, number: int) -> list[Delivery]:
        """The batches of one, as the client has read them."""
        made = []
        for session in self.sessions:
            wire = session.batch(number, 0)
            batch = Batch.parse(wire)
            own = Session(
                session.agent_id, session.collector_id, Kind(batch.message.kind), session.service,
                self.began_ns,
            )  # fmt: skip
            last, end_ns = batch.last_seq, batch.message.interval_end_ns
            made.append(Delivery(own, batch, last - ROWS, last, last, end_ns, len(wire)))
        return made


@dataclass
class _Contestant(ABC):
    """A way to store rows, in a directory of its own."""

    directory: Path
    now_ns: int = 0

    @abstractmethod
    async def write(self, deliveries: Sequence[Delivery]) -> None:
        """Returns once they are on the disk."""

    @abstractmethod
    async def finish(self) -> None:
        """Returns once everything is in the form that it is kept in."""

    @abstractmethod
    async def ask(self, question: Question) -> list[dict[str, Any]]:
        """Its answer."""

    @abstractmethod
    async def size_bytes(self) -> tuple[int, int]:
        """Of what has raw rows in its last form, and how many rows that is."""

    @abstractmethod
    async def open(self) -> None:
        """Comes first."""

    @abstractmethod
    async def close(self) -> None:
        """Comes last."""


class _Colony(_Contestant):
    """The store as `coral colony` has it: rows, rollups, ledger, segments."""

    async def open(self) -> None:
        settings = Settings(clock_ns=lambda: self.now_ns)
        self._store = Store(self.directory, settings, ContractRows())
        await self._store.start()

    async def write(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            await self._store.room()
            self._store.put(delivery)
        await self._store.stored()

    async def finish(self) -> None:
        """What is sealed at all is sealed."""
        end_s = time.monotonic() + _SEALED_S
        while self._store.figures.rows[TABLE] - (await self.size_bytes())[1] >= _SEAL_ROWS:
            if time.monotonic() > end_s:
                raise BenchError(f"rows are not sealed after {_SEALED_S:g} s")
            await asyncio.sleep(0.1)

    async def ask(self, question: Question) -> list[dict[str, Any]]:
        from_ns, until_ns = question.from_ns, question.until_ns
        table = await self._store.read(
            lambda sources: question.sql(f"({sources.rows(TABLE, from_ns, until_ns)})"),
            deadline_s=_DEADLINE_S,
        )
        return _lines(table)

    async def ask_named(self, question: Question) -> list[dict[str, Any]]:
        """The same by a named query: of rollups where they do, with the account."""
        answer = await self._store.snapshot(
            lambda cursor, sources: answered(cursor, sources, question.asked()),
            deadline_s=_DEADLINE_S,
        )
        return _lines(answer.table)

    async def size_bytes(self) -> tuple[int, int]:
        sql = f"""SELECT coalesce(sum(size_bytes), 0)::BIGINT AS size_bytes,
            coalesce(sum(row_count), 0)::BIGINT AS row_count
            FROM segments WHERE table_name = '{TABLE}'"""
        (row,) = (await self._store.read(lambda _: sql, deadline_s=_DEADLINE_S)).to_pylist()
        return row["size_bytes"], row["row_count"]

    async def close(self) -> None:
        await self._store.close()


@dataclass
class _OfTables(_Contestant):
    """One that is given the rows of an interval as the colony's intake makes them."""

    _intake: Intake = field(default_factory=Intake)

    async def write(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._intake.add(delivery)
        self.insert(self._intake.take()[TABLE])

    @abstractmethod
    def insert(self, rows: pa.Table) -> None:
        """Stores the rows of one interval."""


class _Sqlite(_OfTables):
    """A table with the same columns, and one index."""

    async def open(self) -> None:
        self._path = self.directory / "rows.sqlite"
        self._database = sqlite3.connect(self._path)
        # As safe as the others: what is committed is on the disk.
        self._database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
        self._rows = 0

    def insert(self, rows: pa.Table) -> None:
        names = ", ".join(f'"{name}"' for name in rows.column_names)
        if not self._rows:
            self._database.execute(f"CREATE TABLE {TABLE} ({names})")
            self._database.execute(f"CREATE INDEX by_service ON {TABLE} (service, time_ns)")
        marks = ", ".join("?" for _ in rows.column_names)
        statement = f"INSERT INTO {TABLE} ({names}) VALUES ({marks})"
        with self._database:
            for first in range(0, rows.num_rows, _CHUNK):
                columns = [it.to_pylist() for it in rows.slice(first, _CHUNK).columns]
                self._database.executemany(statement, zip(*columns, strict=True))
        self._rows += rows.num_rows

    async def finish(self) -> None:
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def ask(self, question: Question) -> list[dict[str, Any]]:
        cursor = self._database.execute(question.sql(TABLE))
        names = [it[0] for it in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    async def size_bytes(self) -> tuple[int, int]:
        return self._path.stat().st_size, self._rows

    async def close(self) -> None:
        self._database.close()


class _Parquet(_OfTables):
    """A file for each interval, in the order in which rows came; DuckDB answers."""

    async def open(self) -> None:
        self._rows = 0
        self._duckdb = duckdb.connect(config={"threads": 1, "memory_limit": _MEMORY})

    def insert(self, rows: pa.Table) -> None:
        path = self.directory / f"{self._rows:012}.parquet"
        with path.open("wb") as file:
            pq.write_table(rows, file, compression="zstd", compression_level=_PARQUET_ZSTD)
            file.flush()
            os.fsync(file.fileno())
        self._rows += rows.num_rows

    async def finish(self) -> None:
        """It is."""

    async def ask(self, question: Question) -> list[dict[str, Any]]:
        files = f"read_parquet('{self.directory}/*.parquet')"
        return _lines(self._duckdb.sql(question.sql(files)).to_arrow_table())

    async def size_bytes(self) -> tuple[int, int]:
        return sum(it.stat().st_size for it in self.directory.iterdir()), self._rows

    async def close(self) -> None:
        self._duckdb.close()


def _lines(table: pa.Table) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = table.to_pylist()
    return lines


_CONTESTANTS: Final[Mapping[str, type[_Contestant]]] = {
    COLONY: _Colony,
    SQLITE: _Sqlite,
    PARQUET: _Parquet,
}


@dataclass
class Measured:
    """What one of them took."""

    rows: int
    wall_s: float = 0.0
    cpu_s: float = 0.0
    bytes_a_row: float = 0.0  # 0: nothing is in its last form yet
    all_bytes: int = 0
    ms: dict[str, Samples] = field(default_factory=dict)


async def measure(bench: Bench) -> Report:
    """The section: two million rows."""
    return await measured(bench, DEFAULT_ROWS, list(_CONTESTANTS), recorded(bench))


async def measured(bench: Bench, rows: int, names: Sequence[str], recording: Path) -> Report:
    """The report of those stores that NAMES has, on at least ROWS rows."""
    traffic = _traffic(recording, rows)
    bench.say(f"{traffic.rows:,} rows, {traffic.intervals} intervals of {AGENTS:,} agents")
    found: dict[str, Measured] = {}
    named = Measured(traffic.rows)
    answers: dict[str, list[list[dict[str, Any]]]] = {}
    for name in names:
        directory = bench.directory / "store"
        directory.mkdir()
        it = _CONTESTANTS[name](directory)
        await it.open()
        try:
            found[name] = await _written(it, traffic)
            answers[name] = await _asked(found[name], it.ask, traffic)
            if isinstance(it, _Colony):
                await _asked(named, it.ask_named, traffic)
        finally:
            await it.close()
            shutil.rmtree(directory)
        bench.say(f"{name}: done")
    first, *others = answers.values()
    if any(it != first for it in others):
        raise BenchError("the stores do not answer the same")
    return _report(traffic, found, named)


def _traffic(recording: Path, rows: int) -> Traffic:
    templates = [simulated.Template.read(it) for it in sorted((recording / TABLE).iterdir())]
    interval_s = _INTERVAL_NS / 1e9
    began_s = time.time() // 3600 * 3600
    sessions = [
        simulated.Session(
            f"node-{number:04}-0", f"node-{number:04}", f"service-{number % simulated.SERVICES:02}",
            templates, number, interval_s, began_s + interval_s * number / AGENTS,
        )
        for number in range(AGENTS)
    ]  # fmt: skip
    return Traffic(sessions, max(1, -(-rows // (AGENTS * ROWS))), int(began_s) * 10**9)


async def _written(it: _Contestant, traffic: Traffic) -> Measured:
    """It, filled. Making the batches is not counted; whatever works meanwhile is."""
    measured = Measured(traffic.rows)
    used_s = time.process_time()
    for number in range(traffic.intervals):
        made_s = time.thread_time()
        deliveries = traffic.interval(number)
        used_s += time.thread_time() - made_s
        it.now_ns = traffic.began_ns + (number + 2) * _INTERVAL_NS
        with _timed(measured):
            await it.write(deliveries)
    with _timed(measured):
        await it.finish()
    measured.cpu_s = time.process_time() - used_s
    size_bytes, rows = await it.size_bytes()
    measured.bytes_a_row = size_bytes / rows if rows else 0.0
    files = (path for path in it.directory.rglob("*") if path.is_file())
    measured.all_bytes = sum(path.stat().st_size for path in files)
    return measured


class _timed:  # noqa: N801  a context manager, as a function would be
    """Adds the time of its block to what was measured."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._measured.wall_s += time.perf_counter() - self._began_s


async def _asked(
    measured: Measured,
    ask: Callable[[Question], Awaitable[list[dict[str, Any]]]],
    traffic: Traffic,
) -> list[list[dict[str, Any]]]:
    """The answers to all questions; each is asked once before it is timed."""
    answers = []
    for question in traffic.questions():
        answers.append(await ask(question))
        taken = []
        for _ in range(_ROUNDS):
            began_s = time.perf_counter()
            await ask(question)
            taken.append((time.perf_counter() - began_s) * 1e3)
        measured.ms[question.name] = Samples(taken)
    return answers


def _report(traffic: Traffic, found: Mapping[str, Measured], named: Measured) -> Report:
    questions = [question.name for question in traffic.questions()]
    ours = found[COLONY]
    others = [it for name, it in found.items() if name != COLONY]

    def line(what: str, digits: int, value: Callable[[Measured], float]) -> tuple[str, ...]:
        cells = [f"{value(it):,.{digits}f}" if value(it) else "-" for it in found.values()]
        own = value(ours)
        return (what, *cells, *(times(value(it), own) if own else "-" for it in others))

    rows = [
        line("bytes a raw row", 1, lambda it: it.bytes_a_row),
        line("all files, MB", 0, lambda it: it.all_bytes / 1e6),
        line("rows/s", 0, lambda it: it.rows / it.wall_s),
        line("CPU, µs a row", 2, lambda it: it.cpu_s / it.rows * 1e6),
    ]
    for question in questions:
        of = [it.ms[question] for it in found.values()]
        ratios = [times(it.ms[question].median, ours.ms[question].median) for it in others]
        rows.append((f"{question}, ms", *(it.show(0) for it in of), *ratios))
        by_name = named.ms[question].show(0)
        rows.append(("the same by `coral query`", by_name, *[""] * (2 * len(others))))
    aims = [Aim("CPU to store a row", ours.cpu_s / ours.rows * 1e6, _AIM_CPU_US, " µs")]
    if ours.bytes_a_row:
        aims.append(Aim("sealed", ours.bytes_a_row, _AIM_BYTES, " bytes a row"))
    if reached := [rows for rows in _AIM_SERVICE_MS if traffic.rows >= rows]:
        service_ms, most_ms = ours.ms[questions[0]].median, _AIM_SERVICE_MS[max(reached)]
        aims.append(Aim("a service, of raw rows", service_ms, most_ms, " ms"))
    aims.append(Aim("all services, by name", named.ms[questions[-1]].median, _AIM_ALL_MS, " ms"))
    return Report(
        title=f"Storing {traffic.rows:,} rows of system calls, and asking",
        how=f"{traffic.intervals} intervals of {AGENTS:,} agents with {ROWS} rows each, of "
        f"{simulated.SERVICES} services; CPU of all threads. Each question {_ROUNDS} times: the "
        "median (middle half). From raw rows, all gave the same sums; by name, the colony also "
        "uses its rollups, and says what is missing.",
        columns=("", *found, *(f"{name}: of coral's" for name in found if name != COLONY)),
        rows=rows,
        aims=aims,
        samples={
            f"{name}, {what}, ms": ms.values
            for name, it in {**found, "by name": named}.items()
            for what, ms in it.ms.items()
        },
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS)
    parser.add_argument("--without", action="append", default=[], choices=("sqlite", "parquet"))
    parser.add_argument("--recording", type=Path, help="keep the batches there, or use those there")
    options = parser.parse_args()
    left_out = {"sqlite": SQLITE, "parquet": PARQUET}
    names = [it for it in _CONTESTANTS if it not in {left_out[each] for each in options.without}]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for what, value in kernel.machine().items():
        console.print(f"{what:<7} {value}")
    with exiting(), tempfile.TemporaryDirectory(prefix="coral-bench-") as directory:
        bench = Bench(Path(directory), console, None)
        recording = recorded(bench, options.recording)
        show(asyncio.run(measured(bench, options.rows, names, recording)), console)


if __name__ == "__main__":
    _main()
