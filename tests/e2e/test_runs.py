"""Runs of the bench and of these tests on a machine that others use too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.tracefs import OURS, TRACEFS, mount_source
from tests.support import ROOT, Puppet

# Has tracefs until it may end, when its input ends.
RUN = f"""
import sys
from pathlib import Path
from benchmarks.kernel import tracefs

events = Path({str(TRACEFS)!r}, "events", "sched")
with tracefs():
    assert events.is_dir()
    print("runs", flush=True)
    sys.stdin.read()
    assert events.is_dir()
"""
# clone(2): CLONE_NEWNS; mount(2): MS_REC and MS_PRIVATE; umount(2): MNT_DETACH.
OWN_MOUNTS = """
import ctypes
libc = ctypes.CDLL(None)
assert not libc.unshare(0x20000)
assert not libc.mount(None, b"/", None, 0x4000 | 0x40000, None)
"""
UNMOUNT_ALL = f"while not libc.umount2({str(TRACEFS).encode()!r}, 2): pass"


@pytest.fixture
def elsewhere() -> Iterator[Puppet]:
    """A process in a mount namespace of its own, where tracefs is not mounted."""
    with Puppet() as puppet:
        puppet.do(f"exec({OWN_MOUNTS!r})")
        puppet.do(UNMOUNT_ALL)
        assert mount_source(puppet.pid) == ""
        yield puppet


@contextmanager
def run_of_the_bench(where: Puppet) -> Iterator[subprocess.Popen[str]]:
    """One that runs, in the mount namespace of a process."""
    command = ["nsenter", f"--mount=/proc/{where.pid}/ns/mnt", "--", sys.executable, "-P", "-c"]
    with subprocess.Popen(
        [*command, RUN], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "runs\n"
            yield process
        finally:
            process.kill()


def ends(run: subprocess.Popen[str]) -> None:
    """Lets a run end, and fails unless it has had tracefs all the time."""
    run.communicate(timeout=60)
    assert run.returncode == 0


def test_two_runs_share_tracefs_and_the_last_unmounts_it(elsewhere: Puppet) -> None:
    with run_of_the_bench(elsewhere) as first, run_of_the_bench(elsewhere) as second:
        assert mount_source(elsewhere.pid) == OURS
        ends(first)
        assert mount_source(elsewhere.pid) == OURS
        ends(second)
    assert mount_source(elsewhere.pid) == ""


def test_a_run_leaves_tracefs_alone_where_it_was_mounted_before(elsewhere: Puppet) -> None:
    where = str(TRACEFS).encode()
    elsewhere.do(f"assert not libc.mount(b'before', {where!r}, b'tracefs', 0, None)")
    with run_of_the_bench(elsewhere) as run:
        ends(run)
    assert mount_source(elsewhere.pid) == "before"


def test_nothing_is_probed_when_tests_are_imported() -> None:
    """What a machine can do may depend on what a run mounts first."""
    paths = [
        path for room in ("unit", "kernel", "e2e") for path in (ROOT / "tests" / room).glob("*.py")
    ]
    modules = ["tests.conftest", *(f"tests.{path.parent.name}.{path.stem}" for path in paths)]
    code = f"""
import importlib
from coral.bpf import probe
for module in {modules}:
    importlib.import_module(module)
    assert not probe.cache_info().currsize, module
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=ROOT)
