"""SQL of strangers: what is refused, what ends within its limits, and that the colony lives on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
import pytest_asyncio

from coral.colony.answers.refusals import BusyError, RefusedError
from coral.colony.answers.sql.frames import NEEDS, frame, packed
from coral.colony.answers.sql.hot import Shipment, ship
from coral.colony.answers.sql.pool import Finished, Limits, Pool, Ship, _conversation, _Worker
from coral.colony.answers.window import Window
from tests.colony_tables import Sealed

ASYNC = pytest.mark.asyncio(loop_scope="module")

SHORT_S = 0.5
LIMITS = Limits(deadline_s=30.0, memory_bytes=64 << 20, most_rows=1000)


@pytest.fixture
def sources(tmp_path: Path) -> Sealed:
    return Sealed(tmp_path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(LIMITS)
    yield pool
    await pool.close()


def shipping(sources: Sealed, window: Window | None = None) -> Ship:
    async def shipped(tables: Sequence[str], words: Sequence[str] | None) -> Shipment:
        return ship(sources.cursor(), sources, tables, words, window)

    return shipped


async def ask(
    pool: Pool,
    sources: Sealed,
    sql: str,
    window: Window | None = None,
    deadline_s: float = LIMITS.deadline_s,
) -> pa.Table:
    parts: list[bytes] = []
    shipped = shipping(sources, window)
    answer = pool.answer(sql, shipped, most_rows=LIMITS.most_rows, deadline_s=deadline_s)
    async with aclosing(answer):
        async for part in answer:
            if isinstance(part, Finished):
                break
            parts.append(part)
    return pa.ipc.open_stream(b"".join(parts)).read_all()


@ASYNC
async def test_hot_rows_and_segments_are_one_table(pool: Pool, sources: Sealed) -> None:
    sql = "SELECT service, count(*) AS n, sum(calls) AS calls FROM calls GROUP BY 1 ORDER BY 1"
    table = await ask(pool, sources, sql)
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("s0", 100, sum(range(0, 200, 2))),
        ("s1", 100, sum(range(1, 200, 2))),
    ]
    for sql in ("SELECT * FROM calls", "FROM calls", "SELECT calls FROM calls", "TABLE calls"):
        assert (await ask(pool, sources, sql)).num_rows == 200
    whole_row = (await ask(pool, sources, "SELECT c FROM calls c LIMIT 1")).to_pylist()
    assert set(whole_row[0]["c"]) == {"time_ns", "service", "calls"}
    word = await ask(pool, sources, "SELECT 'a'::ENUM('a', 'b') AS e")  # a dictionary in Arrow
    assert word.to_pylist() == [{"e": "a"}]
    books = await ask(pool, sources, "SELECT count(*) FROM ledger, gaps")
    assert books.to_pylist() == [{"count_star()": 0}]


@ASYNC
async def test_a_window_holds_for_hot_rows_and_segments(pool: Pool, sources: Sealed) -> None:
    table = await ask(pool, sources, "SELECT count(*) AS n FROM calls", Window(90, 110))
    assert table.to_pylist() == [{"n": 20}]


def test_rows_that_nobody_gets_are_no_open_file(sources: Sealed) -> None:
    """Such as those for a caller that left while they were made."""
    left = ship(sources.cursor(), sources, ["calls"], None, None)
    (fd,) = left.fds
    assert os.fstat(fd).st_size
    del left
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    shipment = ship(sources.cursor(), sources, ["calls"], None, None)
    shipment.close()
    with Path(os.devnull).open("rb") as other:  # most likely by the same number
        shipment.close()
        assert os.fstat(other.fileno())


async def test_a_worker_gets_tables_once(sources: Sealed) -> None:
    """One that asks again would be sent the numbers of files that are others' by now."""
    made: list[Shipment] = []
    there, line = socket.socketpair()
    line.setblocking(False)

    async def shipped(tables: Sequence[str], words: Sequence[str] | None) -> Shipment:
        made.append(ship(sources.cursor(), sources, tables, words, None))
        return made[0]

    with there, line:
        there.sendall(2 * frame(NEEDS, packed({"tables": ["calls"], "words": None})))
        with pytest.raises(EOFError):
            async for _ in _conversation(_Worker(cast("Any", None), line), shipped, 1e12, 1.0):
                pass
    assert len(made) == 1


