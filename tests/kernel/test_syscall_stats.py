"""`syscall_stats` against programs that make exactly N calls."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coral import bpf
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import PATIENCE, Calls, Family, at_work, summaries, totals

pytestmark = pytest.mark.usefixtures("nothing_left")


@contextmanager
def collecting(**config: str) -> Iterator[SyscallStatsCollector]:
    with at_work(SyscallStatsCollector.create(config, None, bpf.probe())) as collector:
        yield collector


def rows_until_exit(collector: SyscallStatsCollector, running: Calls) -> list[pb.SyscallStats]:
    """Lets it run, draining many times while it runs and once after its end."""
    running.go()
    rows: list[pb.SyscallStats] = []
    drains = 0
    while not running.has_ended():
        rows += _rows(collector)
        drains += 1
    rows += _rows(collector)
    assert drains >= 3, "the program ended too soon to be seen over several intervals"
    return rows


def _rows(collector: SyscallStatsCollector) -> list[pb.SyscallStats]:
    batch = collector.drain()
    assert not batch.losses
    return summaries(batch)


def of(rows: list[pb.SyscallStats], name: str) -> list[pb.SyscallStats]:
    return [row for row in rows if row.syscall_name == name]


def test_counts_are_exact_over_intervals_and_cpus(calls: Callable[..., Calls]) -> None:
    running = calls("getppid", 200_000, "openat", 500, threads=2)
    with collecting(pid=str(running.pid)) as collector:
        rows = rows_until_exit(collector, running)
    counted = totals(rows)
    assert counted["getppid"] == 400_000
    assert counted["openat"] == 1_000
    assert sum(row.error_count for row in of(rows, "openat")) == 1_000
    assert sum(row.errors_by_class["not_found"] for row in of(rows, "openat")) == 1_000
    assert sum(row.error_count for row in of(rows, "getppid")) == 0
    assert len(of(rows, "getppid")) >= 3
    for row in rows:
        assert sum(row.latency_ns.counts) == row.call_count
        assert row.pid == running.pid
        assert row.labels["comm"] == "calls"
        assert row.max_duration_ns <= row.total_duration_ns


def test_total_time_is_what_the_program_measured(calls: Callable[..., Calls]) -> None:
    running = calls("nanosleep", 1_000)
    with collecting(pid=str(running.pid)) as collector:
        rows = of(rows_until_exit(collector, running), "nanosleep")
    made = running.finish()
    assert sum(row.call_count for row in rows) == 1_000
    assert sum(row.total_duration_ns for row in rows) == pytest.approx(
        made.ns["nanosleep"], rel=0.02 * PATIENCE
    )
    # None is shorter than its millisecond: slots from 2^19 ns.
    first = rows[0].latency_ns.first_exponent
    assert sum(sum(row.latency_ns.counts[19 - first :]) for row in rows) == 1_000
    assert min(row.max_duration_ns for row in rows if row.call_count) >= 1_000_000


# A 64-bit program on arm64 cannot make 32-bit calls, but there are 32-bit programs: this one calls
# getppid 1,000 times, which has the same number as on x86.
ARM32 = """
        .globl _start
_start: mov r4, #1000
again:  mov r7, #64
        svc 0
        subs r4, r4, #1
        bne again
        mov r0, #0
        mov r7, #1
        svc 0
