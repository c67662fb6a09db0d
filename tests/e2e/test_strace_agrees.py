"""`coral tap -- COMMAND` beside `strace -c -f COMMAND`: the same figures for every system call.

The exceptions are listed below. Calls that never return are missing in strace's summary, and are
taken from its log.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.support import RunningAgent, coral, running_agent

# The scheduler decides how often these are called: two runs under strace differ in them too. By
# program:
NOT_COMPARED: Final = {
    # Threads wait for the interpreter's lock whenever they compete for it.
    "threads": {"futex"},
    # Children that end together cause one SIGCHLD, whose handler returns once.
    "shell": {"rt_sigreturn"},
    "find": set[str](),
    "killed": set[str](),
}

# With these a program does the same in every run: hashes are not random, and threads that allocate
# at the same time do not get a second heap.
ENVIRONMENT: Final = {
    "PATH": "/usr/bin:/bin",
    "LC_ALL": "C",
    "PYTHONHASHSEED": "0",
    "MALLOC_ARENA_MAX": "1",
}

THREADS_AND_CHILDREN: Final = """
import os
import subprocess
import threading

together = threading.Barrier(3)

def work(number):
    together.wait()
    for _ in range(20):
        with open(f"file{number}", "wb") as file:
            file.write(bytes(5000))
        os.unlink(f"file{number}")
        try:
            os.stat("/nonexistent/coral")
        except FileNotFoundError:
            pass
    together.wait()

threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for number in range(3):
    subprocess.run(["cat", "/dev/null"], check=True)
subprocess.run("exit 3", shell=True)
child = os.fork()
if child == 0:
    os._exit(4)
os.waitpid(child, 0)
"""

SHELL: Final = """
find tree -type f | sort | uniq | wc -l
ls /nonexistent/coral
for i in 1 2 3; do (exit $i); done
x=$(echo tree/*/*)
"""

PYTHON: Final = (sys.executable, "-s", "-P", "-S", "-B", "-c")

COMMANDS: Final = {
    "find": ("/usr/bin/find", "tree", "-name", "f*", "-exec", "cat", "{}", ";"),
    "threads": (*PYTHON, THREADS_AND_CHILDREN),
    "shell": ("/bin/sh", "-c", SHELL),
    "killed": ("/bin/sh", "-c", "sh -c 'kill -9 $$'; exit 0"),
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("strace") / "agent") as running:
        yield running


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The directory where the commands run, with a tree of 60 files."""
    for number in range(6):
        (tmp_path / f"tree/d{number}/sub").mkdir(parents=True)
        for file in range(5):
            (tmp_path / f"tree/d{number}/f{file}").write_text("coral\n" * file)
            (tmp_path / f"tree/d{number}/sub/g{file}").touch()
    return tmp_path


def run(command: Sequence[str], directory: Path) -> str:
    """Runs it; returns its standard output, with that of the observed command."""
    return subprocess.run(
        command,
        env=ENVIRONMENT,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


class Counts:
    """Counts of calls and errors by the name of the system call."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def add(self, name: str, calls: int, errors: int) -> None:
        self.calls[name] += calls
        self.errors[name] += errors

    def compared(self, program: str) -> dict[str, tuple[int, int]]:
        """Calls and errors without those that are not compared."""
        return {
            name: (self.calls[name], self.errors[name])
            for name in sorted(self.calls.keys() - NOT_COMPARED[program])
        }


def of_strace(command: Sequence[str], directory: Path) -> tuple[Counts, Counter[str]]:
    """strace's summary, and, from its log, the calls that never returned: exit, exit_group, and
    the call that a process was in when it died. The summary leaves these out."""
    log = directory / "strace.out"
    run(("strace", "-C", "-f", "-U", "calls,errors,name", "-o", str(log), *command), directory)
    lines, _, summary = log.read_text().partition("    calls    errors syscall\n")
    counts = Counts()
    for row in re.findall(r"^ +(\d+) +(\d*) +(\w+)$", summary, re.MULTILINE):
        if row[2] != "total":
            counts.add(row[2], int(row[0]), int(row[1] or 0))
    unreturned = re.findall(r"^\d+ +(?:<\.\.\. )?(\w+).* = \?$", lines, re.MULTILINE)
    return counts, Counter(unreturned)


def of_coral(agent: RunningAgent, command: Sequence[str], directory: Path) -> Counts:
    tap = coral("tap", "--agent", agent.address, "--syscall-stats", "-o", "json", "--", *command)
    counts = Counts()
    for line in run(tap, directory).splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            assert "lost" not in row
            if "syscall" in row:
                counts.add(row["syscall"], row["calls"], row["errors"])
    return counts


@pytest.mark.parametrize("program", COMMANDS)
def test_every_system_call_is_counted_as_strace_counts_it(
    program: str, agent: RunningAgent, directory: Path
) -> None:
    expected, unreturned = of_strace(COMMANDS[program], directory)
    assert not {"exit", "exit_group"} & expected.calls.keys()
    assert unreturned["exit_group"] > 0
    for name, calls in unreturned.items():
        expected.add(name, calls, 0)
    counted = of_coral(agent, COMMANDS[program], directory)
    assert counted.compared(program) == expected.compared(program)
    assert expected.errors.total() > 0
    for name in NOT_COMPARED[program]:
        assert counted.calls[name] > 0
        assert expected.calls[name] > 0
