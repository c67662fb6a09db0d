"""The same process at the same time by `perf record` with copies of the stack: functions and stacks
are the same."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from typing import Final

import psutil
import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.profiling import Profile, profiling
from tests.support import wait_until

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(which("perf") is None, reason="no perf"),
    pytest.mark.soak,
    pytest.mark.timeout(600),
]

HZ: Final = 99
SECONDS: Final = 40  # of CPU time
MOST_S: Final = 160
TOP: Final = 10
MOST_OFF: Final = 0.03
_FRAME: Final = re.compile(r"^\s+[0-9a-f]+ (.*)$")
# What may lie at the bottom of a stack: the first function of a program, of a thread, of a child.
BOTTOMS: Final = {"_start", "__clone3", "clone3", "__clone", "clone", "thread_start"}
PYTHON: Final = """
import json, re, sys, zlib
sys.stdin.read(1)
import time
def rec(n): return 0 if n == 0 else 1 + rec(n - 1)
end = time.process_time() + float(sys.argv[1])
while time.process_time() < end:
    text = json.dumps({str(i): [i] for i in range(100)})
    re.sub("[0-9]+", lambda m: m[0] + "x", text)
    sorted(range(50), key=lambda x: rec(x % 9))
    zlib.compress(text.encode())
"""
COMMANDS: Final = {
    "c": ("unwound", "1"),
    "cpython": ("/usr/bin/python3", "-I", "-c", PYTHON, str(2 * SECONDS)),
}


@dataclass
class Both:
    """Samples by the innermost function, without those in the kernel, and how many stacks there
    are and are whole."""

    leaves: Counter[str] = field(default_factory=Counter)
    stacks: int = 0
    whole: int = 0

    def add(self, stack: Sequence[str], count: int, *, is_whole: bool) -> None:
        """COUNT samples of STACK, outermost first."""
        self.leaves[stack[-1]] += count
        self.stacks += count
        self.whole += count * is_whole


def of_profile(profile: Profile) -> Both:
    both = Both()
    for row in profile.rows:
        if not row.in_kernel:
            stack = [plain(name) for name in row.stack]
            both.add(stack, row.count, is_whole=row.end == pb.CPU_STACK_END_BOTTOM)
    return both


def of_perf(path: Path) -> Both:
    """`[unknown]` becomes the module, as a function without a name is shown here."""
    both = Both()
    script: list[str | Path] = ["perf", "script", "--no-inline", "-F", "ip,sym,dso", "-i", path]
    out = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    for block in out.split("\n\n"):
        frames = [match[1] for line in block.splitlines() if (match := _FRAME.match(line))]
        stack = [name_of(frame) for frame in reversed(frames)]
        if stack and "([kernel.kallsyms])" not in frames[0]:
            both.add(stack, 1, is_whole=stack[0] in BOTTOMS)
    return both


def name_of(frame: str) -> str:
    name, _, module = frame.rpartition(" (")
    if name == "[unknown]":
        return Path(module.rstrip(")")).name
    return plain(name)


def plain(name: str) -> str:
    """Without an offset, and of two names that libc or the vdso has for a function always the
    same."""
    name = re.sub(r"\+0x[0-9a-f]+$", "", name).removeprefix("__vdso_")
    return name.replace("__memcpy_", "__memmove_")


@contextmanager
def perf_record(pid: int, path: Path) -> Iterator[None]:
    command: list[str | Path] = [
        *("perf", "record", "-q", "-e", "cpu-clock", "-F", str(HZ)),
        *("--call-graph", "dwarf,16384", "-p", str(pid), "-o", path),
    ]
    process = subprocess.Popen(command)

    def is_at_work() -> bool:
        links = [str(fd.readlink()) for fd in Path(f"/proc/{process.pid}/fd").iterdir()]
        return "anon_inode:[perf_event]" in links

    try:
        wait_until(is_at_work)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def run(process: subprocess.Popen[bytes]) -> None:
    """Until it has used enough CPU time, or for long enough on a machine that is busy."""
    assert process.stdin
    process.stdin.write(b"x")
    process.stdin.flush()
    until_s = time.monotonic() + MOST_S
    while process.poll() is None and cpu_s(process.pid) < SECONDS and time.monotonic() < until_s:
        time.sleep(0.1)
    process.kill()


def cpu_s(pid: int) -> float:
    with suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system
    return 0.0


@pytest.mark.parametrize("what", COMMANDS)
def test_functions_and_stacks_are_those_of_perf(
    what: str,
    programs: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    program, *arguments = COMMANDS[what]
    path = tmp_path / "perf.data"
    process = subprocess.Popen(
        [programs / program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    with (
        process,
        profiling(pid=process.pid, frequency=HZ) as profile,
        perf_record(process.pid, path),
    ):
        run(process)
    ours, theirs = of_profile(profile), of_perf(path)
    top = {name for both in (ours, theirs) for name, _ in both.leaves.most_common(TOP)}
    off = {}
    for name in sorted(top):
        shares = [both.leaves[name] / both.stacks for both in (ours, theirs)]
        off[name] = shares[0] - shares[1]
        # The two take their samples at different times.
        mean = sum(shares) / 2
        error = 4 * math.sqrt(mean * (1 - mean) * (1 / ours.stacks + 1 / theirs.stacks))
        print(f"{name}: {shares[0]:.3f} and {shares[1]:.3f}")
        assert abs(off[name]) <= max(MOST_OFF, error), name
    worst = max(off, key=lambda name: abs(off[name]))
    record_property("worst", f"{worst} {100 * off[worst]:.1f} points")
    record_property("stacks", f"{ours.whole} of {ours.stacks}, {theirs.whole} of {theirs.stacks}")
    print(f"worst {worst} {off[worst]:.4f}")
    print(f"whole: {ours.whole} of {ours.stacks}, perf {theirs.whole} of {theirs.stacks}")
    record_property("whole", ours.whole / ours.stacks)
    record_property("whole_perf", theirs.whole / theirs.stacks)
    assert ours.whole / ours.stacks >= theirs.whole / theirs.stacks
