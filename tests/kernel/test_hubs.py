"""Sessions that share programs: each shows what it would show alone, whichever others begin and end
meanwhile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from coral import bpf
from coral.collectors.hubs.keeper import KEEPER
from coral.collectors.kernel_collector import KernelCollector
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from tests.collecting import Collected, collecting, session
from tests.support import RUNGS, Calls, Puppet, at_work, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

two_rungs = pytest.mark.parametrize(
    "without",
    [
        pytest.param(RUNGS["best"], id="best"),
        pytest.param(RUNGS["oldest"], id="oldest", marks=pytest.mark.long),
    ],
)
MOST, STEPS, SLOTS = 10, 60, 64


class _Session:
    """A session at work, and what it has to show."""

    def __init__(self, without: tuple[str, ...], chance: random.Random, puppets: list[Puppet]):
        watched = chance.sample(puppets, chance.randint(1, len(puppets)))
        self.pids = {puppet.pid for puppet in watched}
        self.expected: Counter[int] = Counter()
        config = {"mode": chance.choice(["summaries", "events"]), "include": "getppid"}
        self._stack = ExitStack()
        pids = ",".join(map(str, self.pids))
        self.collected: Collected = self._stack.enter_context(
            collecting(without, pid=pids, **config)
        )

    def end(self) -> None:
        self._stack.close()
        assert self.collected.by_pid("getppid") == self.expected
        assert not self.collected.losses


@two_rungs
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_ten_sessions_show_what_each_would_alone(
    without: tuple[str, ...], seed: int, calls: Callable[..., Calls]
) -> None:
    chance = random.Random(seed)
    running: list[_Session] = []
    busy = [calls("getppid", 400_000, "openat", 1_000) for _ in range(2)]
    with Puppet() as one, Puppet() as two, Puppet() as three:
        puppets = [one, two, three]
        with (
            collecting(without, pid=f"{busy[0].pid},{busy[1].pid}") as both,
            collecting(without, pid=str(busy[1].pid)) as second,
        ):
            for each in busy:
                each.go()
            for _ in range(STEPS):
                if len(running) < MOST and chance.random() < 0.6:
                    running.append(_Session(without, chance, puppets))
                elif running and chance.random() < 0.5:
                    running.pop(chance.randrange(len(running))).end()
                puppet, times = chance.choice(puppets), chance.randint(1, 50)
                puppet.getppid(times)
                for each_session in running:
                    if puppet.pid in each_session.pids:
                        each_session.expected[puppet.pid] += times
                if running and chance.random() < 0.3:
                    chance.choice(running).collected.drain()
            for each in busy:
                each.finish()
        for each_session in running:
            each_session.end()
    assert both.by_pid("getppid") == {each.pid: 400_000 for each in busy}
    assert (both.of("openat"), both.errors["openat"], both.losses) == (2_000, 2_000, Counter())
    assert second.by_pid("getppid") == {busy[1].pid: 400_000}
    assert (second.of("openat"), second.errors["openat"]) == (1_000, 1_000)
    assert not second.losses


def test_sessions_of_one_slot_after_the_other_do_not_mix() -> None:
    with Puppet() as puppet, Puppet() as other, at_work(session(pid=str(other.pid))):
        for times in range(SLOTS + 6):
            mode = "events" if times % 2 else "summaries"
            with collecting(pid=str(puppet.pid), include="getppid", mode=mode) as counted:
                puppet.getppid(times)
            assert counted.of("getppid") == times


@contextmanager
def next_in_slot(number: int, **config: str) -> Iterator[Collected]:
    """The next session that gets this slot. Slots are given in turn."""
    for _ in range(2 * SLOTS):
        with collecting((), **config) as counted:
            if counted.collector.bpf_object.number == number:
                yield counted
                return
    raise AssertionError(f"no session got slot {number}")


def test_a_call_of_a_session_before_is_not_one_of_the_next_in_its_slot() -> None:
    with Puppet() as puppet, Puppet() as other, at_work(session(pid=str(other.pid))):
        with collecting(pid=str(puppet.pid)) as before:
            puppet.do("pass")
            number = before.collector.bpf_object.number
        # It waits in a read that began in that slot's session, until the slot is used again.
        with next_in_slot(number, pid=str(puppet.pid)) as counted:
            puppet.do("pass")
            puppet.do("pass")
    assert before.of("read") == 0
    assert counted.of("read") == 1


def test_a_slot_keeps_nothing_of_the_session_before() -> None:
    """A session that watches nothing of its own follows nothing of its predecessor."""
    with Puppet() as puppet, Puppet() as other, at_work(session(pid=str(other.pid))):
        with at_work(session(scope="host", include="getppid")) as host:
            number = host.bpf_object.number
        with next_in_slot(number, pid=str(other.pid), include="getppid") as counted:
            puppet.getppid(10)
            other.getppid(3)
    assert counted.by_pid("getppid") == {other.pid: 3}


def test_a_thread_that_nobody_watches_any_more_has_no_state_of_a_thread_hash() -> None:
    """Where states are in a hash map, others need its room."""
    without = RUNGS["hash"]
    with (
        Puppet() as puppet,
        Puppet() as other,
        at_work(session(without, pid=str(other.pid), include="getppid")) as stays,
    ):
        states = stays.bpf_object.object.map("thread_hash")
        other.do("pass")
        assert len(states.read_keys()) == 1
        with collecting(without, pid=str(puppet.pid), include="getppid") as counted:
            puppet.getppid(3)
            assert len(states.read_keys()) == 2
        puppet.getppid(3)
        assert len(states.read_keys()) == 1
    assert counted.of("getppid") == 3


@pytest.mark.long
def test_maps_that_wait_for_other_sessions_take_no_place() -> None:
    """All slots are for sessions, although maps are prepared for one more of each sort."""
    with Puppet() as puppet, ExitStack() as stack:
        pid = str(puppet.pid)
        sorts: list[KernelCollector[Any]] = [
            session(pid=pid),
            session(pid=pid, mode="events"),
            TcpMetricsCollector.create({"pid": pid}, None, bpf.probe()),
            TcpMetricsCollector.create({"pid": pid, "mode": "events"}, None, bpf.probe()),
        ]
        for one in sorts:
            stack.enter_context(at_work(one))
            one.drain()
            wait_until(lambda: KEEPER.is_idle)
        more = [stack.enter_context(at_work(session(pid=pid))) for _ in range(SLOTS - len(sorts))]
        assert {one.bpf_object.hub for one in more} == {sorts[0].bpf_object.hub}
        assert {one.bpf_object.number for one in (*sorts, *more)} == set(range(SLOTS))
