"""A fleet against agents that follow a script: what real ones seldom do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from coral.client import AgentClient
from coral.colony.delivery import AGENT_LOST, AgentSeen, Delivery, EndedError, SequenceError
from coral.colony.follow.agents import RESTARTED
from coral.colony.follow.discovery.listed import Watched
from coral.colony.follow.fleet import SILENT, Fleet
from coral.colony.follow.follower import ONCE
from coral.colony.follow.gate import Gate
from coral.colony.follow.status import State
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.certificates import put
from tests.colony import CONNECT, Shelf, ended, following, until
from tests.peer import Context, batch, peer

What = pb.CollectorChange


@dataclass
class Scripted:
    """An agent with one session, called `one`, of which BATCHES are there; unless it has ended, it
    goes on."""

    agent_id: str = "scripted"
    batches: list[pb.EbpfEventBatch] = field(default_factory=lambda: [batch(1, 3, (1, 2, 3))])
    refusals: list[grpc.StatusCode] = field(default_factory=list)  # of subscriptions to come
    asked: list[int] = field(default_factory=list)  # after which number
    sessions: tuple[str, ...] = ("one",)
    others: dict[str, Callable[..., Any]] = field(default_factory=dict)  # in place of its own

    @asynccontextmanager
    async def serving(self, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
        own: dict[str, Callable[..., Any]] = {
            "GetCapabilities": self.capabilities,
            "ListCollectors": self.listed,
            "WatchCollectors": self.watch,
            "StreamEventBatches": self.stream,
        }
        async with peer(address, **(own | self.others)) as served:
            yield served

    def infos(self) -> Iterable[pb.CollectorInfo]:
        kind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
        return [pb.CollectorInfo(collector_id=each, kind=kind) for each in self.sessions]

    async def capabilities(self, _request: object, _context: Context) -> pb.EbpfCapabilities:
        return pb.EbpfCapabilities(agent_id=self.agent_id)

    async def listed(self, _request: object, _context: Context) -> pb.ListCollectorsResponse:
        return pb.ListCollectorsResponse(collectors=self.infos())

    async def watch(self, _request: object, _context: Context) -> AsyncIterator[pb.CollectorChange]:
        for info in self.infos():
            yield What(what=What.WHAT_PRESENT, collector=info)
        yield What(what=What.WHAT_SYNCED)
        await asyncio.Event().wait()

    async def stream(
        self, request: pb.EbpfEventStreamRequest, context: Context
    ) -> AsyncIterator[pb.EbpfEventBatch]:
        self.asked.append(request.after_seq)
        if self.refusals:
            await context.abort(self.refusals.pop(0), "not now")
        for message in self.batches:
            if message.last_seq > request.after_seq:
                yield message
        await asyncio.Event().wait()


async def test_a_stream_that_the_agent_gives_up_is_asked_for_again_after_what_came() -> None:
    agent, shelf = Scripted(refusals=[grpc.StatusCode.RESOURCE_EXHAUSTED]), Shelf()
    async with agent.serving() as address, following(shelf, address) as fleet:
        await until(lambda: (found := shelf.of("one")) and found.last_seq == 3)
        assert fleet.statuses[0].state is State.FOLLOWED
        assert fleet.statuses[0].sessions == 1
    assert agent.asked == [0, 0]


async def test_a_session_that_the_agent_does_not_know_ends_as_lost() -> None:
    agent, shelf = Scripted(refusals=[grpc.StatusCode.NOT_FOUND]), Shelf()
    async with agent.serving() as address, following(shelf, address):
        await until(lambda: ended(shelf.of("one")))
    standing = shelf.of("one")
    assert standing
    assert standing.ended
    assert standing.ended.reason == AGENT_LOST


async def test_numbers_that_do_not_add_up_end_a_stream_and_not_the_colony() -> None:
    agent, shelf = Scripted(batches=[batch(1, 3, (1, 2))]), Shelf()
    async with agent.serving() as address, following(shelf, address) as fleet:
        await until(lambda: len(agent.asked) >= 2)
        assert fleet.statuses[0].state is State.FOLLOWED
    assert shelf.standings() == ()


class Strict(Shelf):
    """Has lost a delivery of its own."""

    def put(self, delivery: Delivery) -> None:
        if delivery.after_seq == 0 and delivery.session.key not in self.kept:
            super().put(delivery)
        elif len(self.kept[delivery.session.key]) == 1:
            self.kept[delivery.session.key].append(delivery)
            raise SequenceError("it has only 3", 3)
        else:
            super().put(delivery)


async def test_a_session_is_read_again_from_where_the_sink_has_it() -> None:
    messages = [batch(1, 3, (1, 2, 3)), batch(4, 5, (4, 5))]
    agent, shelf = Scripted(batches=messages), Strict()
    async with agent.serving() as address, following(shelf, address):
        await until(lambda: (found := shelf.of("one")) and found.last_seq == 5)
    assert agent.asked == [0, 3]


@pytest.mark.parametrize("agent_id", ["", "a\nb", "x" * 300])
async def test_an_agent_without_an_id_that_can_be_used_is_refused(agent_id: str) -> None:
    async with (
        Scripted(agent_id).serving() as address,
        following(Shelf(), address) as fleet,
    ):
        (status,) = fleet.statuses
        assert status.state is State.REFUSED
        assert status.why.startswith("the agent says that its id is ")


async def no_message(_request: object, _context: Context) -> bytes:
    return b"\xff"


async def no_change(
    _request: object, _context: Context
) -> AsyncIterator[pb.CollectorChange | bytes]:
    yield What(what=What.WHAT_SYNCED)
    yield b"\xff"


async def not_all(_request: object, _context: Context) -> AsyncIterator[pb.CollectorChange]:
    yield What(what=What.WHAT_PRESENT)
    await asyncio.Event().wait()


async def no_time(_request: object, _context: Context) -> pb.ListCollectorsResponse:
    info = pb.CollectorInfo(collector_id="one")
    info.started_at.seconds = 1 << 62
    return pb.ListCollectorsResponse(collectors=[info])


async def test_whatever_an_agent_sends_costs_no_other_agent_anything() -> None:
    hostile = [
        Scripted("capabilities", others={"GetCapabilities": no_message}),
        Scripted("list", others={"ListCollectors": no_message}),
        Scripted("time", others={"ListCollectors": no_time}),
        Scripted("watch", others={"WatchCollectors": no_change}),
        Scripted("present", others={"WatchCollectors": not_all}),
    ]
    shelf, connect = Shelf(), partial(AgentClient, timeout_s=1, retry=ONCE)
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(it.serving()) for it in hostile]
        good = await stack.enter_async_context(Scripted("good").serving())
        fleet = await stack.enter_async_context(following(shelf, *addresses, good, connect=connect))
        await until(lambda: (found := shelf.standing("good", "one")) and found.last_seq == 3)
        by_address = {it.address: it for it in fleet.statuses}
        expected = [*[State.REFUSED] * 4, State.AWAY, State.FOLLOWED]
        await until(lambda: [by_address[it].state for it in (*addresses, good)] == expected)
        await until(lambda: "did not tell its collectors" in by_address[addresses[4]].why)
        reasons = [by_address[it].why for it in addresses[:4]]
        assert [it.partition(":")[0] for it in reasons] == [
            "what was sent is no EbpfCapabilities",
            "what was sent is no ListCollectorsResponse",
            "started_at",
            "what was sent is no CollectorChange",
        ]


class Breaking(Shelf):
    """Fails at one agent as nobody thought of."""

    def agent_seen(self, agent: AgentSeen) -> None:
        if agent.agent_id == "odd":
            raise ZeroDivisionError
        super().agent_seen(agent)


async def test_what_nobody_thought_of_costs_one_agent_and_the_end_of_a_sink_the_fleet() -> None:
    shelf = Breaking()
    async with (
        Scripted("odd").serving() as odd,
        Scripted().serving() as address,
        following(shelf, odd, address) as fleet,
    ):
        await until(lambda: (found := shelf.standing("scripted", "one")) and found.last_seq == 3)
        states = {it.address: it.state for it in fleet.statuses}
        assert states == {odd: State.REFUSED, address: State.FOLLOWED}

    class Over(Shelf):
        def put(self, delivery: Delivery) -> None:
            raise EndedError(delivery.session.agent_id)

    async with Scripted().serving() as address:
        with pytest.raises(ExceptionGroup) as raised:
            async with following(Over(), address):
                await asyncio.Event().wait()
        assert raised.group_contains(EndedError)


async def test_a_session_without_an_id_that_can_be_used_is_not_followed() -> None:
    agent, shelf = Scripted(sessions=("", "a\0b", "x" * 300, "good")), Shelf()
    async with agent.serving() as address, following(shelf, address):
        await until(lambda: shelf.of("good"))
    assert [it.session.collector_id for it in shelf.standings()] == ["good"]


async def test_more_sessions_than_there_is_room_for_are_not_read() -> None:
    agent, shelf = Scripted(sessions=tuple(map(str, range(300)))), Shelf()
    async with agent.serving() as address, following(shelf, address) as fleet:
        await until(lambda: len(shelf.standings()) == 256)
        assert fleet.statuses[0].sessions == 256


async def test_an_address_that_is_found_no_longer_is_followed_no_longer(tmp_path: Path) -> None:
    path = tmp_path / "agents"
    async with Scripted("a").serving() as first, Scripted("b").serving() as second:
        put(path, f"{first}\n{second}\n".encode())
        fleet = Fleet(Shelf(), [Watched(path)], CONNECT)
        async with fleet.following():
            await until(lambda: len(fleet.statuses) == 2 and fleet.is_settled)
            put(path, f"{second}\n".encode())
            await until(lambda: [it.address for it in fleet.statuses] == [second])
            assert fleet.statuses[0].state is State.FOLLOWED
            agent = fleet.agents.get("a")
            assert agent
            await until(lambda: not agent.followed)


async def test_only_so_many_agents_are_connected_to_at_a_time() -> None:
    gate, together = Gate(3), []

    async def connect() -> None:
        async with gate.passing(failed=False):
            together.append(gate.within)
            await asyncio.sleep(0)

    await asyncio.gather(*(connect() for _ in range(30)))
    assert max(together) == 3


async def test_those_that_failed_do_not_keep_others_waiting() -> None:
    gate = Gate(1)
    async with gate.passing(failed=True):
        async with gate.passing(failed=False):
            assert gate.within == 2
        waiting = asyncio.create_task(gate.passing(failed=True).__aenter__())
        await until(lambda: gate.waiting == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert (gate.within, gate.waiting) == (0, 0)


async def test_an_agent_that_stays_silent_is_given_up_and_goes_on_when_it_returns() -> None:
    agent, shelf = Scripted(), Shelf()
    async with agent.serving() as address, following(shelf, address):
        await until(lambda: (found := shelf.of("one")) and found.last_seq == 3)
    fleet = Fleet(shelf, [], CONNECT, lost_after_s=3600)
    fleet.give_up(time.time_ns())
    assert not ended(shelf.of("one"))
    fleet.give_up(time.time_ns() + 3601 * 10**9)
    standing = shelf.of("one")
    assert standing
    assert standing.ended
    assert (standing.ended.reason, standing.ended.detail) == (AGENT_LOST, SILENT)
    (gap,) = shelf.gaps
    assert (gap.agent_id, gap.why) == ("scripted", SILENT)
    agent.batches.append(batch(4, 6, (4, 5, 6)))
    async with agent.serving() as address, following(shelf, address):
        await until(lambda: (found := shelf.of("one")) and found.last_seq == 6)
    assert not ended(shelf.of("one"))
    assert agent.asked == [0, 3]


async def test_what_an_agent_has_lost_is_told_with_the_time_that_nobody_saw() -> None:
    agent, shelf = Scripted(), Shelf()
    async with agent.serving() as address, following(shelf, address):
        await until(lambda: (found := shelf.of("one")) and found.last_seq == 3)
        heard = shelf.of("one")
    agent.sessions = ("two",)
    async with agent.serving() as address, following(shelf, address):
        await until(lambda: ended(shelf.of("one")))
        await until(lambda: (found := shelf.of("two")) and found.last_seq == 3)
    (gap,) = shelf.gaps
    assert heard
    assert gap.from_ns == heard.updated_ns
    assert gap.why == RESTARTED
    assert shelf.seen["scripted"].connected is False
