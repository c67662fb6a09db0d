"""Profiles of programs that say what they spent their CPU time in."""

from __future__ import annotations

import math
import platform
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.profiling import (
    NS_PER_S,
    Profile,
    collector_of,
    profiled,
    profiling,
    read_at_the_end,
    waiting,
)
from tests.support import PATIENCE

pytestmark = pytest.mark.usefixtures("nothing_left")

LEVELS = [f"level_{number}" for number in range(1, 10)]
FAST_HZ = 499


def close_to_truth(profile: Profile, names: list[str]) -> None:
    """The shares of NAMES are those of the truth, within four standard errors, and 3 points."""
    truth = {name: profile.truth[name] for name in names}
    total = sum(truth.values())
    shares = profile.shares(names)
    count = sum(profile.among(name) for name in names)
    print(f"{count} samples: {shares}, {truth}, ends {profile.by('end')}")
    for name in names:
        expected = truth[name] / total
        error = 4 * math.sqrt(expected * (1 - expected) / max(1, count))
        assert abs(shares[name] - expected) <= max(0.03, error)


@pytest.fixture(scope="module")
def shares(programs: Path) -> Profile:
    """Of 3 s of CPU time, ten calls deep, without frame pointers."""
    return profiled(programs / "profiled", "shares", 3000, frequency=FAST_HZ)


def test_shares_of_functions_are_their_cpu_time(shares: Profile) -> None:
    close_to_truth(shares, ["spend_most", "spend_some", "spend_little"])


def test_stacks_without_frame_pointers_are_whole(shares: Profile) -> None:
    spending = [row for row in shares.rows if any(it.startswith("spend_") for it in row.stack)]
    assert sum(row.count for row in spending) > 0.9 * shares.samples
    for row in spending:
        assert row.end == pb.CPU_STACK_END_BOTTOM
        assert row.unwinding == pb.CPU_UNWINDING_EH_FRAME
        begin = list(row.stack).index("main")
        assert row.stack[begin + 1 : begin + 10] == LEVELS
        assert row.stack[begin + 10].startswith("spend")


def test_every_sample_is_accounted_for(shares: Profile) -> None:
    assert shares.account["samples"] == shares.samples
    assert shares.account["samples_lost"] == sum(shares.losses.values()) == 0


def test_functions_in_step_with_the_clock_have_their_shares(programs: Path) -> None:
    """At 100 Hz, a loop of 10 ms would be met at the same place each time."""
    profile = profiled(programs / "profiled", "phases", 3000, frequency=100)
    close_to_truth(profile, ["phase_even", "phase_odd"])


@pytest.mark.pace
def test_samples_of_each_thread_are_its_cpu_time_times_the_frequency(programs: Path) -> None:
    profile = profiled(programs / "profiled", "threads", 1800, frequency=999)
    by_name = {"full": 0, "third": 0}
    for row in profile.rows:
        if row.comm in by_name:
            by_name[row.comm] += row.count
    print(f"{by_name} samples, {profile.truth}")
    for name, count in by_name.items():
        expected = profile.truth[f"work_{name}"] * 999
        assert abs(count - expected) <= 0.02 * PATIENCE * expected + 4 * math.sqrt(expected) / 2


def test_waiting_threads_are_not_in_it(programs: Path) -> None:
    profile = profiled(programs / "profiled", "threads", 600, frequency=FAST_HZ)
    assert profile.among("work_full") > 50
    assert profile.among("wait_in_read") + profile.among("wait_in_poll") <= 0.01 * profile.samples


@pytest.mark.pace
def test_children_that_have_ended_have_names(programs: Path) -> None:
    profile = profiled(programs / "profiled", "children", 1600, frequency=FAST_HZ)
    close_to_truth(profile, ["child_even", "child_odd"])
    assert len(profile.by("tgid")) > 20
    assert profile.among("child_even") + profile.among("child_odd") > 0.9 * profile.samples


