"""`syscall_stats` on hosts as they are: seccomp, execs and ids used again, programs of 32 bits, new
names. What strace counts is the measure."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from coral import bpf
from coral.collectors.syscall_stats import table as syscall_table
from tests.collecting import both_modes, collecting, every_rung, number_of, waiting
from tests.support import Family, Puppet, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

REFUSED = "mkdir" if "mkdir" in syscall_table.numbers() else "mkdirat"


def counted_by_strace(*command: object) -> dict[str, tuple[int, int]]:
    """Calls and errors by name, as `strace -c -f` has them."""
    strace = ["strace", "-c", "-f", "-U", "calls,errors,name", *map(str, command)]
    report = subprocess.run(strace, input=b"x", capture_output=True, check=True).stderr.decode()
    rows = re.findall(r"^ *(\d+) +(\d*) +(\w+)$", report, re.MULTILINE)
    return {name: (int(calls), int(errors or 0)) for calls, errors, name in rows}


@pytest.mark.parametrize("action", ["errno", "trap", "trace", "notify"])
@both_modes
@every_rung
def test_calls_that_seccomp_answers_are_counted_as_strace_counts_them(
    without: tuple[str, ...], mode: str, action: str, programs: Path
) -> None:
    command = (programs / "refused", action, 25)
    by_strace = counted_by_strace(*command)
    with (
        waiting(*command) as program,
        collecting(without, pid=str(program.pid), mode=mode) as counted,
    ):
        program.run()
    names = {REFUSED, "getppid", "ioctl", "rt_sigreturn"}
    by_us = {name: (counted.of(name), counted.errors[name]) for name in names & by_strace.keys()}
    assert by_us == {name: figures for name, figures in by_strace.items() if name in names}
    assert by_us[REFUSED][0] == by_us["getppid"][0] == 25
    assert not counted.losses


@every_rung
def test_sessions_that_begin_and_end_meanwhile_hide_no_refused_call(
    without: tuple[str, ...], programs: Path
) -> None:
    with (
        waiting(programs / "refused", "errno", 400_000) as program,
        collecting(without, pid=str(program.pid)) as counted,
    ):
        program.go()
        begun = 0
        while begun < 10 and not program.has_written(0):
            with collecting(without, pid=str(program.pid)) as other:
                wait_until(lambda: other.drain().rows or program.has_written(0))
            begun += 1
        program.finish()
    assert begun >= 2
    assert counted.of(REFUSED) == counted.errors[REFUSED] == 400_000
    assert counted.of("getppid") == 400_000


@every_rung
def test_a_process_that_ends_before_its_calls_are_read_has_its_name(
    without: tuple[str, ...],
) -> None:
    """It has made more calls than a drain takes."""
    config = {"mode": "events", "include": "getppid", "ring": "16MiB"}
    with Puppet() as puppet, collecting(without, pid=str(puppet.pid), **config) as counted:
        puppet.getppid(20_000)
        assert puppet.leave() == 0
        wait_until(lambda: counted.drain() and counted.of("getppid") == 20_000)
    assert counted.by_comm("getppid") == {"python": 20_000}


@both_modes
@every_rung
def test_a_call_in_progress_at_the_start_is_no_refused_one(
    without: tuple[str, ...], mode: str
) -> None:
    with Puppet() as puppet, collecting(without, pid=str(puppet.pid), mode=mode) as counted:
        wait_until(lambda: puppet.is_in("read"))
        puppet.do("pass")
        puppet.do("pass")
    reads = counted.of("read")
    with (
        Puppet() as puppet,
        collecting(without, pid=str(puppet.pid), mode=mode) as counted,
        collecting(without, pid=str(puppet.pid)) as first,
    ):
        puppet.do("pass")
        wait_until(lambda: puppet.is_in("read"))
        with collecting(without, pid=str(puppet.pid), mode=mode) as second:
            puppet.do("pass")
            puppet.do("pass")
    assert [session.losses for session in (second, first, counted)] == [{}, {}, {}]
    # The call that it waits in at the start is in neither.
    assert second.of("read") == reads == 1
    assert first.of("read") == counted.of("read") == 2


@both_modes
@every_rung
def test_an_exec_by_another_thread_is_one_exec(
    without: tuple[str, ...], mode: str, programs: Path
) -> None:
    family = Family(programs / "family", "threadexec", children=20, calls=40)
    with collecting(without, pid=str(family.pid), mode=mode) as counted:
        family.run()
        states = counted.collector.bpf_object.object
        if states.map_fd("thread_hash") >= 0:
            assert len(states.map("thread_hash").read_keys()) == 0
    told = counted.losses.total()  # a busy machine may have no memory for a moment
    assert set(counted.by_pid("execve").values()) == {1}
    assert 20 - told <= counted.of("execve") <= 20
    assert 20 * 40 - told <= counted.of("getppid") <= 20 * 40
    assert set(counted.by_comm("getppid")) == {"exe"}


def test_calls_that_find_no_per_cpu_memory_are_counted_in_ordinary_memory() -> None:
    """Elements in `spare_stats` are made in advance here, and by programs where the kernel has no
    memory for those in `stats`."""
    if not bpf.probe()["elements_on_demand"].available:
        pytest.skip("all elements of `stats` have their memory in advance")
    with Puppet() as puppet, collecting(pid=str(puppet.pid)) as counted:
        stats, spare = map(counted.collector.bpf_object.map, ("stats", "spare_stats"))
        puppet.do("pass")
        known = np.concatenate((stats.read_keys(), spare.read_keys()))
        pairs = np.repeat(known[:1], 2)
        pairs["nr"] = numbers = [number_of("getppid"), number_of("close")]
        spare.write_many(pairs, np.zeros(2, spare.value_dtype))
        puppet.getppid(7)
        counted.drain()
        puppet.do("exec('for _ in range(3):\\n try: os.close(-1)\\n except OSError: pass')")
        counted.drain()
        assert not np.isin(numbers, stats.read_keys()["nr"]).any()
        assert (counted.of("getppid"), counted.of("close"), counted.errors["close"]) == (7, 3, 3)
        assert puppet.leave() == 0
        wait_until(lambda: counted.drain() and not len(spare.read_keys()))
    assert counted.of("getppid") == 7
    assert not counted.losses


@every_rung
def test_an_id_of_a_thread_that_execed_brings_no_exec_along(
    without: tuple[str, ...], programs: Path
) -> None:
    with Puppet() as puppet, collecting(without, pid=str(puppet.pid)) as counted:
        puppet.do("import threading, subprocess")
        puppet.do("ours, childs = os.pipe()")
        puppet.do("def run(): os.write(childs, b'%d' % threading.get_native_id()), "
                  "os.execv('/bin/true', ['true'])")  # fmt: skip
        puppet.do("child = os.fork() or threading.Thread(target=run).start() or time.sleep(9)")
        puppet.do("os.waitpid(child, 0)")
        tid = int(puppet.ask("os.read(ours, 100).decode()"))
        puppet.do(f"subprocess.run(['{programs}/stranger', '{tid}', '500'], check=True)")
    assert tid not in counted.by_pid("execve")
    assert counted.of_pid(tid) == {"getuid": 500, "exit_group": 1}


# Getppid, getuid32 and close(-1), then exit or exit_group, of a program of 32 bits.
X86_32 = """
        .globl _start
