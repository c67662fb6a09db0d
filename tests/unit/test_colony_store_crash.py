"""A process that is killed, a disk that is full, a database that gives up: nothing that was
acknowledged is lost, and nothing is stored twice."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from coral.colony.store import (
    HOUR_NS,
    MINUTE_NS,
    Settings,
    Sources,
    State,
    Store,
    StoreError,
    StoreInUseError,
    families,
)
from coral.colony.store.core import Core
from coral.colony.store.database import is_damaged, is_fatal, is_full
from coral.colony.store.lock import DirectoryLock
from coral.colony.tables import ContractRows
from tests.colony_columns_child import failing
from tests.colony_store import BEGIN_NS, TABLE, PlainRows, Sender, minutes, noise
from tests.colony_store_child import settings as child_settings
from tests.scripted import until
from tests.support import ROOT, wait_until


@contextmanager
def child(directory: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that stores, once it has opened DIRECTORY; and the file with what it prints."""
    said = directory.with_name(f"{directory.name}.said")
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.colony_store_child", directory],
            stdout=output,
            cwd=ROOT,
            text=True,
        )
    try:
        wait_until(lambda: "open" in said.read_text() or process.poll() is not None, 60)
        assert process.poll() is None
        yield process, said
    finally:
        process.kill()
        process.wait()


def acknowledged(said: Path) -> Mapping[str, int]:
    """By agent, the last number that was printed in full."""
    found: dict[str, int] = {}
    for line in said.read_text().splitlines(keepends=True):
        agent, _, number = line.partition(" ")
        if number.endswith("\n"):
            found[agent] = int(number)
    return found


def check(directory: Path, at_least: Mapping[str, int]) -> Mapping[str, int]:
    """The books and the rows agree, in every way there is; returns the last numbers."""
    core = Core(directory, child_settings(), PlainRows())
    core.open()
    core.rebuild()
    with core.database.cursor() as cursor:
        cursor.execute("BEGIN TRANSACTION READ ONLY")
        sources = Sources.of(cursor, directory, PlainRows())

        def all_of(table: str) -> pa.Table:
            if table not in sources.tables:
                return pa.table({"time_ns": pa.array([], pa.int64()), "calls": []})
            return cursor.sql(sources.rows(table)).to_arrow_table()

        last = {}
        for standing in core.book.standings():
            agent = standing.session.agent_id
            last[agent] = standing.last_seq
            assert standing.last_seq >= at_least.get(agent, 0)
            assert standing.last_seq == standing.stored + sum(standing.lost.values())
            query = (
                "SELECT count(*), count(DISTINCT number), coalesce(max(number), 0) "
                f"FROM ({sources.rows(TABLE)}) WHERE agent = ?"
            )
            ((rows, distinct, highest),) = cursor.execute(query, [agent]).fetchall()
            assert rows == distinct == standing.stored
            assert highest <= standing.last_seq
            if "losses" in sources.tables:
                losses = f"SELECT coalesce(sum(count), 0) FROM ({sources.rows('losses')}) "
                ((lost,),) = cursor.execute(f"{losses} WHERE agent = ?", [agent]).fetchall()
            else:
                lost = 0
            assert lost == sum(standing.lost.values())
        raw, by_minute = minutes(all_of(TABLE)), minutes(all_of(f"{TABLE}_1m"))
        until_ns = sources.watermark_ns(MINUTE_NS)
        assert by_minute == {it: n for it, n in raw.items() if it * MINUTE_NS < until_ns}
        paths = [it.name for it in (directory / "segments").glob("*/*")]
        assert len(paths) == len(core.catalog.segments)
    core.close()
    return last


def killed_again_and_again(directory: Path, times: int) -> None:
    rng = random.Random()
    stored: Mapping[str, int] = {}
    for _ in range(times):
        with child(directory) as (process, said):
            time.sleep(rng.uniform(0.05, 1.0))  # any moment will do
            process.kill()
            process.wait()
            at_least = {**stored, **acknowledged(said)}
        stored = check(directory, at_least)
    assert sum(stored.values()) > 10 * times


def test_a_store_that_is_killed_has_every_number_once(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path / "data", 3)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_store_that_is_killed_20_times_has_every_number_once(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path / "data", 20)


def stored_and_killed(directory: Path, *arguments: str) -> None:
    """A life of tests.colony_columns_child."""
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.colony_columns_child", directory, *arguments],
        stdout=subprocess.PIPE, cwd=ROOT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdout.readline() == "stored\n"
        process.kill()


