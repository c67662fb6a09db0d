"""Maps of sessions: many sessions share one loaded object, each with maps of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coral.bpf import BpfError, BpfObject, HashMap, LoadError, PerfReader, RingReader, probe
from coral.bpf.buffers.account import Account
from coral.bpf.buffers.maps import sum_over_cpus
from coral.bpf.rung import HOOKS, SESSIONS, climb
from tests.support import compiled

pytestmark = pytest.mark.usefixtures("kept_apart", "nothing_left")

PROGRAM = "sessions_enter"


@pytest.fixture
def kept_apart() -> None:
    if reason := probe()["session_maps"].reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def path() -> Path:
    return compiled("sessions")


@pytest.fixture(params=["core", pytest.param("bcc", marks=pytest.mark.needs_bcc)])
def load(request: pytest.FixtureRequest, path: Path) -> Iterator[Any]:
    """Loads the object, by each loader."""
    if request.param == "core" and (reason := probe()["btf"].reason):
        pytest.skip(reason)
    objects: list[BpfObject] = []

    def loaded(**arguments: Any) -> BpfObject:
        options = {"wanted_tgid": os.getpid(), **arguments.pop("options", {})}
        it = BpfObject(
            path, programs=(PROGRAM,), options=options, loader=request.param, **arguments
        )
        objects.append(it)
        it.load()
        return it

    yield loaded
    for it in objects:
        it.close()


def call_getppid(times: int) -> None:
    for _ in range(times):
        os.getppid()


def calls_in(stats: HashMap) -> list[int]:
    keys, values = stats.read()
    assert set(keys["tgid"].tolist()) <= {os.getpid()}
    return [int(calls) for calls in sum_over_cpus(values, "calls")]


@pytest.mark.parametrize("batches", [True, False])
def test_each_session_counts_exactly_in_its_own_map(load: Any, *, batches: bool) -> None:
    it = load(batches=batches)
    with (
        it.make_inner("stats") as first,
        it.make_inner("stats", entries=1000) as second,
        it.make_inner("stats", entries=1) as last,
    ):
        slots = {0: first, 5: second, SESSIONS - 1: last}
        for slot, inner in slots.items():
            it.install("stats", slot, inner.fd)
            it.map("weights").write(slot, slot + 1)
        assert first.memory_bytes < second.memory_bytes
        it.attach()
        for sessions, times in (({0}, 100), ({0, 5}, 20), ({0, 5, SESSIONS - 1}, 3), ({9}, 7)):
            it.write_variable("wanted_sessions", sum(1 << slot for slot in sessions))
            call_getppid(times)
        assert [calls_in(inner) for inner in slots.values()] == [[123], [23], [3]]
        _, values = second.read()
        assert values.dtype.names == ("calls", "weighted")
        assert sum_over_cpus(values, "weighted").tolist() == [23 * 6]

        it.write_variable("wanted_sessions", 1 << 5)
        it.uninstall("stats", 5)
        it.uninstall("stats", 5)
        call_getppid(50)
        assert calls_in(second) == [23]
        assert calls_in(first) == [123]


def test_a_slot_is_used_again_with_a_map_of_another_size(load: Any) -> None:
    it = load()
    it.write_variable("wanted_sessions", 1)
    it.attach()
    for times in range(1, 20):
        with it.make_inner("stats", entries=times) as inner:
            it.install("stats", 0, inner.fd)
            call_getppid(times)
            it.uninstall("stats", 0)
            assert calls_in(inner) == [times]


def test_each_session_has_a_ring_of_its_own(load: Any) -> None:
    if reason := probe()["ring_buffer"].reason:
        pytest.skip(reason)
    it = load()
    kinds = it.record_kinds({"record": "seq"})
    with (
        it.make_inner("rings", 4096) as small,
        it.make_inner("rings", 65536) as large,
        RingReader(small.fd, small.entries, kinds) as first,
        RingReader(large.fd, large.entries, kinds) as second,
    ):
        it.install("rings", 1, small.fd)
        it.install("rings", 2, large.fd)
        it.write_variable("wanted_sessions", 0b110)
        it.attach()
        accounts = [
            Account(it.map("accounts"), slot, it.btf.enum("loss"), [it.program_fd(PROGRAM)])
            for slot in range(4)
        ]
        call_getppid(1000)
        fitting = 4095 // 32
        assert [account.read() for account in accounts] == [
            (0, 0, {}),
            (1000, 0, {"BUFFER_FULL": 1000 - fitting}),
            (1000, 0, {}),
            (0, 0, {}),
        ]
        assert accounts[1].read() == (0, 0, {})
        assert len(first.drain()["record"]) == fitting
        assert second.drain()["record"]["slot"].tolist() == [2] * 1000
        it.write_variable("wanted_sessions", 0b010)
        call_getppid(5)
        assert first.drain()["record"]["slot"].tolist() == [1] * 5
        assert len(second.drain()["record"]) == 0


def test_each_session_has_perf_buffers_of_its_own(load: Any) -> None:
    it = load(options={"records_in_ring": False})
    kinds = it.record_kinds({"record": "seq"})
    with it.make_inner("perfs") as one, it.make_inner("perfs") as two:
        readers = [PerfReader(inner.fd, 65536, kinds) for inner in (one, two)]
        try:
            it.install("perfs", 3, one.fd)
            it.install("perfs", 4, two.fd)
            it.attach()
            it.write_variable("wanted_sessions", 0b01000)
            call_getppid(100)
            it.write_variable("wanted_sessions", 0b11000)
            call_getppid(10)
            assert [reader.drain()["record"]["slot"].tolist() for reader in readers] == [
                [3] * 110,
                [4] * 10,
            ]
        finally:
            for reader in readers:
                reader.close()


def test_a_map_that_is_not_like_the_prototype_is_refused(load: Any) -> None:
    it = load()
    with it.make_inner("rings", 4096) as ring:
        with pytest.raises(BpfError, match="writing map stats: EINVAL"):
            it.install("stats", 0, ring.fd)
        with pytest.raises(BpfError, match="writing map rings: E2BIG"):
            it.install("rings", SESSIONS, ring.fd)
    with pytest.raises(KeyError, match="weights is no map of maps"):
        it.make_inner("weights")
    with pytest.raises(LoadError, match="making map stats: E"):
        it.make_inner("stats", entries=0)


def test_sizes_and_flags_of_an_object_are_those_of_the_prototype(load: Any) -> None:
    it = load(map_entries={"stats": 3}, map_flags={"stats": 0})
    with it.make_inner("stats") as inner:
        assert inner.entries == 3
        it.install("stats", 0, inner.fd)
        it.write_variable("wanted_sessions", 1)
        it.attach()
        call_getppid(9)
        assert calls_in(inner) == [9]


def test_two_objects_share_a_map(load: Any) -> None:
    one = load()
    other = load(shared={"weights": one.map_fd("weights"), "stats": one.map_fd("stats")})
    assert other.map_memory_bytes < one.map_memory_bytes
    with one.make_inner("stats") as inner:
        other.install("stats", 7, inner.fd)
        other.map("weights").write(7, 11)
        one.write_variable("wanted_sessions", 1 << 7)
        other.write_variable("wanted_sessions", 1 << 7)
        one.attach()
        call_getppid(10)
        one.close()
        other.attach()
        call_getppid(5)
        _, values = inner.read()
        assert sum_over_cpus(values, "weighted").tolist() == [15 * 11]


def test_the_rung_has_a_slot_for_each_session() -> None:
    features = probe()
    rung = climb(features, HOOKS)
    many = (rung.loader.taken, rung.buffer.taken) == ("core", "ring_buffer")
    assert rung.slots == (SESSIONS if many else 2)
    assert climb(features.without("session_maps"), HOOKS).slots == 1
