"""Programs that run at a fixed frequency on every CPU, against getrusage."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from coral.bpf import AttachError
from coral.bpf.attaching.each_cpu import CpuEvent, EachCpu, online_cpus
from coral.bpf.attaching.sampling import CycleCounter, cpu_clock, cycle_counter, sample_with
from coral.bpf.probing.features import probe
from tests.attaching import toy
from tests.support import PATIENCE, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left", "no_descriptors_left")

PROGRAM = "count_samples"
FREQ_HZ = 499
IOC_DISABLE = 0x2401


def burn(program: Path, milliseconds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [program / "burn", str(milliseconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_samples_are_the_cpu_time_times_the_frequency(
    attaching_object: Path, programs: Path
) -> None:
    """Each stretch that the process runs without a switch has at most one sample more or less than
    its length says, evenly spread: a standard deviation of 0.41 (the difference of two uniform
    phases). Four of them make a chance of 1 in 16,000. While a virtual machine is not run, time may
    be charged without samples, or the reverse: at most its steal time, which an emulator does not
    tell."""
    process = burn(programs, 1500)
    with (
        process,
        toy(attaching_object, PROGRAM, wanted_tgid=process.pid) as bpf_object,
        sample_with(bpf_object.program_fd(PROGRAM), FREQ_HZ) as events,
    ):
        assert events.cpus == online_cpus()
        stolen_before_s = stolen_s()
        out, _ = process.communicate("x")
        missed = (stolen_s() - stolen_before_s) * FREQ_HZ
        samples = int(bpf_object.read_variable("samples").sum())
    cpu_ns, switches = map(int, out.split())
    expected = cpu_ns * FREQ_HZ / 1e9
    if PATIENCE > 1:
        missed = 0.5 * expected
    spread = 4 * 0.41 * math.sqrt(switches + 1) + 1  # 1: starting and ending are not in its figure
    print(f"{samples} samples of {expected:.1f}, {switches} switches, {missed:.1f} stolen")
    assert expected - spread - missed <= samples <= expected + spread + missed


def stolen_s() -> float:
    """The time that this machine was not run, over all CPUs."""
    ticks = int(Path("/proc/stat").read_text().split()[8])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_nothing_is_sampled_once_closed(attaching_object: Path, programs: Path) -> None:
    process = burn(programs, 50)
    with process, toy(attaching_object, PROGRAM, wanted_tgid=process.pid) as bpf_object:
        events = sample_with(bpf_object.program_fd(PROGRAM), FREQ_HZ)
        events.close()
        events.close()
        process.communicate("x")
        assert bpf_object.read_variable("samples").sum() == 0


def test_events_follow_the_cpus_that_are_online(attaching_object: Path, programs: Path) -> None:
    """With a list of CPUs of our own: a test must not take a CPU from others."""
    cpus = online_cpus()
    online = set(cpus[:1])
    process = burn(programs, 300)
    os.sched_setaffinity(process.pid, {cpus[-1]})
    with (
        process,
        toy(attaching_object, PROGRAM, wanted_tgid=process.pid) as bpf_object,
        sample_with(bpf_object.program_fd(PROGRAM), FREQ_HZ, online=lambda: online) as events,
    ):
        assert events.cpus == cpus[:1]
        online = set(cpus)
        events.follow()
        assert events.cpus == cpus
        process.communicate("x")
        counted = bpf_object.read_variable("samples")
        assert counted[cpus[-1]] == counted.sum() > 0.5 * 0.3 * FREQ_HZ
        online = set(cpus[1:])
        events.follow()
        assert events.cpus == cpus[1:] or len(cpus) == 1


@pytest.mark.own_machine
def test_a_cpu_that_was_away_is_sampled_again(attaching_object: Path, programs: Path) -> None:
    """Whether or not `follow` saw it away; the kernel alone does not sample it again."""
    cpus = online_cpus()

    def samples_there_after(meanwhile: Callable[[EachCpu], None]) -> int:
        process = burn(programs, 500)
        with (
            process,
            toy(attaching_object, PROGRAM, wanted_tgid=process.pid) as bpf_object,
            sample_with(bpf_object.program_fd(PROGRAM), FREQ_HZ) as events,
        ):
            meanwhile(events)
            os.sched_setaffinity(process.pid, {cpus[-1]})
            process.communicate("x")
            return int(bpf_object.read_variable("samples")[cpus[-1]])

    def away_unseen(_: EachCpu) -> None:
        set_online(cpus[-1], online=False)
        set_online(cpus[-1], online=True)

    def away_and_seen(events: EachCpu) -> None:
        events.follow()
        set_online(cpus[-1], online=False)
        events.follow()
        assert events.cpus == cpus[:-1]
        set_online(cpus[-1], online=True)
        events.follow()
        assert events.cpus == cpus

    def away_and_not_seen(events: EachCpu) -> None:
        events.follow()
        away_unseen(events)
        events.follow()  # the time that it was there
        events.follow()
        assert events.cpus == cpus

    assert samples_there_after(away_unseen) == 0
    assert samples_there_after(away_and_seen) > 0.5 * 0.5 * FREQ_HZ
    assert samples_there_after(away_and_not_seen) > 0.5 * 0.5 * FREQ_HZ


def set_online(cpu: int, *, online: bool) -> None:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/online")
    path.write_text(str(int(online)))
    assert (cpu in online_cpus()) == online


def test_an_event_that_stopped_while_its_cpu_was_away_is_opened_again() -> None:
    retired = []
    with EachCpu(partial(cpu_clock, freq_hz=1), retire=lambda e: retired.append(e.cpu)) as events:
        first = next(iter(events))
        events.follow()
        events.follow()
        assert retired == []
        fcntl.ioctl(first.fd, IOC_DISABLE, 0)  # as the kernel does
        events.follow()  # its time went on until then
        events.follow()
        assert retired == [first.cpu]
        assert events.cpus == online_cpus()
        assert first not in list(events)


def test_a_cpu_that_has_just_gone_offline_is_no_error_but_no_cpu_at_all_is() -> None:
    def open_(cpu: int) -> CpuEvent:
        if cpu == cpus[-1]:
            raise OSError(errno.ENODEV, "as the kernel does")
        return cpu_clock(cpu, 1)

    cpus = [*online_cpus(), 1000]
    with EachCpu(open_, online=lambda: cpus) as events:
        assert events.cpus == cpus[:-1]
    with pytest.raises(AttachError, match="on any CPU: ENODEV"):
        EachCpu(open_, online=lambda: cpus[-1:])


def test_a_program_of_another_kind_is_refused_and_nothing_is_left() -> None:
    with (
        Path(os.devnull).open() as no_program,
        pytest.raises(AttachError, match="on CPU 0: EINVAL"),
    ):
        sample_with(no_program.fileno(), FREQ_HZ)


def test_a_frequency_that_the_kernel_does_not_allow_is_told_with_the_limit() -> None:
    limit = int(Path("/proc/sys/kernel/perf_event_max_sample_rate").read_text())
    for freq_hz in (0, limit + 1):
        with pytest.raises(AttachError, match=f"at {freq_hz} Hz: .* allows 1 to {limit}: EINVAL"):
            sample_with(-1, freq_hz)


COUNTS_CYCLES: Final = """
from coral.bpf.attaching.sampling import cycle_counter
try:
    cycle_counter(0, 30_000_007)
