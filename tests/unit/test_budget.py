"""The budget: what is charged to a session, and which session goes; without a kernel or a loop."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import astuple
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.agent.config import ByteCount, Limits
from coral.agent.machine.program_stats import ProgramUse, Window
from coral.agent.sessions.budget import (
    RELIEF,
    Candidate,
    Needs,
    Priority,
    Room,
    cpu_excess,
    first_to_go,
)
from coral.agent.sessions.costs import CPU_WINDOW_S, Costs, CpuUse
from coral.bpf import ProgramStats
from coral.collectors.metering import metered
from coral.collectors.runner import in_thread

CONTINUOUS, ON_DEMAND, WATCHED = Priority
LIMITS = Limits(cpu_percent=50, continuous_cpu_percent=5, memory=ByteCount(1000))


def sessions(*used: tuple[Priority, float]) -> list[Candidate[int]]:
    """Candidates that are numbered in this order."""
    return [Candidate(number, *each) for number, each in enumerate(used)]


# Which session goes


@pytest.mark.parametrize(
    ("used", "limit", "goes"),
    [
        ([], 5, None),
        ([(CONTINUOUS, 2), (ON_DEMAND, 3)], 5, None),
        # The expensive one, not the cheap one that matters least: it would go in vain.
        ([(CONTINUOUS, 0.5), (ON_DEMAND, 15)], 5, 1),
        ([(CONTINUOUS, 0.5), (ON_DEMAND, 4), (WATCHED, 15)], 5, 2),
        # The one that matters least, where that suffices, however cheap.
        ([(CONTINUOUS, 2), (ON_DEMAND, 4)], 5, 0),
        ([(WATCHED, 4), (ON_DEMAND, 2), (CONTINUOUS, 2)], 7.5, 2),
        # A cheap one is no relief from the growth of another.
        ([(CONTINUOUS, 0.5), (ON_DEMAND, 4.6)], 5, 1),
        ([(CONTINUOUS, 1.2), (ON_DEMAND, 4)], 5, 0),
        ([(WATCHED, 30), (ON_DEMAND, 20)], 40, 1),
        ([(WATCHED, 30), (ON_DEMAND, 20)], 36, 0),
        # The most expensive one of a priority, in any order.
        ([(ON_DEMAND, 1), (ON_DEMAND, 9), (ON_DEMAND, 3)], 10, 1),
        ([(CONTINUOUS, 2), (CONTINUOUS, 3), (ON_DEMAND, 4)], 5, 1),
        # No single one suffices, and none goes in vain.
        ([(CONTINUOUS, 0.5), (ON_DEMAND, 8), (ON_DEMAND, 9)], 5, 2),
        # Even all are not enough: something else holds what is limited.
        ([(ON_DEMAND, 8), (CONTINUOUS, 1), (CONTINUOUS, 2)], -1, 2),
    ],
)
def test_the_most_expensive_session_of_the_lowest_priority_that_suffices_goes(
    used: list[tuple[Priority, float]], limit: float, goes: int | None
) -> None:
    assert first_to_go(sessions(*used), limit) == goes


USED = st.lists(st.tuples(st.sampled_from(Priority), st.integers(0, 100)), max_size=8)


@given(USED, st.integers(0, 300))
def test_sessions_go_until_the_rest_is_within_the_limit_and_none_goes_in_vain(
    used: list[tuple[Priority, float]], limit: int
) -> None:
    left = {each.session: each for each in sessions(*used)}
    gone = []
    while (session := first_to_go(left.values(), limit)) is not None:
        gone.append(left.pop(session))
    assert sum(each.used for each in left.values()) <= limit
    # Those of any lower priority alone would have been no relief.
    if gone:
        highest = max(each.priority for each in gone)
        spared = [each for each in sessions(*used) if each.priority >= highest]
        assert sum(each.used for each in spared) > RELIEF * limit
        # Nobody cheaper went for a priority while a more expensive one of it stayed.
        for went, stayed in ((w, s) for w in gone for s in left.values()):
            assert went.priority != stayed.priority or went.used >= stayed.used


def test_continuous_collectors_have_a_limit_of_their_own_while_nobody_watches_them() -> None:
    excess = cpu_excess(sessions((CONTINUOUS, 4), (CONTINUOUS, 3), (ON_DEMAND, 20)), LIMITS)
    assert excess
    assert (excess.limit, excess.value) == ("limits.continuous_cpu_percent", 5)
    assert (excess.used, excess.session) == (7, 0)
    assert cpu_excess(sessions((WATCHED, 4), (CONTINUOUS, 3), (ON_DEMAND, 20)), LIMITS) is None
    excess = cpu_excess(sessions((WATCHED, 20), (CONTINUOUS, 3), (ON_DEMAND, 31)), LIMITS)
    assert excess
    assert (excess.limit, excess.used, excess.session) == ("limits.cpu_percent", 54, 2)


# Coming back


def room(
    taken: Room, percent: float, *used: tuple[Priority, float], memory: int = 0, at_s: float = 0
) -> bool:
    return taken.take(Needs(percent, memory), sessions(*used), 500, at_s)


def test_a_collector_comes_back_once_there_is_room_for_what_it_used() -> None:
    for used in ([(CONTINUOUS, 3.0)], [(WATCHED, 48.0)], [(ON_DEMAND, 25.0), (WATCHED, 23.0)]):
        assert not room(Room(LIMITS), 3, *used)
        assert room(Room(LIMITS), 2, *used)
    assert not room(Room(LIMITS), 2, memory=501)
    assert room(Room(LIMITS), 2, memory=500)


def test_collectors_that_come_back_at_one_time_do_not_take_the_same_room() -> None:
    taken = Room(LIMITS)
    assert room(taken, 3, at_s=100)
    assert not room(taken, 3, at_s=101)
    assert room(taken, 2, at_s=101)
    # By then its use is measured.
    assert not room(taken, 3, (CONTINUOUS, 3), at_s=100 + CPU_WINDOW_S)
    assert room(taken, 2, (CONTINUOUS, 1), at_s=101 + CPU_WINDOW_S)


def test_a_collector_that_exceeds_a_limit_by_itself_is_tried_again_where_most_of_it_is_free() -> (
    None
):
    assert room(Room(LIMITS), 40, (CONTINUOUS, 1), (ON_DEMAND, 5))
    assert not room(Room(LIMITS), 40, (CONTINUOUS, 1.1), (ON_DEMAND, 5))


# What a session costs


def test_the_use_is_the_mean_of_the_last_seconds_and_a_young_session_has_used_little() -> None:
    costs = Costs()
    costs.begin(1000.0)
    costs.programs.seconds = 0.2
    costs.charge_reading(300_000_000)
    assert costs.sample(1001).total == pytest.approx(5)  # 0.5 s of 10
    for second in range(1002, 1031):
        costs.programs.seconds += 0.01
        costs.charge_reading(20_000_000)
        costs.sample(second)
    assert astuple(costs.recent) == pytest.approx((1, 2, 0))
    costs.charge_reading(300_000_000)
    costs.sample(1045)  # the agent was held for 15 s
    assert astuple(costs.recent) == pytest.approx((0, 2, 0))
    assert astuple(costs.used) == pytest.approx((0.49, 1.18, 0))


def test_what_a_session_used_before_it_was_attached_is_not_charged() -> None:
    costs = Costs()
    costs.charge_reading(40_000_000)
    costs.begin(50.0)
    assert costs.used == costs.sample(51) == CpuUse()
    assert costs.programs.counted_until_s == 50


ALONE: Final = {"enter": 1.0}


def stats(seconds: float, runs: int) -> dict[str, ProgramStats]:
    return {"enter": ProgramStats(round(seconds * 1e9), runs, 0, 0)}


def test_a_window_stands_for_the_time_since_the_session_began_then_since_the_last_window() -> None:
    use = ProgramUse(counted_until_s=100.0)
    added = use.count(stats(7, 1000), stats(7.001, 1500), Window(100.98, 101.0), ALONE)
    assert use.seconds == added["enter"].seconds == pytest.approx(0.05)
    assert added["enter"].runs == pytest.approx(25_000)
    use.count(stats(8, 2000), stats(8.001, 2500), Window(101.48, 101.5), ALONE)
    assert use.seconds == pytest.approx(0.075)
    # One that began within the window is not charged for longer than it.
    young = ProgramUse(counted_until_s=101.49)
    young.count(stats(0, 0), stats(0.001, 1), Window(101.48, 101.5), ALONE)
    assert young.seconds == pytest.approx(0.001)


def test_what_a_shared_program_uses_is_charged_once() -> None:
    window, before, after = Window(100.98, 101.0), stats(7, 1000), stats(7.001, 1500)
    uses = {share: ProgramUse(counted_until_s=100.0) for share in (0.75, 0.25)}
    added = {
        share: use.count(before, after, window, {"enter": share})["enter"]
        for share, use in uses.items()
    }
    assert uses[0.75].seconds == pytest.approx(0.0375)
    assert uses[0.25].seconds == pytest.approx(0.0125)
    assert sum(each.runs for each in added.values()) == pytest.approx(25_000)
    # A program of a hub that was left meanwhile is nobody's.
    assert ProgramUse(100.0).count(before, after, window, {}) == {}


def burn(seconds: float) -> int:
    """Uses that much CPU time; returns the thread's id."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    return threading.get_ident()


