"""Streams and watches against a server that speaks the contract by a script, over real gRPC."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from coral.client import (
    Account,
    AgentClient,
    AgentError,
    Batch,
    ContractError,
    EndReason,
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    Retry,
    StreamLostError,
    UnavailableError,
    What,
)
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.peer import Context, Session, batch, cutting_proxy, peer

SOON = Retry(patience_s=5, first_delay_s=0.01, max_delay_s=0.05)
Messages = AsyncIterator[pb.EbpfEventBatch]
CUT = grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/agent.sock"


async def read_all(address: str, **wanted: Any) -> tuple[list[int], Account, Batch]:
    """The numbers of the rows that came, the account at the end, the last batch."""
    numbers: list[int] = []
    async with AgentClient(address, retry=SOON) as agent, agent.subscribe("c", **wanted) as stream:
        async for got in stream:
            numbers += got.events["ended_ns"].tolist()
        return numbers, stream.account, got


async def test_the_block_is_entered_when_the_subscription_stands(address: str) -> None:
    answer = asyncio.Event()

    async def script(_request: Any, context: Context) -> Messages:
        await answer.wait()
        await context.send_initial_metadata(())
        await asyncio.Event().wait()
        yield pb.EbpfEventBatch()

    async with peer(address, StreamEventBatches=script) as at, AgentClient(at) as agent:
        subscription = agent.subscribe("c")
        entering = asyncio.create_task(subscription.__aenter__())
        await asyncio.wait([entering], timeout=0.1)
        assert not entering.done()
        answer.set()
        await entering
        await subscription.__aexit__(None, None, None)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, NotFoundError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitExceededError),
        (grpc.StatusCode.UNIMPLEMENTED, AgentError),
    ],
)
async def test_a_refusal_is_raised_at_the_block(
    address: str, code: grpc.StatusCode, kind: type[AgentError]
) -> None:
    async def script(_request: Any, context: Context) -> Messages:
        await context.abort(code, "because of this")
        yield pb.EbpfEventBatch()

    async with peer(address, StreamEventBatches=script) as at, AgentClient(at) as agent:
        with pytest.raises(AgentError, match="because of this") as refused:
            async with agent.subscribe("c"):
                pytest.fail("the block was entered")
    assert type(refused.value) is kind
    assert refused.value.code is code


async def test_terms_go_to_the_agent_by_keyword_on_top_of_the_message(address: str) -> None:
    asked: list[pb.EbpfEventStreamRequest] = []

    async def script(request: pb.EbpfEventStreamRequest, _context: Context) -> Messages:
        asked.append(request)
        async for message in Session([""] * 9).stream(request, _context):
            yield message

    message = pb.EbpfEventStreamRequest(
        queue_bytes=7, interactive=True, filter=pb.EventFilter(tids=[3])
    )
    async with peer(address, StreamEventBatches=script) as at, AgentClient(at) as agent:
        async with agent.subscribe(
            "c-1", message, after_seq=4, pids=[1, 2], comms=["shop"], syscalls=["read"],
            errors_only=True, min_duration_s=0.25, overflow="end", queue_bytes=100, columns=True,
        ) as stream:  # fmt: skip
            assert sum([got.count async for got in stream]) == 5
        with pytest.raises(InvalidArgumentError, match="overflow: 'drop_all' is not accepted"):
            await agent.subscribe("c", overflow="drop_all").__aenter__()  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="comms: 'shop' is a string; give a list"):
            await agent.subscribe("c", comms="shop").__aenter__()
    assert asked == [
        pb.EbpfEventStreamRequest(
            collector_id="c-1", after_seq=4, overflow=pb.EbpfEventStreamRequest.OVERFLOW_END,
            queue_bytes=100, interactive=True,
            summaries=pb.EbpfEventStreamRequest.SUMMARIES_COLUMNS,
            filter=pb.EventFilter(
                pids=[1, 2], tids=[3], comms=["shop"], syscalls=["read"], errors_only=True,
                min_duration_ns=250_000_000,
            ),
        )
    ]  # fmt: skip


async def test_a_stream_resumes_after_what_was_accounted_for(address: str) -> None:
    chance = random.Random(5)
    fates = chance.choices(["", "filtered", "subscriber_queue"], [8, 3, 1], k=400)
    session = Session(fates, lost_in_kernel=3)

    async def script(request: pb.EbpfEventStreamRequest, context: Context) -> Messages:
        for message in session.messages(request.after_seq)[: chance.randrange(12)]:
            yield message
            if message.HasField("end"):
                return
        await context.abort(CUT, "cut")

    async with peer(address, StreamEventBatches=script) as at:
        numbers, account, last = await read_all(at)
    assert numbers == [n for n, fate in enumerate(fates, 1) if not fate]
    assert len(session.after) > 5
    assert account == Account(
        0, 400, 400, len(numbers), fates.count("filtered"),
        {"subscriber_queue": fates.count("subscriber_queue")}, {"kernel_buffer": 3},
    )  # fmt: skip
    assert last.end
    assert (last.end.reason, last.end.produced) == (EndReason.EXPIRED, 400)


async def test_quiet_renewals_do_not_end_a_stream(address: str) -> None:
    session = Session([""] * 10)

    async def script(request: pb.EbpfEventStreamRequest, context: Context) -> Messages:
        if len(session.after) < 4:
            session.after.append(request.after_seq)
            await context.send_initial_metadata(())
            await context.abort(CUT, "the connection is old")
        for message in session.messages(request.after_seq):
            yield message

    async with peer(address, StreamEventBatches=script) as at:
        numbers, _, _ = await read_all(at)
    assert numbers == list(range(1, 11))
    assert session.after == [0] * 5


async def test_the_end_is_met_after_a_reconnect(address: str) -> None:
    session = Session([""] * 14)

    async def script(request: pb.EbpfEventStreamRequest, context: Context) -> Messages:
        messages = session.messages(request.after_seq)
        if len(session.after) > 1:
            assert [message.HasField("end") for message in messages] == [True]
            yield messages[0]
            return
        for message in messages[:-1]:
            yield message
        await context.abort(CUT, "cut")

    async with peer(address, StreamEventBatches=script) as at:
        numbers, account, last = await read_all(at)
    assert (numbers, session.after) == (list(range(1, 15)), [0, 14])
    assert last.end
    assert account.last_seq == 14


async def never_ending(request: pb.EbpfEventStreamRequest, _context: Context) -> Messages:
    """Seven events, and then only where the stream stands."""
    if not request.after_seq:
        yield batch(1, 7, range(1, 8))
    while True:
        yield batch(8, 7, ())
        await asyncio.sleep(0.01)


async def test_an_agent_that_comes_back_in_time_is_found_and_one_that_does_not_is_an_error(
    address: str,
) -> None:
    patient = Retry(patience_s=30, first_delay_s=0.01, max_delay_s=0.05)
    loop = asyncio.get_running_loop()

    async def until_reconnected() -> None:
        while not stream.reconnects:
            assert (await anext(stream)).count == 0

    async def until_it_fails() -> None:
        async for got in stream:
            assert got.count == 0

    async with AgentClient(address, retry=patient) as agent, AsyncExitStack() as first:
        await first.enter_async_context(peer(address, StreamEventBatches=never_ending))
        async with agent.subscribe("c") as stream:
            assert (await anext(stream)).count == 7
            await first.aclose()
            waiting = asyncio.create_task(until_reconnected())
            await asyncio.wait([waiting], timeout=0.2)
            assert not waiting.done()
            async with peer(address, StreamEventBatches=never_ending):
                await waiting
            assert stream.account.delivered == stream.account.last_seq == 7
    impatient = replace(patient, patience_s=1)
    async with AgentClient(address, retry=impatient) as agent, AsyncExitStack() as first:
        await first.enter_async_context(peer(address, StreamEventBatches=never_ending))
        async with agent.subscribe("c") as stream:
            assert (await anext(stream)).count == 7
            await first.aclose()
            began = loop.time()
            with pytest.raises(UnavailableError, match="gave up after trying to reconnect for 1 s"):
                await until_it_fails()
            assert loop.time() - began >= 1
            assert stream.account.delivered == stream.account.last_seq == 7


async def test_a_restarted_agent_is_told_apart_with_what_was_read(address: str) -> None:
    async def script(request: pb.EbpfEventStreamRequest, context: Context) -> Messages:
        if request.after_seq:
            await context.abort(grpc.StatusCode.NOT_FOUND, "collector_id: 'c' is not known")
        yield batch(1, 7, range(1, 8))
        await context.abort(CUT, "cut")

    async with peer(address, StreamEventBatches=script) as at:
        with pytest.raises(StreamLostError) as lost:
            await read_all(at)
    assert str(lost.value) == (
        "the stream of c cannot be resumed after event number 7: the agent was restarted, or keeps "
        "this session no longer: collector_id: 'c' is not known"
    )
    assert lost.value.account == Account(0, 7, 7, 7, 0)


async def test_events_that_come_again_are_delivered_once(address: str) -> None:
    session = Session([""] * 21)

    async def script(request: pb.EbpfEventStreamRequest, context: Context) -> Messages:
        # Like an agent that does not know `after_seq`.
        for message in session.messages(0)[: 2 if not request.after_seq else None]:
            yield message
        if not request.after_seq:
            await context.abort(CUT, "cut")

    async with peer(address, StreamEventBatches=script) as at:
        numbers, _, _ = await read_all(at)
    assert numbers == list(range(1, 22))


async def test_a_stream_that_does_not_add_up_or_ends_silently_is_an_error(address: str) -> None:
    async def script(request: pb.EbpfEventStreamRequest, _context: Context) -> Messages:
        yield batch(1, 7, range(1, 8))
        if request.collector_id == "adds":
            yield batch(8, 10, [8, 9])

    async with peer(address, StreamEventBatches=script) as at, AgentClient(at) as agent:
        for collector_id, text in (("adds", "9 are accounted for"), ("ends", "did not say why")):
            async with agent.subscribe(collector_id) as stream:
                assert (await anext(stream)).count == 7
                with pytest.raises(ContractError, match=text):
                    await anext(stream)
                assert await anext(stream, None) is None


async def test_a_cancelled_read_loses_nothing(address: str) -> None:
    session = Session([""] * 50, batch=1)

    async def script(request: pb.EbpfEventStreamRequest, _context: Context) -> Messages:
        for message in session.messages(request.after_seq):
            await asyncio.sleep(0.005)
            yield message

    numbers: list[int] = []
    timeouts = 0
    async with (
        peer(address, StreamEventBatches=script) as at,
        AgentClient(at, retry=SOON) as agent,
        agent.subscribe("c") as stream,
    ):
        got: Batch | None = None
        while not (got and got.end):
            try:
                async with asyncio.timeout(0.004 if timeouts < 10 else None):
                    got = await anext(stream)
            except TimeoutError:
                timeouts += 1
                continue
            numbers += got.events["ended_ns"].tolist()
    assert timeouts == 10
    assert numbers == list(range(1, 51))


async def test_streams_over_connections_that_are_cut_have_every_event_once(
    address: str,
) -> None:
    chance = random.Random(11)
    many = [
        Session(chance.choices(["", "filtered", "rate_limit"], [8, 3, 1], k=1_000), batch=20)
        for _ in range(20)
    ]

    async def script(request: pb.EbpfEventStreamRequest, _context: Context) -> Messages:
        for message in many[int(request.collector_id)].messages(request.after_seq):
            await asyncio.sleep(0.01)
            yield message

    async def one(proxy: str, number: int) -> int:
        got: list[int] = []
        async with AgentClient(proxy) as agent, agent.subscribe(str(number)) as stream:
            async for each in stream:
                got += each.events["ended_ns"].tolist()
        account, fates = stream.account, many[number].fates
        expected = Counter(fates)
        assert got == [n for n, fate in enumerate(fates, 1) if not fate]
        assert account.filtered == expected["filtered"]
        assert account.lost == {"rate_limit": expected["rate_limit"]}
        return stream.reconnects

    async with (
        peer(address, StreamEventBatches=script) as at,
        cutting_proxy(at, 3, (0.02, 0.3)) as proxy,
    ):
        reconnects = await asyncio.gather(*(one(proxy, n) for n in range(20)))
    print(f"{sum(reconnects)} reconnects over 20 streams")
    assert sum(reconnects) > 20


def collector(name: str) -> pb.CollectorInfo:
    return pb.CollectorInfo(collector_id=name, kind=pb.EBPF_COLLECTOR_KIND_TCP_METRICS)


async def test_a_watch_begins_anew_after_a_broken_connection_and_says_so(address: str) -> None:
    calls = 0

    async def script(_request: Any, context: Context) -> AsyncIterator[pb.CollectorChange]:
        nonlocal calls
        calls += 1
        for name in ("a", "b")[: 3 - calls]:
            yield pb.CollectorChange(
                what=pb.CollectorChange.WHAT_PRESENT, collector=collector(name)
            )
        yield pb.CollectorChange(what=pb.CollectorChange.WHAT_SYNCED)
        yield pb.CollectorChange(what=99)  # type: ignore[arg-type]
        if calls == 1:
            await context.abort(CUT, "cut")
        if calls == 2:
            return  # as an agent that shuts down, and that another one follows
        ended = collector("a")
        ended.end.reason = pb.SessionEnd.REASON_FAILED
        yield pb.CollectorChange(what=pb.CollectorChange.WHAT_ENDED, collector=ended)

    async with (
        peer(address, WatchCollectors=script) as at,
        AgentClient(at, retry=SOON) as agent,
        agent.watch() as changes,
    ):
        seen = [await anext(changes) for _ in range(9)]
    assert [(c.what, c.collector and c.collector.collector_id) for c in seen] == [
        (What.PRESENT, "a"), (What.PRESENT, "b"), (What.SYNCED, None),
        (What.RECONNECTED, None),
        (What.PRESENT, "a"), (What.SYNCED, None),
        (What.RECONNECTED, None),
        (What.SYNCED, None), (What.ENDED, "a"),
    ]  # fmt: skip
    assert seen[-1].collector
    assert str(seen[-1].collector.kind) == "tcp_metrics"
    assert seen[-1].collector.end
    assert seen[-1].collector.end.reason is EndReason.FAILED


async def test_clients_of_one_process_have_connections_of_their_own() -> None:
    peers: set[str] = set()

    async def script(_request: Any, context: Context) -> pb.ListCollectorsResponse:
        peers.add(context.peer())
        return pb.ListCollectorsResponse(collectors=[collector("a")])

    async with peer("127.0.0.1:0", ListCollectors=script) as at:
        for _ in range(3):
            async with AgentClient(at) as one, AgentClient(at) as other:
                assert [it.collector_id for it in await one.collectors()] == ["a"]
                assert len(await other.collectors()) == 1
    assert len(peers) == 6