@pytest.mark.pace
def test_two_programs_of_a_process_are_told_apart(programs: Path) -> None:
    profile = profiled(programs / "profiled", "exec", 2000, frequency=FAST_HZ)
    close_to_truth(profile, ["before_exec", "after_exec"])
    assert len(profile.by("tgid")) == 1


@pytest.mark.pace
def test_programs_that_run_for_a_moment_have_names(programs: Path) -> None:
    """A shell runs one after the other, each for a tenth of a second."""
    turn = f"echo x | {programs}/profiled shares 100 >/dev/null"
    script = f"read go; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do {turn}; done"
    profile = profiled("sh", "-c", script, frequency=FAST_HZ)
    assert len(profile.by("tgid")) >= 12
    named = sum(profile.among(name) for name in ("spend_most", "spend_some", "spend_little"))
    print(f"{named} of {profile.samples} samples, ends {profile.by('end')}")
    assert named > 0.75 * profile.samples


@pytest.mark.pace
def test_programs_of_one_interval_have_their_own_names(programs: Path) -> None:
    """A process that was idle when the session began is a shell, then another program, and has
    ended, before the first batch is read."""
    count = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"
    script = f"read go; {count}; exec {programs}/profiled shares 1000 </dev/null"
    process = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        collector, profile = collector_of({"pid": str(process.pid), "frequency": "499"}), Profile()
        try:
            collector.open()
            process.communicate(b"x")
            collector.bpf_object.detach()
            profile.add(collector.drain())
        finally:
            collector.close()
    by_program = Counter[str]()
    for row in profile.rows:
        assert row.end != pb.CPU_STACK_END_PROCESS_GONE
        by_program[row.process] += row.count
        assert row.process == "profiled" or not any(it.startswith("spend_") for it in row.stack)
    print(by_program, profile.by("end"))
    assert set(by_program) == {"sh", "profiled"}
    assert min(by_program.values()) > 20
    spent = sum(profile.among(name) for name in ("spend_most", "spend_some", "spend_little"))
    assert spent > 0.9 * by_program["profiled"]


def test_a_process_that_ends_before_anything_is_read_of_it_has_names(programs: Path) -> None:
    """It runs since before the session: its first sample tells of it, and no mapping does."""
    with waiting(programs / "profiled", "shares", 600) as process:
        profile, _ = read_at_the_end(process, frequency=200)
    assert profile.samples > 50
    assert profile.among("spend_most") > 0.5 * profile.samples


def test_the_kernel_is_above_the_function_that_called_it(programs: Path) -> None:
    profile = profiled(programs / "profiled", "system", 2000, frequency=FAST_HZ)
    close_to_truth(profile, ["read_zeros", "ask_parent", "spend_little"])
    in_kernel = [row for row in profile.rows if row.in_kernel]
    assert sum(row.count for row in in_kernel) > 0.3 * profile.samples
    reading = [row for row in in_kernel if "read_zeros" in row.stack]
    asking = [row for row in in_kernel if "ask_parent" in row.stack]
    assert sum(row.count for row in reading if "vfs_read" in row.stack) > 0.2 * profile.samples
    assert not any("__do_sys_getppid" in row.stack for row in reading)
    assert not any("vfs_read" in row.stack for row in asking)
    for row in reading + asking:
        assert list(row.stack).index("main") < len(row.stack) - 3


def test_signal_handlers_lie_on_what_they_interrupted(programs: Path) -> None:
    profile = profiled(programs / "profiled", "signals", 1500, frequency=FAST_HZ)
    handling = [row for row in profile.rows if "handle_signal_work" in row.stack]
    assert sum(row.count for row in handling) > 20
    for row in handling:
        assert row.end == pb.CPU_STACK_END_BOTTOM
        interrupted = row.stack[: list(row.stack).index("handle_signal_work")]
        assert "main" in interrupted or "exit" in interrupted  # the timer goes on after main


