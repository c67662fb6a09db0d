"""Draining perf buffers on the real kernel: records, losses, wake-ups, and nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import select
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coral.bpf import BpfError, BpfObject, PerfReader
from coral.bpf.buffers import perf_buffer
from coral.bpf.buffers.records import RecordKind, drain_whole
from tests.support import Calls, compiled, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

PAGE = resource.getpagesize()
STRIDE = 56  # a header of 8 bytes, a length of 4, a record of 40, padding to 8
CPUS = sorted(os.sched_getaffinity(0))
ONLINE = Path("/sys/devices/system/cpu/online")


@pytest.fixture(scope="module")
def perf_object() -> Path:
    return compiled("perf")


@pytest.fixture
def loaded_object(perf_object: Path) -> Iterator[BpfObject]:
    """An object that watches this process, not attached yet."""
    with watching(perf_object, [os.getpid()]) as it:
        yield it


@pytest.fixture(autouse=True)
def other_cpus_again() -> Iterator[None]:
    yield
    os.sched_setaffinity(0, CPUS)


@contextmanager
def watching(path: Path, tgids: Sequence[int], **options: object) -> Iterator[BpfObject]:
    wanted = {"wanted_tgids": [*tgids, *[0] * (4 - len(tgids))]}
    with BpfObject(path, programs=("perf_enter",), options={**wanted, **options}) as it:
        yield it


def reader_of(
    it: BpfObject, bytes_per_cpu: int = PAGE, wakeup_bytes: int = 0, *, count_lost: bool = True
) -> PerfReader:
    """A reader sorted by time; programs begin to write once it exists."""
    reader = PerfReader(
        it.map_fd("events"),
        bytes_per_cpu,
        it.record_kinds({"record": "time_ns"}),
        wakeup_bytes,
        count_lost=count_lost,
    )
    it.attach()
    return reader


def call_getppid(times: int, cpu: int | None = None) -> None:
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    for _ in range(times):
        os.getppid()


def produced(it: BpfObject) -> int:
    return int(it.read_variable("produced").sum())


def descriptors() -> set[str]:
    listed = list(Path("/proc/self/fd").iterdir())
    return {path.name for path in listed if path.is_symlink()}  # except that of the listing


def test_records_arrive_whole_and_in_order_of_time(loaded_object: BpfObject) -> None:
    with reader_of(loaded_object) as reader:
        for cpu in [*CPUS, *reversed(CPUS)]:
            call_getppid(5, cpu)
        assert reader.pending_bytes == 10 * len(CPUS) * STRIDE
        assert reader.capacity_bytes == PAGE * len(perf_buffer.cpus_in(ONLINE.read_text()))
        records = reader.drain()["record"]
        assert records.dtype == loaded_object.btf.struct_dtype("record")
        assert records["cpu"].tolist() == [
            cpu for cpu in [*CPUS, *reversed(CPUS)] for _ in range(5)
        ]
        assert (np.diff(records["time_ns"].astype(np.int64)) > 0).all()
        for cpu in CPUS:
            assert records["seq"][records["cpu"] == cpu].tolist() == list(range(10))
        assert set(records["tgid"].tolist()) == {os.getpid()}
        assert set(records["name"].tolist()) == {b"coral"}
        assert reader.pending_bytes == 0
        assert len(reader.drain()["record"]) == 0
        assert reader.lost == 0


def test_without_an_order_records_come_cpu_after_cpu(loaded_object: BpfObject) -> None:
    kinds = loaded_object.record_kinds({"record": None})
    with PerfReader(loaded_object.map_fd("events"), PAGE, kinds) as reader:
        loaded_object.attach()
        for cpu in [*reversed(CPUS), *CPUS]:
            call_getppid(3, cpu)
        assert reader.drain()["record"]["cpu"].tolist() == [cpu for cpu in CPUS for _ in range(6)]


def test_a_ring_that_wraps_loses_nothing_while_it_is_drained(loaded_object: BpfObject) -> None:
    with reader_of(loaded_object) as reader:
        seen = []
        for turn in range(200):  # 73.1 records fit: it wraps every other turn, often within one
            call_getppid(50, CPUS[0])
            records = reader.drain()["record"]
            assert len(records) == 50, turn
            seen += records["seq"].tolist()
        assert seen == list(range(10_000))
        assert loaded_object.read_variable("lost") == 0
        assert reader.lost == 0


def start_on_each_cpu(calls: Callable[..., Calls], count: int) -> list[Calls]:
    started = []
    for cpu in CPUS[:4]:
        started.append(calls("getppid", count))
        os.sched_setaffinity(started[-1].pid, {cpu})
    return started


def go(started: Sequence[Calls]) -> None:
    for one in started:
        one.go()


def drain_until_ended(reader: PerfReader, started: Sequence[Calls]) -> NDArray[Any]:
    """All records of running programs, drained while they run."""
    running = [os.pidfd_open(one.pid) for one in started]
    drained = []
    while running:
        drained.append(reader.drain()["record"])
        for ended in select.select(running, [], [], 0)[0]:
            running.remove(ended)
            os.close(ended)
    for one in started:
        one.finish()
    return np.concatenate([*drained, drain_whole(reader)["record"]])


def test_programs_on_all_cpus_are_counted_to_the_record(
    perf_object: Path, calls: Callable[..., Calls]
) -> None:
    count = 20_000
    started = start_on_each_cpu(calls, count)
    with (
        watching(perf_object, [one.pid for one in started]) as it,
        reader_of(it, 1 << 21) as reader,  # room for all records: none can be lost
    ):
        go(started)
        records = drain_until_ended(reader, started)
        assert len(records) == count * len(started)
        for cpu, one in zip(CPUS, started, strict=False):
            here = records[records["cpu"] == cpu]
            assert here["seq"].tolist() == list(range(count))
            assert set(here["tgid"].tolist()) == {one.pid}
        assert reader.lost == it.read_variable("lost") == 0


def test_what_full_rings_refuse_while_they_are_drained_is_counted_to_the_record(
    perf_object: Path, calls: Callable[..., Calls]
) -> None:
    count = 100_000
    started = start_on_each_cpu(calls, count)
    with (
        watching(perf_object, [one.pid for one in started]) as it,
        reader_of(it, 4 * PAGE) as reader,
    ):
        go(started)
        wait_until(lambda: it.read_variable("lost"))
        records = drain_until_ended(reader, started)
        lost = reader.lost
        assert lost == it.read_variable("lost") > 0
        assert len(records) + lost == produced(it) == count * len(started)
        for cpu in CPUS:
            numbers = records["seq"][records["cpu"] == cpu].astype(np.int64)
            assert (np.diff(numbers) > 0).all()
        assert (records["name"] == b"coral").all()


@pytest.mark.parametrize("counted", [True, False], ids=["the kernel counts", "the kernel tells"])
def test_a_loss_is_known_to_the_record(loaded_object: BpfObject, *, counted: bool) -> None:
    with reader_of(loaded_object, count_lost=counted) as reader:
        if counted and not reader.counts_lost:
            pytest.skip("this kernel does not count them: 6.0 does")
        call_getppid(1_000, CPUS[0])
        if counted:
            assert reader.lost == 1_000 - PAGE // STRIDE
        kept = reader.drain()["record"]
        assert kept["seq"].tolist() == list(range(PAGE // STRIDE))
        assert reader.lost == (1_000 - PAGE // STRIDE if counted else 0)
        call_getppid(10, CPUS[0])
        assert reader.drain()["record"]["seq"].tolist() == list(range(1_000, 1_010))
        assert reader.lost == loaded_object.read_variable("lost") == 1_000 - PAGE // STRIDE
    assert reader.lost == 1_000 - PAGE // STRIDE
    assert produced(loaded_object) == 1_010


def test_a_cpu_wakes_the_reader_past_the_mark_and_only_then(loaded_object: BpfObject) -> None:
    with reader_of(loaded_object, wakeup_bytes=10 * STRIDE) as reader:
        for cpu in CPUS:
            call_getppid(10, cpu)
            assert reader.wakeup.poll(0) == []
        for cpu in CPUS:
            call_getppid(1, cpu)
            assert len(reader.wakeup.poll(5)) == 1
            assert reader.wakeup.poll(0) == []
        assert len(reader.drain()["record"]) == 11 * len(CPUS)
        call_getppid(9, CPUS[0])
        assert reader.wakeup.poll(0) == []
        call_getppid(1, CPUS[0])  # ten since the last time
        assert len(reader.wakeup.poll(5)) == 1


async def test_a_perf_buffer_wakes_the_event_loop(loaded_object: BpfObject) -> None:
    with reader_of(loaded_object, wakeup_bytes=STRIDE) as reader:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def on_wakeup() -> None:
            reader.wakeup.poll(0)
            woken.set()

        loop.add_reader(reader.wakeup.fileno(), on_wakeup)
        try:
            for cpu in [*CPUS, *CPUS]:
                call_getppid(2, cpu)
                async with asyncio.timeout(5):
                    await woken.wait()
                assert len(reader.drain()["record"]) == 2
                woken.clear()
        finally:
            loop.remove_reader(reader.wakeup.fileno())


def test_a_record_of_another_size_is_an_error_and_stays(perf_object: Path) -> None:
    before = descriptors()
    with watching(perf_object, [os.getpid()], longer=True) as it, reader_of(it) as reader:
        call_getppid(3, CPUS[0])
        for _ in range(2):
            with pytest.raises(
                BpfError,
                match=r"kind 1 with 40 bytes, in 52 with padding, where there may be record .40.",
            ):
                reader.drain()["record"]
        assert reader.pending_bytes == 3 * (STRIDE + 8)
    assert descriptors() == before


def test_closing_leaves_nothing_and_can_be_done_twice(loaded_object: BpfObject) -> None:
    kinds = loaded_object.record_kinds({"record": None})
    loaded_object.read_variable("lost")  # maps the variables, which needs a descriptor
    before = descriptors()
    reader = PerfReader(loaded_object.map_fd("events"), PAGE, kinds)
    loaded_object.attach()
    attached = descriptors()
    call_getppid(5)
    records = reader.drain()["record"]
    reader.close()
    reader.close()
    loaded_object.detach()
    assert len(attached) > len(before)
    assert descriptors() == before
    assert records["name"].tolist() == [b"coral"] * 5
    assert (reader.pending_bytes, reader.capacity_bytes, reader.lost) == (0, 0, 0)


def test_a_closed_reader_is_out_of_its_map_and_another_can_follow(
    loaded_object: BpfObject,
) -> None:
    reader_of(loaded_object).close()
    call_getppid(3)
    assert loaded_object.read_variable("lost") == 3  # refused, because there is no ring
    kinds = loaded_object.record_kinds({"record": None})
    with PerfReader(loaded_object.map_fd("events"), PAGE, kinds) as reader:
        call_getppid(4)
        assert len(reader.drain()["record"]) == 4


def test_a_reader_may_outlive_its_object(perf_object: Path) -> None:
    before = descriptors()
    with watching(perf_object, [os.getpid()]) as it:
        reader = reader_of(it)
        call_getppid(3)
    assert len(reader.drain()["record"]) == 3
    reader.close()
    assert descriptors() == before


def test_a_failing_construction_names_the_step_and_leaves_nothing(
    loaded_object: BpfObject,
) -> None:
    kinds = loaded_object.record_kinds({"record": None})
    events, no_events = loaded_object.map_fd("events"), loaded_object.map_fd("no_events")
    before = descriptors()
    for bytes_per_cpu in (0, PAGE - 1, 3 * PAGE):
        with pytest.raises(BpfError, match="no power of two of pages: EINVAL"):
            PerfReader(events, bytes_per_cpu, kinds)
    with pytest.raises(BpfError, match="mapping the perf buffer of CPU 0: E"):
        PerfReader(events, 1 << 60, kinds)
    with pytest.raises(BpfError, match=r"opening .* perf buffer: EBADF"):
        PerfReader(-1, PAGE, kinds)
    with (
        Path(os.devnull).open() as no_map,
        pytest.raises(BpfError, match="no perf event array: EINVAL"),
    ):
        PerfReader(no_map.fileno(), PAGE, kinds)
    with pytest.raises(BpfError, match="no perf event array: EINVAL"):
        PerfReader(no_events, PAGE, kinds)
    with pytest.raises(BpfError, match="records of 65535 bytes in a perf buffer: E2BIG"):
        PerfReader(events, PAGE, [RecordKind("long", 1, np.dtype("V65535"))])
    assert descriptors() == before


@pytest.mark.skipif(len(CPUS) == 1, reason="the second CPU is the one that does not fit")
def test_a_map_with_too_few_entries_is_an_error_and_leaves_nothing(perf_object: Path) -> None:
    with BpfObject(perf_object, programs=("perf_enter",), map_entries={"events": 1}) as it:
        kinds = it.record_kinds({"record": None})
        before = descriptors()
        with pytest.raises(BpfError, match=r"the perf event of CPU \d+ into its map: E2BIG"):
            PerfReader(it.map_fd("events"), PAGE, kinds)
        assert descriptors() == before


def test_whichever_descriptor_is_one_too_many_none_is_left(loaded_object: BpfObject) -> None:
    kinds = loaded_object.record_kinds({"record": None})
    events = loaded_object.map_fd("events")
    before = descriptors()
    steps: list[str] = []
    while error := error_with_descriptors(len(steps), events, kinds):
        assert error.errno == errno.EMFILE
        steps.append(error.what)
        del error
        assert descriptors() == before
    assert descriptors() == before
    assert {f"mapping the perf buffer of CPU {cpu}" for cpu in CPUS} <= set(steps)
    assert {f"opening a perf event on CPU {cpu}" for cpu in CPUS[1:]} <= set(steps)


def error_with_descriptors(count: int, map_fd: int, kinds: Sequence[RecordKind]) -> BpfError | None:
    """The error of a reader that may use the given number of descriptors; None if they suffice."""
    taken = {int(number) for number in descriptors()}
    free = [number for number in range(len(taken) + count + 1) if number not in taken]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], limits[1]))
    try:
        PerfReader(map_fd, PAGE, kinds).close()
    except BpfError as error:
        return error
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    return None