async def test_columns_of_a_later_agent_are_in_every_tier_and_old_rows_have_none(
    tmp_path: Path,
) -> None:
    """Each life is killed once its rows are durable; each agent has names that were new then."""
    end_ns = (time.time_ns() // MINUTE_NS - 1) * MINUTE_NS
    for session, *names in (("old", "ETIMEDOUT"), ("new", "ETIMEDOUT", "ENETDOWN")):
        await asyncio.to_thread(stored_and_killed, tmp_path, session, str(end_ns), *names)
    now_ns = end_ns + 3 * HOUR_NS
    settings = Settings(commit_s=0.02, clock_ns=lambda: now_ns)
    store = Store(tmp_path, settings, ContractRows())
    await store.start()
    columns = ("failures_etimedout", "failures_enetdown", "failures_enonet")

    async def rows(table: str, *names: str) -> list[tuple[int | None, ...]]:
        figures = ", ".join(f"sum({name})::BIGINT AS {name}" for name in names)
        query = f"SELECT {figures} FROM ({{}}) GROUP BY session ORDER BY session DESC"
        if table != "tcp_peers":
            query = f"SELECT {figures} FROM ({{}})"
        found = await store.read(lambda it: query.format(it.rows(table)), deadline_s=30)
        return [tuple(row.values()) for row in found.to_pylist()]

    async def are_sealed(*tables: str) -> None:
        def sealed() -> bool:
            return all(list((tmp_path / "segments" / it).glob("*.parquet")) for it in tables)

        await until(sealed)

    await are_sealed("tcp_peers")
    assert await rows("tcp_peers", *columns[:2]) == [(1, None), (1, 1)]
    assert await rows("tcp_peers_1m", *columns[:2]) == [(2, 1)]
    assert await rows("tcp_peers_1h", *columns[:2]) == [(2, 1)]
    # Beside segments that have not the column, in a generation that has it.
    store.put(failing("newest", end_ns, "ENETDOWN", "ENONET"))
    await store.stored()
    assert await rows("tcp_peers", *columns) == [(1, None, None), (0, 1, 1), (1, 1, None)]
    now_ns += 24 * HOUR_NS
    store.put(failing("last", end_ns))
    await store.stored()
    await are_sealed("tcp_peers_1m", "tcp_peers_1h")
    for table in ("tcp_peers_1m", "tcp_peers_1h"):
        assert await rows(table, *columns) == [(2, 2, 1)]
    await store.close()


def test_a_second_process_is_refused_the_directory(tmp_path: Path) -> None:
    with (
        child(tmp_path / "data") as (process, _),
        pytest.raises(StoreInUseError, match=f"process id {process.pid} has this directory open"),
    ):
        DirectoryLock(tmp_path / "data")
    DirectoryLock(tmp_path / "data").release()  # it went with its process


class Disk:
    """A file system of its own, of some size."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, mebibytes: int) -> None:
        """Also while it is in use."""
        options = f"remount,size={mebibytes}m"
        subprocess.run(["mount", "-o", options, self.path], check=True)

    @property
    def filler(self) -> Path:
        """A file that is in the way."""
        return self.path / "filler"

    def fill(self, leave_bytes: int) -> None:
        """Until only so much is left."""
        free = os.statvfs(self.path)
        with self.filler.open("wb") as file:
            file.write(bytes(max(0, free.f_bavail * free.f_frsize - leave_bytes)))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid():
        pytest.skip("only root mounts a file system")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], check=True)
    yield Disk(tmp_path)
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


async def numbers(store: Store) -> list[int]:
    query = "SELECT number FROM ({}) ORDER BY number"
    table = await store.read(lambda it: query.format(it.rows(TABLE)), deadline_s=60)
    return list(table["number"].to_pylist())


def state(store: Store) -> str:
    """As /metrics has it."""
    (found,) = [
        sample.labels["state"]
        for family in families(store.figures)
        for sample in family.samples
        if sample.name == "coral_colony_store_state" and sample.value
    ]
    return found


@pytest.mark.parametrize("count", [2_000, 20_000], ids=["in the log", "row groups"])
async def test_a_disk_that_fills_up_while_storing_loses_nothing(disk: Disk, count: int) -> None:
    settings = Settings(commit_s=0.01, retry_s=0.02, most_retry_s=0.1, queue_bytes=1 << 20)
    store = Store(disk.path / "data", settings, PlainRows())
    await store.start()
    sender = Sender()
    seed = 0
    while store.figures.state is not State.DISK_FULL:
        seed += 1
        assert store.put(sender.next(count, columns=noise(count, seed)))
        await until(lambda: store.figures.queue_items == 0 or state(store) == "disk_full")
    standing = store.standing("a", "c")
    assert standing
    assert standing.last_seq < sender.last_seq
    # It tells, takes more until the queue is full, and answers as before.
    assert "No space left" in store.figures.detail
    failures = store.figures.failures["commit"]
    store.put(sender.next(100))
    await until(lambda: store.figures.failures["commit"] > failures)
    await until(lambda: store.figures.state is State.DISK_FULL)

    disk.resize(64)
    await store.stored()
    standing = store.standing("a", "c")
    assert standing
    assert standing.last_seq == standing.stored == sender.last_seq
    await until(lambda: state(store) == "storing")
    assert await numbers(store) == list(range(1, sender.last_seq + 1))
    await store.close()


async def test_a_disk_that_fills_up_while_sealing_loses_nothing(disk: Disk) -> None:
    settings = Settings(
        commit_s=0.01, retry_s=0.02, most_retry_s=0.1, seal_rows=20_000, memory_bytes=64 << 20
    )
    store = Store(disk.path / "data", settings, PlainRows())
    await store.start()
    sender = Sender()
    for seed in range(4):
        store.put(sender.next(4000, columns=noise(4000, seed)))
    await store.stored()
    disk.fill(900 << 10)
    store.put(sender.next(4000))  # it is full now
    await store.stored()
    store.put(sender.next(1))
    # A transaction that comes while the segment is written fails too, and is tried again first.
    await until(lambda: store.figures.failures["seal"] or store.figures.failures["commit"])
    await until(lambda: state(store) == "disk_full")
    disk.filler.unlink()
    await until(lambda: sum(store.figures.segments.values()) == 1)
    await until(lambda: state(store) == "storing")
    assert await numbers(store) == list(range(1, sender.last_seq + 1))
    await store.close()


def test_a_fatal_error_is_recovered_by_opening_the_database_again(disk: Disk) -> None:
    """DuckDB gives up when it cannot write a checkpoint."""
    core = Core(disk.path / "data", Settings(clock_ns=lambda: BEGIN_NS), PlainRows())
    core.directory.mkdir()
    core.open()
    core.rebuild()
    sender = Sender()
    for seed in range(4):
        core.commit([sender.next(4000, columns=noise(4000, seed))])
    disk.fill(0)
    with pytest.raises(duckdb.Error) as error, core.database.cursor() as cursor:
        cursor.execute("CHECKPOINT")
    assert is_fatal(error.value)
    assert is_full(error.value)
    assert core.must_recover
    with pytest.raises(duckdb.Error) as error:
        core.commit([sender.next(10)])
    assert is_fatal(error.value)
    assert core.has_pending
    disk.filler.unlink()
    core.recover()
    assert not core.must_recover
    core.commit()
    with core.database.cursor() as cursor:
        rows = Sources.of(cursor, core.directory, PlainRows()).rows(TABLE)
        found = cursor.execute(f"SELECT number FROM ({rows}) ORDER BY number").fetchall()
    assert [it for (it,) in found] == list(range(1, sender.last_seq + 1))
    core.close()


def test_a_database_that_cannot_be_opened_again_yet_is_tried_again(disk: Disk) -> None:
    core = Core(disk.path / "data", Settings(clock_ns=lambda: BEGIN_NS), PlainRows())
    core.directory.mkdir()
    core.open()
    core.rebuild()
    sender = Sender()
    core.commit([sender.next(5)])
    hidden = core.database.path.rename(disk.path / "hidden")
    core.database.path.mkdir()
    with pytest.raises(StoreError):
        core.recover()
    assert core.must_recover
    with pytest.raises(StoreError):
        core.commit([sender.next(5)])
    core.database.path.rmdir()
    hidden.rename(core.database.path)
    core.recover()
    core.commit()
    assert core.book.standing(("a", "c")).stored == 10  # type: ignore[union-attr]
    core.close()


def test_words_of_a_caller_say_nothing_of_the_file() -> None:
    words = "Corrupt database file, which has been invalidated"
    with pytest.raises(duckdb.ConversionException, match=words) as error:
        duckdb.execute("SELECT CAST(? AS INTEGER)", [words]).fetchall()
    assert not is_damaged(error.value)
    assert not is_fatal(error.value)