ENDED = {
    "a cross join for ever": (
        "SELECT count(*) FROM range(9999) a, range(9999) b, range(9999) c WHERE a.range > b.range",
        "it took longer than 0.5 s",
    ),
    "an infinite recursion": (
        "WITH RECURSIVE t AS (SELECT 1 AS a UNION ALL SELECT 1 FROM t) SELECT count(*) FROM t",
        "it took longer than 0.5 s|more memory than",
    ),
    "one that keeps its rows": (
        "WITH RECURSIVE t AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM t) FROM t ORDER BY a DESC",
        "it took longer than 0.5 s|more memory than",
    ),
    "a list in memory": ("SELECT list(range) FROM range(1000000000)", "longer|more memory than"),
    "a long text": ("SELECT length(repeat('x', 4000000000))", "more memory than|longer"),
    "depth": (f"SELECT {'(' * 20000}1{')' * 20000}", "syntax error|depth|memory"),
}


@ASYNC
async def test_refusals_come_in_the_users_words(pool: Pool, sources: Sealed) -> None:
    for sql, why in (
        ("COPY calls TO '/tmp/x.csv'", "sql: give one SELECT statement, and nothing else"),
        ("SELECT * FROM read_text('/etc/hostname')", "sql: Permission Error"),
        ("SELECT * FROM call", "sql: no such table: 'call'; did you mean calls"),
    ):
        with pytest.raises(RefusedError, match=why):
            await ask(pool, sources, sql)


@ASYNC
@pytest.mark.parametrize("name", ENDED)
async def test_it_ends_within_its_limits(pool: Pool, sources: Sealed, name: str) -> None:
    sql, why = ENDED[name]
    with pytest.raises(RefusedError, match=f"(?i)^sql: .*({why})"):
        await ask(pool, sources, sql, deadline_s=SHORT_S)
    assert (await ask(pool, sources, "SELECT 7 AS n")).to_pylist() == [{"n": 7}]


@ASYNC
async def test_rows_beyond_the_limit_are_cut(pool: Pool, sources: Sealed) -> None:
    shipped = shipping(sources)
    answer = pool.answer("SELECT * FROM range(5000)", shipped, most_rows=1000, deadline_s=30.0)
    *parts, end = [part async for part in answer]
    assert end == Finished(rows=1000, cut=True)
    assert (
        pa.ipc.open_stream(b"".join(p for p in parts if isinstance(p, bytes))).read_all().num_rows
        == 1000
    )


def test_the_kernel_is_the_second_wall(tmp_path: Path) -> None:
    """What a worker gives up, whatever DuckDB would let it do."""
    allowed = tmp_path / "segment.parquet"
    allowed.write_text("rows")
    script = f"""
import os, pathlib, resource, socket
from coral.colony.answers.sql.sandbox import confine, limit
limit(64 << 20, 30)
allowed = pathlib.Path({str(allowed)!r})
has_landlock = confine([str(allowed)])
print(has_landlock, allowed.read_text())
def refused(what):
    try:
        what()
    except (OSError, MemoryError) as error:
        return type(error).__name__
print(refused(lambda: open("/etc/hostname").read()) if has_landlock else "PermissionError")
print(refused(lambda: allowed.write_text("x")) if has_landlock else "PermissionError")
print(refused(lambda: bytes(256 << 20)))
print(resource.getrlimit(resource.RLIMIT_FSIZE))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
    )
    told, *lines = done.stdout.splitlines()
    assert told.endswith(" rows")
    assert lines == ["PermissionError", "PermissionError", "MemoryError", "(0, 0)"]


@ASYNC
async def test_one_caller_leaves_a_place_to_others(pool: Pool, sources: Sealed) -> None:
    def asked(caller: str) -> AsyncGenerator[bytes | Finished, None]:
        shipped = shipping(sources)
        return pool.answer("SELECT 1", shipped, most_rows=1, deadline_s=30.0, caller=caller)

    async with aclosing(asked("a")) as first, aclosing(asked("b")) as other:
        await anext(first)
        with pytest.raises(
            BusyError, match="1 of the 2 places have SQL statements of a, and the rest"
        ):
            await anext(asked("a"))
        await anext(other)
    async with aclosing(asked("a")) as again:
        await anext(again)
