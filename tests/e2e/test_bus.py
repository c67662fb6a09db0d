"""Deliveries through a real NATS JetStream: whatever is killed, each event is stored once or
counted as lost once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import nats
import pytest
from nats.js.api import StreamConfig

from coral.colony.bus import subjects
from coral.colony.bus.connection import BusError
from coral.colony.bus.consumer import Consumer
from coral.colony.bus.envelope import TOO_LARGE
from coral.colony.bus.inbox import EVICTED
from coral.colony.bus.publisher import Publisher
from coral.colony.delivery import AgentSeen, Gap, SequenceError
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.bus import NatsServer, Role, Scripted, Shelf, nats_server, settings_for
from tests.programs.bus_side import sessions
from tests.support import PATIENCE

FATES = ["", "", "rate_limit", ""]


@asynccontextmanager
async def reading(consumer: Consumer) -> AsyncIterator[None]:
    """CONSUMER runs for the duration of the block."""
    running = asyncio.create_task(consumer.run())
    try:
        yield
        if running.done():
            running.result()
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def ended(shelf: Shelf, scripted: Sequence[Scripted], timeout_s: float = 60) -> None:
    """Returns when the ends of all sessions are stored."""
    end = time.monotonic() + timeout_s * PATIENCE
    while not all((it := shelf.standing(*one.session.key)) and it.ended for one in scripted):
        assert time.monotonic() < end, shelf.standings()
        await asyncio.sleep(0.02)


def assert_exact(shelf: Shelf, one: Scripted) -> None:
    """Each event of ONE is stored once, in order, or lost once."""
    standing = shelf.standing(*one.session.key)
    assert standing
    assert standing.ended
    assert shelf.rows(*one.session.key) == one.rows
    assert standing.stored == len(one.rows)
    assert standing.lost == one.lost
    assert standing.lost_in_kernel == {"kernel_buffer": 5}
    assert standing.produced == standing.last_seq == one.produced


async def publish(publisher: Publisher, one: Scripted, after_seq: int = 0) -> None:
    for delivery in one.deliveries(after_seq):
        publisher.put(delivery)
        await publisher.room()


async def test_what_is_published_is_stored_once_and_anybody_can_read_it(tmp_path: Path) -> None:
    one = Scripted.make("node 1.example é", "s*1>", FATES * 50)
    gap = Gap("node 2", 1, 2, "away, ü")
    seen = AgentSeen("node 2", "host:1", 5, connected=True, attributes={"zone": "a"})
    with nats_server(tmp_path / "nats") as server:
        settings = settings_for(server.url)
        async with Publisher(settings) as publisher:
            await publish(publisher, one)
            publisher.gap(gap)
            publisher.agent_seen(seen)
            await publisher.stored()
            before = publisher.standing(*one.session.key)
        async with Publisher(settings) as publisher:
            (standing,) = publisher.standings()
            assert standing == publisher.standing(*one.session.key) == before
            assert (standing.stored, standing.lost) == (150, {"rate_limit": 50})
            assert standing.session == one.session
            await publish(publisher, one)  # all of it once more
            await publisher.stored()
            assert publisher.counts.published == 0
        shelf = Shelf(tmp_path / "shelf")
        async with reading(Consumer(settings, shelf)):
            await ended(shelf, [one])
        assert_exact(shelf, one)
        assert (shelf.gaps, shelf.seen) == ([gap], [seen])
        client = await nats.connect(server.url)
        subject = "coral.batches.*.node%201%2Eexample%20%C3%A9.s%2A1%3E"
        message = await client.jetstream().get_msg("CORAL", seq=1, next=True, subject=subject)
        batch = pb.EbpfEventBatch.FromString(message.data or b"")
        assert batch == one.script.messages(0)[0]
        await client.close()


async def test_a_message_that_cannot_be_made_ends_the_publisher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would learn otherwise that its session goes on no more."""
    one = Scripted.make("node", "s", FATES)
    with nats_server(tmp_path / "nats") as server:
        publisher = Publisher(settings_for(server.url))
        await publisher.start()
        nothing: dict[str, str] = {}
        monkeypatch.setattr(publisher._outbox, "headers", lambda _: nothing["headers"])
        publisher.put(next(one.deliveries(0)))
        with pytest.raises(KeyError):
            async with asyncio.timeout(30 * PATIENCE):
                await publisher.run()
        await publisher.close(0.0)


async def test_colonies_share_the_agents(tmp_path: Path) -> None:
    made = [Scripted.make(f"node-{n}", "s", FATES * 5) for n in range(12)]
    with nats_server(tmp_path / "nats") as server:
        async with Publisher(settings_for(server.url)) as publisher:
            for one in made:
                await publish(publisher, one)
            await publisher.stored()
        shelves = [Shelf(tmp_path / f"shelf-{shard}") for shard in range(3)]
        for shard, shelf in enumerate(shelves):
            mine = [it for it in made if subjects.bucket(it.session.agent_id) % 3 == shard]
            consumer = Consumer(settings_for(server.url, shard=shard, shards=3), shelf)
            async with reading(consumer):
                await ended(shelf, mine)
            for one in mine:
                assert_exact(shelf, one)
        assert sum(len(shelf.standings()) for shelf in shelves) == len(made)


