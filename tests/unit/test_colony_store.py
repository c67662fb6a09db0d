"""The store on the loop: what is put is durable and read again, once."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pyarrow as pa
import pytest

from coral.colony.delivery import AGENT_LOST, AgentSeen, Ended, Gap, SequenceError
from coral.colony.store import (
    Settings,
    State,
    Store,
    StoreInUseError,
    families,
)
from coral.colony.store.book import LEDGER_SCHEMA, Entry, entries_of, ledger_lines
from coral.colony.store.errors import StoreEndedError, StoreError
from tests.colony_store import BEGIN_NS, SECOND_NS, TABLE, PlainRows, Sender, noise


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path, Settings(commit_s=0.02), PlainRows())
    await store.start()
    yield store
    await store.close()


async def numbers(store: Store) -> list[int]:
    """Of all rows."""
    query = "SELECT number FROM ({}) ORDER BY number"
    table = await store.read(lambda it: query.format(it.rows(TABLE)), deadline_s=30)
    return list(table["number"].to_pylist())


async def test_what_was_put_is_read_again_and_its_standing_says_so(store: Store) -> None:
    sender = Sender()
    assert store.standing("a", "c") is None
    assert await numbers(store) == []
    assert store.put(sender.next(3, lost={"map_full": 2}, lost_in_kernel={"kernel_buffer": 7}))
    assert store.put(sender.next(4, BEGIN_NS + SECOND_NS, lost_in_kernel={"kernel_buffer": 9}))
    assert store.expected_seq("a", "c") == 9
    await store.stored()
    assert await numbers(store) == [1, 2, 3, 6, 7, 8, 9]
    standing = store.standing("a", "c")
    assert standing
    assert (standing.last_seq, standing.stored, standing.produced) == (9, 7, 9)
    assert standing.lost == {"map_full": 2}
    assert standing.lost_in_kernel == {"kernel_buffer": 9}
    assert standing.updated_ns == BEGIN_NS + SECOND_NS
    losses = await store.read(lambda it: it.rows("losses"), deadline_s=30)
    assert [
        (it["stage"], it["in_kernel"], it["count"], it["time_from_ns"], it["time_to_ns"])
        for it in losses.sort_by([("time_ns", "ascending"), ("stage", "descending")]).to_pylist()
    ] == [
        ("map_full", False, 2, BEGIN_NS, BEGIN_NS),
        ("kernel_buffer", True, 7, BEGIN_NS, BEGIN_NS),
        ("kernel_buffer", True, 2, BEGIN_NS, BEGIN_NS + SECOND_NS),
    ]


async def test_what_comes_again_is_not_stored_twice_and_a_gap_is_refused(store: Store) -> None:
    sender = Sender()
    first, second, third = sender.next(3), sender.next(3), sender.next(3)
    assert store.put(first)
    assert not store.put(first)
    with pytest.raises(SequenceError, match="goes on after event 6, and the store has 3") as error:
        store.put(third)
    assert error.value.expected_seq == 3
    assert store.put(second)
    await store.stored()
    assert not store.put(second)
    assert store.put(third)
    await store.stored()
    assert await numbers(store) == list(range(1, 10))
    assert store.figures.repeated == 2


async def test_figures_that_do_not_add_up_are_refused(store: Store) -> None:
    sender = Sender()
    sender.last_seq = 5
    delivery = sender.next(3)
    sender.last_seq = 0
    with pytest.raises(ValueError, match="events 1 to 8 are not 3 rows"):
        store.put(type(delivery)(delivery.session, delivery.batch, 0, 8, 8, BEGIN_NS, 100))


async def test_rows_that_cannot_be_read_are_their_sessions_loss(store: Store) -> None:
    good, bad = Sender("good"), Sender("bad")
    broken = bad.next(3, columns={"number": [object()] * 3})
    store.put(good.next(2))
    store.put(broken)
    store.put(bad.next(2))
    await store.stored()
    standing = store.standing("bad", "c")
    assert standing
    assert (standing.last_seq, standing.stored, standing.lost) == (5, 2, {"unreadable": 3})
    assert await numbers(store) == [1, 2, 4, 5]


async def test_everything_is_there_after_the_store_was_closed(tmp_path: Path) -> None:
    sender = Sender()
    store = Store(tmp_path, Settings(), PlainRows())
    await store.start()
    store.put(sender.next(5))
    ended = Ended(AGENT_LOST, "the agent died", BEGIN_NS)
    store.put(sender.next(0, lost={AGENT_LOST: 3}, ended=ended))
    seen = AgentSeen("a", "10.0.0.1:9001", BEGIN_NS, connected=True, attributes={"zone": "x"})
    store.agent_seen(seen)
    store.gap(Gap("a", BEGIN_NS, BEGIN_NS + 1, "refused"))
    assert await store.close()
    assert store.figures.state is State.CLOSED

    store = Store(tmp_path, Settings(commit_s=0.02), PlainRows())
    await store.start()
    standing = store.standing("a", "c")
    assert standing
    assert standing.session == sender.session
    assert (standing.last_seq, standing.stored, standing.ended) == (8, 5, ended)
    assert await numbers(store) == [1, 2, 3, 4, 5]
    # A gap that goes on, an agent that is seen again.
    store.gap(Gap("a", BEGIN_NS, BEGIN_NS + 9, "refused"))
    store.agent_seen(AgentSeen("a", "10.0.0.2:9001", BEGIN_NS + 5, connected=False, detail="gone"))
    await store.stored()
    gaps = await store.read(lambda it: it.rows("gaps"), deadline_s=30)
    assert [tuple(it.values()) for it in gaps.to_pylist()] == [
        (BEGIN_NS, BEGIN_NS + 9, "a", "refused")
    ]
    (agent,) = (await store.read(lambda it: it.rows("agents"), deadline_s=30)).to_pylist()
    assert agent["address"] == "10.0.0.2:9001"
    assert (agent["first_seen_ns"], agent["last_seen_ns"]) == (BEGIN_NS, BEGIN_NS + 5)
    assert not agent["connected"]
    await store.close()


async def test_a_hot_file_that_is_damaged_anywhere_is_moved_aside_by_the_next_start_at_the_latest(
    tmp_path: Path,
) -> None:
    whole = Store(tmp_path / "whole", Settings(), PlainRows())
    await whole.start()
    whole.put(Sender().next(10_000, columns=noise(10_000, 1)))
    await whole.close()
    content = (tmp_path / "whole/hot.duckdb").read_bytes()
    places = [4096, *range(3 * 4096 + 100, len(content), 1 << 18)]  # DuckDB's blocks
    assert len(places) > 5
    ended, moved = 0, 0
    for place in places:
        directory = tmp_path / str(place)
        directory.mkdir()
        damaged = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        (directory / "hot.duckdb").write_bytes(damaged)
        for _ in range(2):
            store = Store(directory, Settings(commit_s=0.02), PlainRows())
            await store.start()
            moved += store.figures.moved_aside != ""
            try:
                store.put(Sender("new").next(3))
                await store.stored()
                await numbers(store)
            except StoreError:
                with pytest.raises(StoreEndedError, match="the hot file is damaged"):
                    await store.run()
                ended += 1
            else:
                break
            finally:
                await store.close()
        else:
            pytest.fail(f"damaged at {place}, it cannot be opened")
    assert moved >= ended > 0


async def test_a_store_ends_when_its_file_is_taken_away(tmp_path: Path, store: Store) -> None:
    (tmp_path / "hot.duckdb").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreEndedError, match=r"hot\.duckdb was removed or replaced"):
        async with asyncio.timeout(30):
            await store.run()


@pytest.mark.parametrize("name", ["lock", "hot.duckdb"])
async def test_no_link_is_followed_and_no_fifo_waited_for(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    data = tmp_path / "data"
    data.mkdir()
    if name == "lock":
        (data / name).symlink_to(victim)
    else:
        os.mkfifo(data / name)
    with pytest.raises((OSError, StoreError), match=name):
        await Store(data, Settings(), PlainRows()).start()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(("named", "number"), [("1", 1), ("-5", -5), ("900", 900), ("newer", 0)])
def test_a_ledger_with_kinds_that_the_contract_has_not_is_read(named: str, number: int) -> None:
    session = Sender().session
    lines = ledger_lines([Entry(1, session)]).to_pylist()
    (entry,) = entries_of(pa.Table.from_pylist([{**lines[0], "kind": named}], LEDGER_SCHEMA))
    assert (entry.session.kind, entry.session.key) == (number, session.key)


async def test_a_second_store_of_a_directory_is_refused(store: Store) -> None:
    with pytest.raises(StoreInUseError, match=r"process id \d+ has this directory open"):
        await Store(store.directory, Settings(), PlainRows()).start()
    store.put(Sender().next(1))
    await store.stored()


async def test_one_snapshot_sees_one_commit(store: Store) -> None:
    sender = Sender()
    store.put(sender.next(3))
    await store.stored()
    seen, go_on = threading.Event(), threading.Event()

    def work(cursor: object, sources: object) -> tuple[int, int]:
        query = f"SELECT count(*) FROM ({sources.rows(TABLE)})"  # type: ignore[attr-defined]
        before = cursor.execute(query).fetchone()[0]  # type: ignore[attr-defined]
        seen.set()
        assert go_on.wait(30)
        return before, cursor.execute(query).fetchone()[0]  # type: ignore[attr-defined]

    snapshot = asyncio.create_task(store.snapshot(work, deadline_s=60))
    await asyncio.to_thread(seen.wait, 30)
    store.put(sender.next(3))
    await store.stored()
    go_on.set()
    assert await snapshot == (3, 3)
    assert len(await numbers(store)) == 6


async def test_a_reading_ends_at_its_deadline_and_frees_its_place(tmp_path: Path) -> None:
    store = Store(tmp_path, Settings(commit_s=0.02, readers=1), PlainRows())
    await store.start()
    for_ever = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range = 7"
    with pytest.raises(TimeoutError):
        await store.read(lambda _: for_ever, deadline_s=0.1)
    task = asyncio.create_task(store.read(lambda _: for_ever, deadline_s=60))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await store.read(lambda _: "SELECT 7 AS n", deadline_s=30))["n"].to_pylist() == [7]
    assert store.figures.readers == 0
    await store.close()


async def test_followers_wait_for_room_until_something_is_stored(tmp_path: Path) -> None:
    store = Store(tmp_path, Settings(commit_s=600, queue_bytes=10_000), PlainRows())
    await store.start()
    sender = Sender()
    store.put(sender.next(1))
    await store.stored()  # the first transaction comes at once, the next one after commit_s
    store.put(sender.next(100))
    await store.room()
    store.put(sender.next(100))
    waiting = [asyncio.create_task(store.room()) for _ in range(3)]
    await asyncio.sleep(0)  # each has looked, and a commit's news comes in a later turn at best
    assert not any(task.done() for task in waiting)
    await store.stored()
    await asyncio.wait_for(asyncio.gather(*waiting), 30)
    assert await store.close()


async def test_figures_become_metrics(store: Store) -> None:
    store.put(Sender().next(3))
    await store.stored()
    samples = {
        (it.name, *it.labels.values()): it.value
        for family in families(store.figures)
        for it in family.samples
    }
    assert samples["coral_colony_store_rows_total", TABLE] == 3
    assert samples["coral_colony_store_queue_items",] == 0
    assert samples["coral_colony_store_queue_bytes",] == 0
    assert samples["coral_colony_store_commit_duration_seconds_count",] >= 1
