"""Records and accounts of a session on the real kernel: kinds and sizes, wake-ups, interrupts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coral.bpf import BpfObject, RecordReader, probe
from coral.bpf.buffers.account import Account
from coral.bpf.buffers.perf_event import open_perf_event
from coral.bpf.buffers.records import Records, drain_whole
from tests.support import compiled

pytestmark = pytest.mark.usefixtures("nothing_left")

SLOT = 5
RING = 1 << 16
ADDITIONS = 256
KINDS: Mapping[str, str | None] = {"small": "seq", "middle": "seq", "big": "seq"}
SOFTWARE, CPU_CLOCK, DISABLED = 1, 0, 1
SET_BPF, ENABLE = 0x40042408, 0x2400


@pytest.fixture(scope="module")
def records_object() -> Path:
    return compiled("records")


@pytest.fixture(params=["ring", "perf"])
def in_ring(request: pytest.FixtureRequest) -> bool:
    if request.param == "ring" and (reason := probe()["ring_buffer"].reason):
        pytest.skip(reason)
    return bool(request.param == "ring")


@contextmanager
def sending(
    path: Path, *, in_ring: bool, most: int = RING
) -> Iterator[tuple[BpfObject, RecordReader, Account]]:
    """An attached object that sends a record for each getppid of this process."""
    with BpfObject(
        path,
        programs=("records_enter",),
        options={"wanted_tgid": os.getpid(), "records_in_ring": in_ring},
        without_maps=("perfs", "record_drafts") if in_ring else ("rings",),
    ) as it:
        kinds = it.record_kinds(KINDS)
        reader: RecordReader
        if in_ring:
            reader = it.ring("rings", kinds, ring_bytes=most, slot=SLOT)
        else:
            reader = it.perf("perfs", kinds, bytes_per_cpu=most, slot=SLOT)
        account = Account(
            it.map("accounts"),
            SLOT,
            it.btf.enum("loss"),
            [it.program_fd(name) for name in it.programs],
        )
        it.attach()
        yield it, reader, account


def call_getppid(times: int) -> None:
    for _ in range(times):
        os.getppid()


def numbers(first: int, count: int) -> dict[str, list[int]]:
    """The numbers of the records by kind that as many calls send."""
    kinds = {3: "middle", 4: "big", 5: "discarded"}
    found: dict[str, list[int]] = {name: [] for name in (*KINDS, "discarded")}
    for number in range(first, first + count):
        found[kinds.get(number % 7, "small")].append(number)
    del found["discarded"]
    return found


def check(records: Records) -> dict[str, list[int]]:
    """The numbers of the records by kind, whose contents it checks."""
    for name in ("middle", "big"):
        same: NDArray[Any] = records[name]["same"]
        assert (same == records[name]["seq"][:, np.newaxis]).all()
    return {name: of_kind["seq"].tolist() for name, of_kind in records.items()}


def test_records_of_all_kinds_and_sizes_arrive_while_the_buffer_wraps(
    records_object: Path, *, in_ring: bool
) -> None:
    with sending(records_object, in_ring=in_ring) as (_, reader, account):
        for turn in range(100):  # 70 calls take 39 KiB: the buffer wraps every other time
            call_getppid(70)
            assert check(drain_whole(reader)) == numbers(70 * turn, 70)
            assert account.read() == (60, 0, {})
        assert reader.pending_bytes == 0


def test_a_drain_is_bounded_and_the_rest_stays(records_object: Path, *, in_ring: bool) -> None:
    with sending(records_object, in_ring=in_ring, most=1 << 20) as (_, reader, _):
        call_getppid(1_500)
        parts = [check(reader.drain(70_000))]
        assert reader.pending_bytes
        while reader.pending_bytes:
            parts.append(check(reader.drain(70_000)))
        most = max(
            16 * len(part["small"]) + 44 * len(part["middle"]) + 1936 * len(part["big"])
            for part in parts
        )
        assert most <= 70_000
        assert len(parts) >= 8
        joined = {name: [n for part in parts for n in part[name]] for name in KINDS}
        if in_ring:
            assert joined == numbers(0, 1_500)
        else:  # sorted within each drain
            assert {name: sorted(part) for name, part in joined.items()} == numbers(0, 1_500)


def test_what_does_not_fit_is_lost_by_the_account(records_object: Path, *, in_ring: bool) -> None:
    with sending(records_object, in_ring=in_ring, most=4096) as (_, reader, account):
        call_getppid(7_000)
        got = sum(len(of_kind) for of_kind in check(drain_whole(reader)).values())
        produced, seen, lost = account.read()
        assert (produced, seen) == (7_000 - 1_000 + discarded_refused(lost, got), 0)
        assert lost == {"BUFFER_FULL": produced - got}
        assert 0 < got < 1_000


def discarded_refused(lost: Mapping[str, int], got: int) -> int:
    """How many of the records to be discarded found no room, and count as lost, too."""
    return lost["BUFFER_FULL"] + got - 6_000


def test_the_kernel_wakes_a_reader_at_rest_once(records_object: Path) -> None:
    if reason := probe()["ring_buffer"].reason:
        pytest.skip(reason)
    with sending(records_object, in_ring=True) as (_, reader, _):
        assert reader.wakes_at_rest
        for _ in range(5):
            assert reader.rest()
            assert reader.wakeup.poll(0) == []
            call_getppid(1)
            assert len(reader.wakeup.poll(5)) == 1
            assert not reader.rest()
            call_getppid(3)
            assert len(drain_whole(reader)["small"]) > 0
            call_getppid(20)  # 12 KiB: less than a quarter of the ring; nobody rests
            assert reader.wakeup.poll(0) == []
            drain_whole(reader)
        assert not reader.filling
        call_getppid(70)
        assert reader.filling
        assert len(reader.wakeup.poll(5)) == 1


def test_a_discarded_record_does_not_keep_the_next_one_from_waking_the_reader(
    records_object: Path,
) -> None:
    if reason := probe()["ring_buffer"].reason:
        pytest.skip(reason)
    with sending(records_object, in_ring=True) as (_, reader, _):
        call_getppid(5)
        drain_whole(reader)
        assert reader.rest()
        call_getppid(1)  # discarded
        reader.wakeup.poll(5)
        assert not any(map(len, drain_whole(reader).values()))
        assert reader.rest()
        call_getppid(1)
        assert len(reader.wakeup.poll(5)) == 1


def test_a_program_in_an_interrupt_takes_nothing_from_the_account(records_object: Path) -> None:
    options = {"wanted_tgid": os.getpid(), "additions": True}
    cpus = os.sched_getaffinity(0)
    cpu = min(cpus)
    with BpfObject(
        records_object,
        programs=("records_enter",),
        walks=("records_tick",),
        options=options,
        without_maps=("perfs", "record_drafts"),
    ) as it:
        account = Account(it.map("accounts"), SLOT, it.btf.enum("loss"))
        ticks = open_perf_event(SOFTWARE, CPU_CLOCK, cpu, period=50_000, flags=DISABLED)
        os.sched_setaffinity(0, {cpu})
        try:
            fcntl.ioctl(ticks, SET_BPF, it.program_fd("records_tick"))
            fcntl.ioctl(ticks, ENABLE, 0)
            it.attach()
            calls = 0
            while it.read_variable("ticks") < 5_000:
                call_getppid(1_000)
                calls += 1_000
        finally:
            os.close(ticks)
            os.sched_setaffinity(0, cpus)
        interrupted = int(it.read_variable("ticks"))
        assert account.read().seen == ADDITIONS * calls + interrupted