async def test_what_the_server_does_not_take_or_drops_is_counted(tmp_path: Path) -> None:
    one = Scripted.make("node", "s", FATES * 100)
    big = Scripted.make("node", "big", [""] * 600, batch=590)
    with nats_server(tmp_path / "nats", most_payload=6_500) as server:
        settings = settings_for(server.url)
        async with Publisher(settings) as publisher:
            await publish(publisher, one)
            await publisher.stored()
            await publish(publisher, big)
            await publisher.stored()
            assert publisher.counts.too_large == 590
        client = await nats.connect(server.url)
        # Of the first half of `one` nothing is left.
        await client.jetstream().purge_stream("CORAL", seq=30)
        await client.close()
        shelf = Shelf(tmp_path / "shelf")
        consumer = Consumer(settings, shelf)
        async with reading(consumer):
            await ended(shelf, [one, big])
        standing = shelf.standing(*big.session.key)
        assert standing
        assert (standing.stored, standing.lost) == (10, {TOO_LARGE: 590})
        standing = shelf.standing(*one.session.key)
        assert standing
        evicted = standing.lost[EVICTED]
        assert evicted == len([n for n in one.rows if n <= 29 * 7])
        assert standing.lost == {**one.lost, EVICTED: evicted}
        assert standing.stored + evicted == len(one.rows)
        assert shelf.rows(*one.session.key) == one.rows[evicted:]
        assert consumer.inbox.lost == {EVICTED: evicted}


async def test_of_two_that_publish_a_session_one_is_told_to_go_on_where_the_stream_ends(
    tmp_path: Path,
) -> None:
    one = Scripted.make("node", "s", FATES * 10, batch=4)
    other = Scripted.make("node", "s", FATES * 10, batch=6)
    with nats_server(tmp_path / "nats") as server:
        settings = settings_for(server.url)
        async with Publisher(settings) as first, Publisher(settings) as second:
            for delivery in [*one.deliveries(0)][:5]:
                first.put(delivery)  # up to event 20
            await first.stored()
            mine = [*other.deliveries(0)]
            for delivery in mine[:4]:
                second.put(delivery)  # up to event 24: some of the fourth are there
                await second.stored()
            with pytest.raises(SequenceError) as refused:
                second.put(mine[4])
            assert refused.value.expected_seq == 20
            await publish(second, other, 20)
            await second.stored()
            assert (second.counts.diverged, second.counts.repeated) == (1, 3)
        shelf = Shelf(tmp_path / "shelf")
        async with reading(Consumer(settings, shelf)):
            await ended(shelf, [one])
        assert_exact(shelf, one)


async def test_a_stream_that_is_lost_is_made_again_and_its_events_are_counted(
    tmp_path: Path,
) -> None:
    one = Scripted.make("node", "s", FATES * 10, batch=4)
    with nats_server(tmp_path / "nats") as server:
        settings = settings_for(server.url)
        shelf = Shelf(tmp_path / "shelf")
        all_of_it = [*one.deliveries(0)]
        async with Publisher(settings) as publisher:
            for delivery in all_of_it[:4]:
                publisher.put(delivery)
            await publisher.stored()
            client = await nats.connect(server.url)
            await client.jetstream().delete_stream("CORAL")
            await client.close()
            for delivery in all_of_it[4:]:
                publisher.put(delivery)
            await publisher.stored()
        async with reading(Consumer(settings, shelf)):
            await ended(shelf, [one])
    standing = shelf.standing(*one.session.key)
    assert standing
    assert standing.lost == {"rate_limit": 10, EVICTED: 12}
    assert standing.stored == 18
    assert standing.last_seq == standing.produced == 40


async def test_a_stream_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as server:
        with pytest.raises(BusError, match=r"insufficient storage .* 1,099,511,627,776 bytes"):
            await Publisher(settings_for(server.url, max_bytes=1 << 40)).start()
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(StreamConfig(name="CORAL", subjects=["orders.>"]))
        await client.close()
        with pytest.raises(BusError, match=r"has not the subjects coral\.>"):
            await Publisher(settings_for(server.url)).start()


@pytest.mark.parametrize(
    ("rounds", "events"), [(1, 400), pytest.param(20, 20_000, marks=pytest.mark.soak)]
)
async def test_all_is_exact_whatever_is_killed(rounds: int, events: int, tmp_path: Path) -> None:
    seed, agents = rounds, 4
    chance = random.Random(seed)
    with nats_server(tmp_path / "nats") as server:
        store = Role("store", server.url, tmp_path / "shelf")
        follow = Role("follow", server.url, seed, agents, events, 0.01)
        try:
            for _ in range(rounds):
                for kill in chance.sample(_KILLS, len(_KILLS)):
                    await asyncio.sleep(chance.uniform(0.1, 0.5))
                    kill(server, follow, store)
            scripted = sessions(seed, agents, events)
            shelf = Shelf(tmp_path / "shelf")
            end = time.monotonic() + 100 * PATIENCE
            while not all(
                (it := shelf.standing(*one.session.key)) and it.ended for one in scripted
            ):
                assert time.monotonic() < end, shelf.standings()
                assert store.status is None
                await asyncio.sleep(0.2)
                shelf = Shelf(tmp_path / "shelf")
        finally:
            follow.kill()
            store.kill()
    for one in scripted:
        assert_exact(shelf, one)


def _kill_server(server: NatsServer, _follow: Role, _store: Role) -> None:
    server.kill()
    server.start()


def _kill_follow(_server: NatsServer, follow: Role, _store: Role) -> None:
    follow.kill_and_start()


def _kill_store(_server: NatsServer, _follow: Role, store: Role) -> None:
    store.kill_and_start()


_KILLS = (_kill_server, _kill_follow, _kill_store)
