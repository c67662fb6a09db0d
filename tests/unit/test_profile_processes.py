"""Which memory samples were taken in: of real processes, running and ended."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coral.bpf.attaching.mappings import MappedCode
from coral.collectors.cpu_profile.processes import Process, Processes
from coral.collectors.procfs import start_time_of
from coral.collectors.symbols.files import MappedFiles
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.symbols.names import Symbolizer
from tests.support import wait_until

SAMPLE = np.dtype(
    [(name, "u8") for name in ("tgid", "born", "execs", "parent", "parent_execs", "time_ns")]
)


def sample(  # noqa: PLR0917
    tgid: int,
    execs: int = 3,
    parent: int = 1,
    parent_execs: int = 0,
    time_ns: int = 0,
    born: int = 77,
) -> Any:
    """A sample taken now, if no time is given."""
    time_ns = time_ns or time.monotonic_ns()
    return np.array([(tgid, born, execs, parent, parent_execs, time_ns)], SAMPLE)[0]


def born_of(tgid: int) -> int:
    """As the programs tell it."""
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    started = start_time_of(tgid)
    assert started is not None
    return int((started / os.sysconf("SC_CLK_TCK") - asleep_s) * 1e9 / 1024) % (1 << 32) | 1


@pytest.fixture
def processes() -> Iterator[Processes]:
    symbolizer = Symbolizer()
    yield Processes(symbolizer)
    symbolizer.close()


@pytest.fixture
def ended() -> int:
    with subprocess.Popen(["true"]) as process:
        return process.pid


def test_a_process_is_the_same_at_each_of_its_samples(processes: Processes) -> None:
    first = processes.of(sample(os.getpid()), newest=True)
    assert first.maps.generations
    assert processes.of(sample(os.getpid()), newest=True) is first
    assert len(processes) == 1


def test_a_child_that_has_ended_has_the_memory_of_its_parent(
    processes: Processes, ended: int
) -> None:
    parent = processes.of(sample(os.getpid()), newest=True)
    child = processes.of(sample(ended, parent=os.getpid(), parent_execs=3), newest=True)
    assert child.maps is parent.maps


def test_the_parent_need_not_have_been_sampled(processes: Processes, ended: int) -> None:
    child = processes.of(sample(ended, parent=os.getpid(), parent_execs=3), newest=True)
    assert child.maps.tgid == os.getpid()
    assert child.maps.generations


def test_a_child_that_has_executed_a_program_has_not(processes: Processes, ended: int) -> None:
    child = processes.of(sample(ended, parent=os.getpid(), parent_execs=2), newest=True)
    assert not child.maps.generations


def test_samples_of_before_an_exec_are_not_those_of_what_runs_now(processes: Processes) -> None:
    before = processes.of(sample(os.getpid(), execs=3), newest=False)
    after = processes.of(sample(os.getpid(), execs=4), newest=True)
    assert not before.maps.generations
    assert after.maps.generations


def test_a_later_process_of_the_same_number_is_not_the_one_that_was_sampled(
    processes: Processes,
) -> None:
    before_ns = time.monotonic_ns()
    wait_until(lambda: time.monotonic_ns() > before_ns + 30_000_000)  # ticks are 10 ms
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as later:
        gone = processes.of(sample(later.pid, time_ns=before_ns), newest=True)
        assert not gone.maps.generations
        processes.meet([MappedCode(1, later.pid, 0, 4096, 0, 0, 0, "cat")])
        gone = processes.of(sample(later.pid, 4, time_ns=before_ns), newest=True)
        assert not gone.maps.generations
        there = np.array([(later.pid, 78, 5, 1, 0, time.monotonic_ns())], SAMPLE)[0]
        assert processes.of(there, newest=True).maps.generations


def test_a_process_that_was_met_has_its_memory_after_its_end(processes: Processes) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        processes.meet([MappedCode(1, process.pid, 0, 4096, 0, 0, 0, "cat")])
        born = born_of(process.pid)
    met = processes.of(sample(process.pid, born=born), newest=True)
    assert met.maps.tgid == process.pid
    assert met.maps.generations


def test_a_process_that_was_expected_has_its_memory_after_its_end(processes: Processes) -> None:
    """It was idle when the session began, and has worked and ended before the first batch."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        processes.expect([process.pid])
        born = born_of(process.pid)
    assert processes.of(sample(process.pid, born=born), newest=True).maps.generations


