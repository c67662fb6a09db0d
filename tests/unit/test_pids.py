"""Which process ids are accepted, and why others are not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coral.collectors.pids import running_pid
from coral.collectors.procfs import process_of, running_tgids, watchable, with_descendants
from tests.support import wait_until

# Its first thread ends, and another one reads on.
WITHOUT_ITS_FIRST_THREAD = """
import ctypes, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@contextmanager
def zombie() -> Iterator[int]:
    """A process that has ended, and that nobody has waited for."""
    with subprocess.Popen(["true"]) as process:
        wait_until(lambda: _state(process.pid) == "Z")
        yield process.pid


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def refusal(pid: int) -> str:
    with pytest.raises(ValueError, match="the ids of processes") as caught:
        running_pid(str(pid))
    return str(caught.value)


def test_a_zombie_is_refused_with_the_process_that_has_to_wait_for_it() -> None:
    with zombie() as pid:
        assert refusal(pid) == (
            f"the ids of processes that run now: {pid} has ended, and is a zombie until its "
            f"parent, process {os.getpid()}, collects its exit status"
        )
        assert pid not in watchable()


def test_a_process_without_its_first_thread_is_no_zombie() -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WITHOUT_ITS_FIRST_THREAD], stdin=subprocess.PIPE
    ) as process:
        wait_until(lambda: _state(process.pid) == "Z")
        assert running_pid(str(process.pid)) == process.pid
        assert process.pid in watchable()


def test_a_kernel_thread_is_refused_by_its_name() -> None:
    processes = filter(None, map(process_of, running_tgids()))
    threads = [process for process in processes if process.is_kernel_thread]
    if not threads:
        pytest.skip("this machine shows no kernel threads: it is a container")
    for thread in threads:
        name = thread.comm.partition("-")[0]  # a worker's name goes on with its work of the moment
        what = f"the ids of processes: {thread.tgid} is a kernel thread ({name}"
        assert refusal(thread.tgid).startswith(what)
    assert not {thread.tgid for thread in threads} & watchable().keys()


def test_descendants_are_found_over_generations_and_a_command_name_cannot_hide_them() -> None:
    script = "printf ') S 1 1' > /proc/$$/comm; exec 3<&0; cat <&3 & (cat <&3 & wait) & wait"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as process:
        wait_until(lambda: _family(process.pid) == [") S 1 1", ") S 1 1", "cat", "cat"])
        top = process_of(process.pid)
        assert top
        assert (top.comm, top.parent) == (") S 1 1", os.getpid())


def _family(pid: int) -> list[str]:
    processes = watchable()
    found = with_descendants([pid], processes)
    return sorted(processes[tgid].comm for tgid in found & processes.keys())
