"""Runs of these tests beside each other on one machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import ROOT, Puppet, wait_until
from tests.tracefs import OURS, TRACEFS, mount_source

# A test that reports that it runs, then waits until it may end, and has tracefs all the time.
SMALL_TEST = f"""
from pathlib import Path
from tests.support import wait_until

def test_has_tracefs_until_it_ends():
    events = Path({str(TRACEFS)!r}, "events")
    assert (events / "sched").is_dir()
    Path(__file__).with_name("runs").touch()
    wait_until(Path(__file__).with_name("may end").exists, 60)
    assert (events / "sched").is_dir()
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
def small_run(where: Puppet, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """One run of these tests with one small test, in the mount namespace of a process."""
    directory.mkdir()
    (directory / "test_small.py").write_text(SMALL_TEST)
    with subprocess.Popen(
        [
            *("nsenter", f"--mount=/proc/{where.pid}/ns/mnt", "--"),
            *(sys.executable, "-P", "-m", "pytest", "-q", "-p", "tests.conftest"),
            *("-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={directory}", directory),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ends(run: subprocess.Popen[str], directory: Path) -> None:
    """Lets a run end, and fails unless its test passed."""
    (directory / "may end").touch()
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 0, said
    assert "1 passed" in said


def test_two_runs_share_tracefs_and_the_last_unmounts_it(elsewhere: Puppet, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with small_run(elsewhere, one) as first, small_run(elsewhere, two) as second:
        wait_until(lambda: (one / "runs").exists() and (two / "runs").exists(), 60)
        assert mount_source(elsewhere.pid) == OURS
        ends(first, one)
        assert mount_source(elsewhere.pid) == OURS
        ends(second, two)
    assert mount_source(elsewhere.pid) == ""


def test_a_run_leaves_tracefs_alone_where_it_was_mounted_before(
    elsewhere: Puppet, tmp_path: Path
) -> None:
    where = str(TRACEFS).encode()
    elsewhere.do(f"assert not libc.mount(b'before', {where!r}, b'tracefs', 0, None)")
    one = tmp_path / "one"
    with small_run(elsewhere, one) as run:
        wait_until((one / "runs").exists, 60)
        ends(run, one)
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