@pytest.mark.skipif(platform.machine() != "x86_64", reason="glibc says so itself elsewhere")
def test_a_coroutine_ends_where_its_context_began(programs: Path) -> None:
    profile = profiled(programs / "profiled", "coroutine", 500, frequency=FAST_HZ)
    spending = [row for row in profile.rows if any(it.startswith("spend_") for it in row.stack)]
    assert sum(row.count for row in spending) > 0.8 * profile.samples
    for row in spending:
        assert row.end == pb.CPU_STACK_END_BOTTOM
        assert "main" not in row.stack
        assert list(row.stack).index("level_1") <= 2  # below it: the coroutine, and libc's code


def test_a_stack_deeper_than_the_copy_says_so(programs: Path) -> None:
    profile = profiled(programs / "profiled", "deep", 1000, frequency=FAST_HZ, stack_bytes=4096)
    spending = [row for row in profile.rows if any(it.startswith("spend_") for it in row.stack)]
    assert sum(row.count for row in spending) > 0.9 * profile.samples
    for row in spending:
        assert row.end == pb.CPU_STACK_END_COPY_TOO_SHORT
        assert "main" not in row.stack
        assert row.stack[0] == "descend"
    assert profile.account["samples_truncated"] >= sum(row.count for row in spending)


def test_frame_pointers_alone_cost_no_copy(programs: Path) -> None:
    profile = profiled(programs / "profiled", "shares", 500, frequency=FAST_HZ, stack_bytes=0)
    assert profile.samples > 50
    assert {row.unwinding for row in profile.rows} <= {
        pb.CPU_UNWINDING_FRAME_POINTERS,
        pb.CPU_UNWINDING_UNSPECIFIED,
    }


@pytest.mark.pace
def test_sessions_of_one_process_have_their_own_frequencies(programs: Path) -> None:
    with (
        waiting(programs / "profiled", "shares", 1500) as process,
        profiling(pid=process.pid, frequency=100) as slow,
        profiling(pid=process.pid, frequency=800, stack_bytes=0) as fast,
    ):
        out, _ = process.communicate("x")
    seconds = sum(int(line.split()[1]) for line in out.splitlines()) / NS_PER_S
    print(f"{slow.samples} and {fast.samples} samples of {seconds} s")
    for profile, frequency in ((slow, 100), (fast, 800)):
        # A timer is late where a busy host keeps the CPU for itself, and never early. The accuracy
        # is for another test: here, neither session may have the frequency of the other.
        expected = frequency * seconds
        assert 0.5 * expected < profile.samples <= 1.03 * PATIENCE * expected + 4 * 0.5 * 12
        assert {row.period_ns for row in profile.rows} == {int(NS_PER_S) // frequency}
    assert fast.samples > 2 * slow.samples
    assert set(slow.by("unwinding")) == {pb.CPU_UNWINDING_EH_FRAME}
    assert pb.CPU_UNWINDING_EH_FRAME not in fast.by("unwinding")


@pytest.mark.pace
def test_samples_without_room_are_counted(programs: Path) -> None:
    """The ring has room for some tens of stacks of 400 calls, and nothing empties it."""
    with waiting(programs / "profiled", "deep", 1000) as process:
        profile, out = read_at_the_end(process, frequency=500, ring="256KiB", stack_bytes="16KiB")
    seconds = sum(int(line.split()[1]) for line in out.splitlines()) / NS_PER_S
    lost = profile.losses[pb.Loss.STAGE_KERNEL_BUFFER]
    print(f"{profile.samples} samples, {lost} lost, of {seconds} s")
    assert 5 < profile.samples < 100
    assert profile.account["samples_lost"] == lost == sum(profile.losses.values())
    expected = 500 * seconds
    assert abs(profile.samples + lost - expected) <= 0.03 * PATIENCE * expected + 4 * 0.5 * 12