_start: mov $7, %esi
1:      mov $64, %eax
        int $0x80
        dec %esi
        jnz 1b
        mov $5, %esi
2:      mov $199, %eax
        int $0x80
        dec %esi
        jnz 2b
        mov $-1, %ebx
        mov $6, %eax
        int $0x80
        xor %ebx, %ebx
        mov $EXIT, %eax
        int $0x80
"""


@pytest.fixture(params=["exit", "exit_group"])
def narrow(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A program of 32 bits, and the name of its last call."""
    if platform.machine() != "x86_64":
        pytest.skip("a program for x86")
    source, program = tmp_path / "narrow.s", tmp_path / "narrow"
    number = {"exit": 1, "exit_group": 252}[request.param]
    source.write_text(X86_32.replace("EXIT", str(number)))
    subprocess.run(["as", "--32", source, "-o", tmp_path / "narrow.o"], check=True)
    subprocess.run(["ld", "-m", "elf_i386", tmp_path / "narrow.o", "-o", program], check=True)
    try:
        subprocess.run([program], check=True)
    except OSError as error:
        pytest.skip(f"no program of 32 bits runs here: {error.strerror}")
    return program, request.param


@both_modes
@every_rung
def test_a_program_of_32_bits_is_counted_to_its_exit(
    without: tuple[str, ...], mode: str, narrow: tuple[Path, str]
) -> None:
    program, last = narrow
    with Puppet() as puppet:
        puppet.do("import subprocess")
        with collecting(without, pid=str(puppet.pid), mode=mode) as counted:
            child = int(puppet.ask(f"(p := subprocess.Popen(['{program}'])).pid"))
            puppet.do("p.wait()")
    calls = counted.of_pid(child)
    assert {name: calls[name] for name in ("getppid", "getuid32", last)} == {
        "getppid": 7,
        "getuid32": 5,
        last: 1,
    }
    assert {"compat_1", "compat_252"}.isdisjoint(calls)