def test_the_causes_are_named_and_programs_that_are_not_counted_are_not_said_to_be_free() -> None:
    costs = Costs()
    costs.begin(0.0)
    costs.charge_reading(1_000_000_000)
    costs.charge_subscriber(500_000_000)
    costs.sample(1)
    assert costs.recent_by_cause() == (
        "its programs are not counted, 10.0 by reading, 9.0 by its subscribers"
    )
    costs.charge_offering(200_000_000)
    costs.sample(1)
    assert costs.recent_by_cause() == (
        "its programs are not counted, 8.0 by reading, 11.0 by its subscribers"
    )
    costs.programs.count(stats(7, 0), stats(7.01, 0), Window(1.0, 1.02), ALONE)
    costs.sample(2)
    assert costs.recent_by_cause() == (
        "5.1 by its programs, 8.0 by reading, 11.0 by its subscribers"
    )


@pytest.mark.timed
async def test_a_tasks_steps_and_threads_are_charged_and_others_are_not() -> None:
    charged: list[int] = []

    async def of_others() -> None:
        for _ in range(10):
            burn(0.01)
            await asyncio.sleep(0)

    async def work() -> str:
        burn(0.02)
        await asyncio.sleep(0)
        await asyncio.gather(of_others(), asyncio.to_thread(burn, 0.05))
        burn(0.02)
        assert await in_thread(lambda: burn(0.03)) != threading.get_ident()
        return "done"

    other = asyncio.create_task(of_others())
    assert await metered(work(), charged.append) == "done"
    await other
    await in_thread(lambda: burn(0.05))  # nobody's: the task is done
    assert 0.07 <= sum(charged) / 1e9 < 0.09


async def test_a_metered_task_is_cancelled_and_fails_as_others_do() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # it may still wait
            ended.append("cancelled")
            raise

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError("as it should")

    async def metering() -> None:
        await metered(work(), lambda _: None)

    task = asyncio.create_task(metering())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["cancelled"]
    with pytest.raises(ValueError, match="as it should"):
        await metered(failing(), lambda _: None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await metered(work(), lambda _: None)