except OSError as error:
    print(error.errno)
"""


def test_the_kernel_is_asked_for_cycles_of_a_fixed_period(tmp_path: Path) -> None:
    log = tmp_path / "strace.out"
    asked = ("strace", "-f", "-e", "trace=perf_event_open", "-v", "-o", str(log))
    done = subprocess.run(
        (*asked, sys.executable, "-P", "-c", COUNTS_CYCLES), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    (call,) = [line for line in log.read_text().splitlines() if "perf_event_open(" in line]
    print(call)
    attributes = dict(re.findall(r"(\w+)=(\w+)", call))
    assert (attributes["type"], attributes["config"]) == (
        "PERF_TYPE_HARDWARE",
        "PERF_COUNT_HW_CPU_CYCLES",
    )
    assert attributes["sample_period"] == "30000007"
    assert "}, -1, 0, -1, PERF_FLAG_FD_CLOEXEC)" in call
    assert {name for name, value in attributes.items() if value == "1"} == {
        "disabled",
        "pinned",
        "exclude_hv",
        "exclude_guest",
    }


def test_cycles_are_counted_or_refused_with_nothing_left_open(attaching_object: Path) -> None:
    with toy(attaching_object, PROGRAM, wanted_tgid=os.getpid()) as bpf_object:
        program = bpf_object.program_fd(PROGRAM)
        if probe()["cpu_cycles"].available:
            with CycleCounter(program, FREQ_HZ, 7) as counter:
                assert counter.period_cycles % 64 == 7
                wait_until(lambda: bpf_object.read_variable("samples").sum() > 0)
            return
        with pytest.raises(AttachError) as refused:
            CycleCounter(program, FREQ_HZ, 7)
        assert refused.value.errno == errno.ENOENT


def test_a_counter_that_the_kernel_does_not_give_is_an_error() -> None:
    """A pinned event reads as empty where its CPU has no counter left; some machines have none."""

    def take_all(held: ExitStack) -> None:
        for _ in range(64):  # more than any CPU has
            held.callback(cycle_counter(0, 1 << 40).close)

    with ExitStack() as held, pytest.raises(OSError) as refused:  # noqa: PT011  see below
        take_all(held)
    assert ("in use" in str(refused.value)) == probe()["cpu_cycles"].available