@pytest.mark.parametrize("option", ["include", "exclude"])
@every_rung
def test_include_and_exclude_know_calls_of_32_bits(
    without: tuple[str, ...], option: str, narrow: tuple[Path, str]
) -> None:
    program, last = narrow
    with Puppet() as puppet:
        puppet.do("import subprocess")
        config = {option: "getuid32,getppid,exit,exit_group"}
        with collecting(without, pid=str(puppet.pid), **config) as counted:
            child = int(puppet.ask(f"(p := subprocess.Popen(['{program}'])).pid"))
            puppet.do("p.wait()")
    calls = counted.of_pid(child)
    if option == "include":
        assert calls == {"getppid": 7, "getuid32": 5, last: 1}
    else:
        assert calls["close"] >= 1
        assert {"getppid", "getuid32", last}.isdisjoint(calls)


RENAME = "import ctypes; rename = lambda name: ctypes.CDLL(None).prctl(15, name, 0, 0, 0)"


@both_modes
@every_rung
def test_a_process_that_renames_itself_has_its_new_name(
    without: tuple[str, ...], mode: str
) -> None:
    with Puppet() as puppet:
        puppet.do(RENAME)
        puppet.do("rename(b'before')")
        with collecting(without, pid=str(puppet.pid), mode=mode) as counted:
            puppet.getppid(3)
            counted.drain()
            puppet.do("rename(b'renamed')")
            puppet.getppid(4)
            counted.drain()
            puppet.do("import threading")
            puppet.do("thread = threading.Thread(target=rename, args=(b'a thread',))")
            puppet.do("thread.start(), thread.join()")
            puppet.getppid(5)
            counted.drain()
            puppet.do(r"rename(b'\xff\xfe not text')")
            puppet.getppid(6)
    assert counted.by_comm("getppid") == {
        "before": 3,
        "renamed": 9,
        "\ufffd\ufffd not text": 6,
    }


@both_modes
@every_rung
def test_a_negative_result_that_is_no_error_is_none(without: tuple[str, ...], mode: str) -> None:
    seek = f"libc.syscall({number_of('lseek')}, memory, ctypes.c_long(-8192), 0)"
    with Puppet() as puppet:
        puppet.do("import ctypes; libc = ctypes.CDLL(None); memory = os.open('/proc/self/mem', 0)")
        puppet.do("libc.syscall.restype = ctypes.c_long")
        with collecting(without, pid=str(puppet.pid), mode=mode) as counted:
            assert puppet.ask(seek) == "-8192"
            assert puppet.ask(seek.replace("memory", "-1")) == "-1"
    assert counted.of("lseek") == 2
    assert counted.errors["lseek"] == 1


@every_rung
def test_a_sample_of_few_calls_has_no_bias(without: tuple[str, ...]) -> None:
    few = rare = 0
    with Puppet() as puppet, collecting(without, pid=str(puppet.pid)):  # so that starts are cheap
        config = {"pid": str(puppet.pid), "mode": "events", "include": "getppid"}
        for _ in range(40):
            with (
                collecting(without, **config, sample="4") as some,
                collecting(without, **config, sample="1000000") as none,
            ):
                puppet.getppid(8)
            few += some.of("getppid")
            rare += none.of("getppid")
    # Of 320 calls one in four: 80, give or take five times 7.7. Of one in a million none.
    assert few == pytest.approx(80, abs=39)
    assert rare == 0


def test_interrupted_and_restarted_calls_are_counted_as_strace_counts_them(
    programs: Path,
) -> None:
    command = (programs / "restarted",)
    by_strace = counted_by_strace(*command)
    with waiting(*command) as program, collecting(pid=str(program.pid)) as counted:
        program.run()
    names = {"nanosleep", "clock_nanosleep", "restart_syscall", "rt_sigreturn", "kill"}
    by_us = {name: (counted.of(name), counted.errors[name]) for name in names & by_strace.keys()}
    assert by_us == {name: by_strace[name] for name in by_us}
    assert by_us["rt_sigreturn"][0] == 10
    # It waited in its first read when the session began. It is killed in its last one, which is an
    # error to the kernel, and to strace a call that never returned.
    assert by_strace["read"] == (12, 10)
    assert (counted.of("read"), counted.errors["read"]) == (11, 11)