def test_a_process_is_not_taken_for_one_that_had_its_id(processes: Processes) -> None:
    """The first was met, but never sampled."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        processes.expect([process.pid])
        later = born_of(process.pid) + 100_000
    assert not processes.of(sample(process.pid, born=later), newest=True).maps.generations


def test_memory_that_was_told_too_soon_is_read_when_it_is_time(processes: Processes) -> None:
    """Nobody asks for it until the next batch, when the process may have ended."""
    mapped = MappedCode(1, os.getpid(), 0, 4096, 0, 0, 0, "")
    processes.meet([mapped])
    met = processes.of(sample(os.getpid(), born=born_of(os.getpid())), newest=True)
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC) as code:
        address = np.frombuffer(code, np.uint8).ctypes.data
        processes.meet([mapped])
        while (left_s := processes.catch_up()) is not None:
            assert 0 < left_s < 5
            time.sleep(left_s)
        found = met.maps.find(np.array([address], np.uint64))
        assert found[0] >= 0
    assert processes.catch_up() is None


def told(pid: int, of: int) -> list[MappedCode]:
    """What the kernel would tell if PID had executed the program of process OF."""
    code = []
    for line in Path(f"/proc/{of}/maps").read_text().splitlines():
        where, rights, offset, device, inode, *path = line.split()
        start, end = (int(one, 16) for one in where.split("-"))
        major, minor = (int(one, 16) for one in device.split(":"))
        if "x" in rights and (inode != "0" or path == ["[vdso]"]):
            file = (int(offset, 16), os.makedev(major, minor), int(inode), "".join(path))
            code.append(MappedCode(1, pid, start, end - start, *file))
    return code


def test_a_process_that_ended_at_once_has_what_was_told_of_it(
    processes: Processes, ended: int
) -> None:
    """The files are known from another process that has executed the same program."""
    other = processes.of(sample(os.getpid()), newest=True).maps
    code = told(ended, of=os.getpid())
    processes.meet(code[:1])
    processes.meet(code[1:])
    maps = processes.of(sample(ended, execs=9), newest=True).maps
    addresses = np.array([one.start for one in code], np.uint64)
    ids, theirs = maps.find(addresses), other.find(addresses)
    assert min(ids) >= 0
    files = [maps.files[maps.file_indexes[number]] for number in ids]
    assert files == [other.files[other.file_indexes[number]] for number in theirs]


def test_two_programs_that_were_told_are_not_taken_for_one(
    processes: Processes, ended: int
) -> None:
    processes.of(sample(os.getpid()), newest=True)
    code = told(ended, of=os.getpid())
    processes.meet([*code, *code])
    assert not processes.of(sample(ended, execs=9), newest=True).maps.generations


def test_a_program_is_known_if_it_was_read_before_the_next_one(processes: Processes) -> None:
    """What was mapped is what this process has; that it was told as of three programs is made up:
    the last but one was executed and over before anybody looked."""
    tgid, born = os.getpid(), born_of(os.getpid())
    processes.expect([tgid])
    first_ns = time.monotonic_ns()
    second_ns = first_ns + 1
    processes.meet([executed(tgid, second_ns)])
    third_ns = time.monotonic_ns()
    processes.meet([executed(tgid, third_ns), executed(tgid, third_ns + 1)])

    def at(time_ns: int, execs: int, *, newest: bool = False) -> Process:
        return processes.of(sample(tgid, execs, time_ns=time_ns, born=born), newest=newest)

    one = at(first_ns - 1, 3)
    assert one.maps.generations
    assert not at(third_ns, 5).maps.generations
    assert at(third_ns + 10, 6, newest=True) is one
    assert len(processes) == 1


def executed(tgid: int, time_ns: int) -> MappedCode:
    return MappedCode(time_ns, tgid, 0, 4096, 0, 0, 0, "[vdso]")


def test_what_is_mapped_after_an_exec_holds_from_the_exec_on() -> None:
    """A library that was loaded just before it was loaded by the program of before."""
    files = MappedFiles()
    command = ["sh", "-c", "echo; read line; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        maps = ProcessMaps(process.pid, files)
        process.stdin.write(b"\nmore\n")
        process.stdin.flush()
        process.stdout.readline()
        loaded_ns, executed_ns = maps.read_ns + 1, maps.read_ns + 2
        library = MappedCode(loaded_ns, process.pid, 0, 4096, 0, 0, 0, "/lib/libit.so")
        maps.mapped([library, library._replace(time_ns=executed_ns, path="[vdso]")])
        while (left_s := maps.catch_up()) is not None:
            time.sleep(left_s)
        process.stdin.close()
    assert [one.since_ns for one in maps.generations] == [0, executed_ns]
    files.close()


def test_what_was_read_after_an_exec_is_not_of_the_program_before(processes: Processes) -> None:
    met = processes.of(sample(os.getpid()), newest=True).maps
    address = met.starts[met.generations[-1].ids[:1]]
    executed_ns = met.read_ns - 1000
    processes.meet([MappedCode(executed_ns, os.getpid(), 0, 4096, 0, 0, 0, "[vdso]")])
    before, after = (np.array([executed_ns + of], np.uint64) for of in (-10, 10))
    assert met.find(address, before) < 0
    assert met.find(address, after) >= 0
