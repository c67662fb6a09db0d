"""Which session's batches Prometheus counts, and that starts, ends and sessions at work agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from coral.agent.caller import Caller
from coral.agent.config import Continuous
from coral.agent.errors import LimitError
from coral.agent.sessions.admission import Admitted
from coral.agent.sessions.session import Session, StartRequest
from coral.agent.sessions.supervisor import Supervisor
from coral.bpf import BpfError
from coral.collectors.contract import Batch, Coverage, Measures
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.scripted import STATS, STOPPED, Desk, Scripted, admitted, calls, until


class Recorded(Measures):
    """What was counted: by service, how many events."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def observe(self, service: str, batch: Batch) -> None:
        self.seen.append((service, len(batch.rows)))

    def collect(self) -> Iterator[Any]:
        yield from ()


class Watching(Scripted):
    """A scripted collector with a target and a coverage of its own."""

    watches: tuple[str, ...] = ("pid", "1")
    covers = Coverage.WHOLE

    @property
    def target(self) -> tuple[str, ...]:
        return self.watches

    @property
    def coverage(self) -> Coverage:
        return self.covers


@pytest.fixture
def desk() -> Desk:
    desk = Desk()
    desk.supervisor._feed.measures[STATS] = Recorded()
    return desk


async def begin(
    supervisor: Supervisor,
    target: str = "1",
    covers: Coverage = Coverage.WHOLE,
    *,
    continuous: bool = False,
) -> tuple[Session, Scripted]:
    """A session labelled `shop` that watches TARGET."""
    collector = Watching(last=calls(0))
    collector.watches, collector.covers = ("pid", target), covers

    async def create(_type: object, request: StartRequest, caller: Caller) -> Admitted:
        return admitted(collector, request, caller)

    supervisor._admission.create = create  # type: ignore[method-assign,assignment]
    request = StartRequest("syscall_stats", "shop", continuous=continuous)
    return await supervisor.start(request), collector


def seen(supervisor: Supervisor) -> Sequence[tuple[str, int]]:
    measures = supervisor.measures[STATS]
    assert isinstance(measures, Recorded)
    return measures.seen


async def test_of_two_that_watch_the_same_one_feeds_and_the_other_takes_over(desk: Desk) -> None:
    async with desk.supervisor as supervisor:
        first, first_collector = await begin(supervisor)
        _, second_collector = await begin(supervisor)
        await first_collector.emit(calls(1))
        await second_collector.emit(calls(2))
        assert seen(supervisor) == [("shop", 1)]
        await first.stop(STOPPED)
        await second_collector.emit(calls(3))
        assert seen(supervisor) == [("shop", 1), ("shop", 3)]


async def test_two_targets_under_one_label_are_both_in_it(desk: Desk) -> None:
    async with desk.supervisor as supervisor:
        _, one = await begin(supervisor, "1")
        _, other = await begin(supervisor, "2")
        await one.emit(calls(1))
        await other.emit(calls(2))
        assert seen(supervisor) == [("shop", 1), ("shop", 2)]


async def test_a_fitter_session_takes_the_feed_and_gives_it_back(desk: Desk) -> None:
    """Each of these is fitter than all before it."""
    async with desk.supervisor as supervisor:
        sessions = [
            await begin(supervisor, covers=Coverage.NONE),
            await begin(supervisor, covers=Coverage.PART),
            await begin(supervisor, covers=Coverage.PART, continuous=True),
            await begin(supervisor, covers=Coverage.WHOLE),
            await begin(supervisor, covers=Coverage.WHOLE, continuous=True),
        ]
        expected = []
        for last in range(len(sessions) - 1, -1, -1):
            for number, (_, collector) in enumerate(sessions[: last + 1]):
                await collector.emit(calls(number + 1))
            expected += [("shop", last + 1)] if last else []
            assert seen(supervisor) == expected
            await sessions[last][0].stop(STOPPED)
        assert not supervisor._feed._candidates
        assert not supervisor._feed._what


async def test_started_less_ended_is_what_is_at_work_whatever_fails(desk: Desk) -> None:
    def balance() -> tuple[int, int]:
        totals = desk.supervisor.totals
        return totals.started[STATS], sum(totals.ended.values())

    async with desk.supervisor as supervisor:
        with pytest.raises(BpfError):
            await desk.start(failure=BpfError("attaching"))
        with pytest.raises(LimitError):
            await desk.start(map_bytes=1 << 40)
        assert balance() == (0, 0)
        session = await desk.start()
        assert (*balance(), len(supervisor.at_work())) == (1, 0, 1)
        await session.stop(STOPPED)
        assert (*balance(), len(supervisor.at_work())) == (1, 1, 0)
        await desk.start(0.01)
        await until(lambda: not supervisor.sessions)
        assert balance() == (2, 2)
        await desk.start()
    assert balance() == (3, 3)


async def test_what_a_continuous_collector_waits_for_is_a_word_and_a_text() -> None:
    desk = Desk(None, Continuous(kind="syscall_stats", service="shop"))
    desk.script = {"refusal": LimitError("limits.memory is 1 byte")}
    async with desk.supervisor as supervisor:
        (standing,) = supervisor.continuous
        assert standing.waits.reason == "starting"
        await until(lambda: standing.failures)
        assert standing.waits == ("limit", "limits.memory is 1 byte")
        assert str(standing) == "syscall_stats shop: limits.memory is 1 byte"
        desk.script = {}
        await until(lambda: not standing.waits.reason)
        assert str(standing) == "syscall_stats shop: at work"
        (session,) = supervisor.at_work()
        await session.stop(STOPPED)
        await until(lambda: standing.waits.reason == "stopped")
        assert session.end
        assert session.end.reason == pb.SessionEnd.REASON_STOPPED
