"""Sessions that start and end at the same time: none waits for what it does not need, and what one
leaves behind hurts no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from coral import bpf
from coral.bpf import BpfObject, LoadError
from coral.collectors.contract import Summaries
from coral.collectors.hubs import HUBS
from coral.collectors.hubs.keeper import KEEPER
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from tests.support import Puppet, at_work, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left", "no_descriptors_left")

TIMEOUT_S = 30.0


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as process:
        yield process


def calls(puppet: Puppet, **config: str) -> SyscallStatsCollector:
    config = {"pid": str(puppet.pid), "include": "getppid", **config}
    return SyscallStatsCollector.create(config, None, bpf.probe())


def connections(puppet: Puppet, **config: str) -> TcpMetricsCollector:
    return TcpMetricsCollector.create({"pid": str(puppet.pid), **config}, None, bpf.probe())


def with_loads(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Runs BEFORE, with the name of the object, whenever one is to be loaded."""
    load = BpfObject.load

    def loading(it: BpfObject) -> None:
        before(it.path.name.partition(".")[0])
        load(it)

    monkeypatch.setattr(BpfObject, "load", loading)


def test_a_session_of_a_loaded_hub_does_not_wait_for_another_hub_that_is_being_loaded(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_loading, go_on = threading.Event(), threading.Event()

    def wait(name: str) -> None:
        if name == "tcp_metrics":
            is_loading.set()
            assert go_on.wait(TIMEOUT_S)

    with_loads(monkeypatch, wait)
    first, second, other = calls(puppet), calls(puppet), connections(puppet)
    with ThreadPoolExecutor(2) as pool, at_work(first):
        serves_many(first)
        try:
            slow = pool.submit(other.open)
            assert is_loading.wait(TIMEOUT_S)
            pool.submit(second.open).result(TIMEOUT_S)
            assert second.bpf_object.object is first.bpf_object.object
            assert not slow.done()
        finally:
            go_on.set()
        slow.result(TIMEOUT_S)
        other.close()
        second.close()


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ({"processes"}, "processes"),
        ({"syscall_stats"}, "syscall_stats"),
        ({"processes", "syscall_stats"}, "processes"),
    ],
)
def test_a_failure_in_one_of_the_two_objects_of_a_first_session_leaves_nothing(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch, failing: set[str], told: str
) -> None:
    def fail(name: str) -> None:
        if name in failing:
            raise LoadError(f"loading {name}")

    with monkeypatch.context() as patched:
        with_loads(patched, fail)
        session = calls(puppet)
        with pytest.raises(LoadError, match=f"^loading {told}$"):
            session.open()
        session.close()
    with at_work(calls(puppet)) as session:
        puppet.getppid(7)
        rows = session.drain().rows
        assert isinstance(rows, Summaries)
        assert rows.columns["call_count"].tolist() == [7]


def serves_many(session: SyscallStatsCollector) -> None:
    if not session.bpf_object.prepares_next:
        pytest.skip("programs serve one or two sessions here")


def prepared(session: SyscallStatsCollector) -> None:
    """Waits until the maps of a next session like SESSION are there, if they are to be."""
    session.drain()
    wait_until(lambda: KEEPER.is_idle)
    serves_many(session)


def test_maps_that_are_given_up_after_their_last_session_are_no_error(
    puppet: Puppet, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    with at_work(calls(puppet)) as session:
        prepared(session)

        def wait() -> None:
            assert go_on.wait(TIMEOUT_S)

        KEEPER.submit(wait)
        HUBS.give_up_prepared()
    go_on.set()
    wait_until(lambda: KEEPER.is_idle)
    assert not caplog.records


def test_maps_whose_last_session_ends_before_they_are_made_keep_no_slot(puppet: Puppet) -> None:
    first, second = calls(puppet, entries="100"), calls(puppet, entries="200")
    with at_work(first):
        prepared(first)
        group = first.bpf_object._group
        (kit,) = group.kits
        with ThreadPoolExecutor(1) as pool:
            second.open()
            with kit.locks[0]:  # whoever makes the maps of a next session waits
                second.drain()
                wait_until(lambda: not kit.is_ready)  # they replace those of another size
                closed = pool.map(lambda session: session.close(), (first, second))
                wait_until(lambda: not group.slots)
            assert len(list(closed)) == 2
        wait_until(lambda: KEEPER.is_idle)
        assert group.kits == []
    with at_work(calls(puppet, entries="200")) as session:
        prepared(session)
        assert len(session.bpf_object._group.kits) == 1


def test_a_loss_is_told_before_the_events_that_follow_it(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer is full when its account is read, and refuses more before it is read itself."""
    with at_work(calls(puppet, mode="events", ring="64KiB")) as session:
        puppet.getppid(5_000)
        read, refused = session._account.read, 300

        def read_late() -> object:
            counts = read()
            monkeypatch.undo()
            puppet.getppid(refused)
            return counts

        monkeypatch.setattr(session._account, "read", read_late)
        first = session.drain()
        lost = sum(first.losses.values())
        assert len(first.rows) + lost in (5_000, 5_000 + refused)  # perf buffers tell it at once
        puppet.getppid(5)
        second = session.drain()
        assert len(second.rows) == 5
        assert len(first.rows) + lost + sum(second.losses.values()) == 5_000 + refused