"""


def rows_of_arm32(directory: Path) -> list[pb.SyscallStats]:
    source, module, program = (directory / f"arm32{suffix}" for suffix in (".S", ".o", ""))
    source.write_text(ARM32)
    compiler = ("clang", "--target=armv7a-linux-gnueabi")
    subprocess.run([*compiler, "-c", source, "-o", module], check=True)
    subprocess.run(["ld", "-m", "armelf_linux_eabi", module, "-o", program], check=True)
    try:
        subprocess.run([program], check=True)
    except OSError as error:
        pytest.skip(f"no program of 32 bits runs here: {error.strerror}")
    with collecting(pid=str(os.getpid())) as collector:
        subprocess.run([program], check=True)
        return _rows(collector)


def test_calls_of_32_bit_programs_have_their_own_names(
    calls: Callable[..., Calls], tmp_path: Path
) -> None:
    if platform.machine() == "aarch64":
        rows, others = rows_of_arm32(tmp_path), 0
    else:
        running, others = calls("getppid", 300_000, "getppid32", 1_000), 300_000
        with collecting(pid=str(running.pid)) as collector:
            rows = rows_until_exit(collector, running)
    counted = Counter[int]()
    for row in of(rows, "getppid"):
        counted[row.syscall_number] += row.call_count
    assert counted.pop(4096 + 64) == 1_000
    assert sum(counted.values()) == others


def test_a_number_that_no_call_has_is_unknown(calls: Callable[..., Calls]) -> None:
    running = calls("getppid", 300_000, "futile", 7)
    with collecting(pid=str(running.pid)) as collector:
        counted = totals(rows_until_exit(collector, running))
    assert counted["unknown"] == 7
    assert counted["getppid"] == 300_000


def test_only_the_target_is_seen(calls: Callable[..., Calls]) -> None:
    target, other = calls("getppid", 300_000), calls("getppid", 300_000)
    with collecting(pid=str(target.pid)) as collector:
        other.go()
        rows = rows_until_exit(collector, target)
        other.finish()
        rows += _rows(collector)
    assert {row.pid for row in rows} == {target.pid}
    assert totals(rows)["getppid"] == 300_000


def test_every_row_names_its_process_however_short_its_life(programs: Path) -> None:
    family = Family(programs / "family", "fork", children=1000, calls=1)
    with collecting(pid=str(family.pid)) as collector:
        family.go()
        batches = []
        while family.is_running():
            batches.append(collector.drain())
        batches.append(collector.drain())
    rows = [row for batch in batches for row in summaries(batch)]
    # On a busy machine the kernel's allocator does not always keep up with so many new processes.
    uncounted = sum(sum(batch.losses.values()) for batch in batches)
    assert totals(rows)["getppid"] >= family.children - uncounted
    assert totals(rows)["getppid"] <= family.children
    assert uncounted < family.children
    assert {row.labels["comm"] for row in rows} == {"family"}


def test_include_and_exclude_filter_in_the_kernel(calls: Callable[..., Calls]) -> None:
    first = calls("getppid", 300_000, "openat", 100)
    with collecting(pid=str(first.pid), include="openat") as collector:
        assert totals(rows_until_exit(collector, first)) == {"openat": 100}
    second = calls("openat", 100, "getppid", 300_000)
    with collecting(pid=str(second.pid), exclude="getppid") as collector:
        counted = totals(rows_until_exit(collector, second))
    assert counted["openat"] == 100
    assert "getppid" not in counted
    assert counted["exit_group"] == 1


def test_rows_beyond_top_are_added_up(calls: Callable[..., Calls]) -> None:
    running = calls("getppid", 300_000, "openat", 1_000, "write", 1_000)
    with collecting(pid=str(running.pid), top="1") as collector:
        running.go()
        running.finish()
        rows = _rows(collector)
    first, other = rows
    assert (first.syscall_name, first.call_count) == ("getppid", 300_000)
    assert (other.syscall_name, other.pid, dict(other.labels)) == ("other", 0, {})
    assert other.call_count >= 2_000
    assert other.errors_by_class["not_found"] == 1_000
    assert sum(other.latency_ns.counts) == other.call_count


def test_the_longest_call_is_the_intervals_own(calls: Callable[..., Calls]) -> None:
    running = calls("nanosleep", 3, "getppid", 200_000)
    with collecting(pid=str(running.pid)) as collector:
        running.go()
        running.finish()
        first = _rows(collector)
        again = calls("getppid", 10)
        again.kill()
        second = _rows(collector)
    assert max(row.max_duration_ns for row in first) >= 1_000_000
    assert second == []


def test_a_process_that_has_ended_leaves_no_entry(calls: Callable[..., Calls]) -> None:
    running = calls("getppid", 300_000)
    with collecting(pid=str(running.pid)) as collector:
        rows_until_exit(collector, running)
        running.finish()
        deadline = time.monotonic() + 5
        while len(collector.bpf_object.map("members").read()[0]):
            assert time.monotonic() < deadline
            collector.drain()
        assert len(collector.bpf_object.map("stats").read()[0]) == 0


def test_a_full_map_is_counted(calls: Callable[..., Calls]) -> None:
    running = calls("openat", 5, "getppid", 1_000, "write", 50)
    config = {"pid": str(running.pid), "include": "openat,getppid,write", "entries": "1"}
    with collecting(**config) as collector:
        running.go()
        running.finish()
        batch = collector.drain()
    rows = summaries(batch)
    # The last write is the program's own report.
    assert totals(rows) == {"openat": 5}
    assert batch.losses == {pb.Loss.STAGE_MAP_FULL: 1_000 + 50 + 1}
