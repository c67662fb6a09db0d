"""Real cgroups: their ids and processes while others come and go, threads in several of them, and
what is found from a cgroup namespace of one's own."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coral.collectors.cgroups import (
    cgroup_directory,
    cgroup_id,
    cgroup_ids_below,
    cgroup_of,
    cgroup_tgids,
    hierarchy,
)
from coral.collectors.hierarchies import hierarchies
from coral.collectors.options import OptionError
from tests.support import wait_until

KINDS = [found.kind for found in hierarchies()]
TURNS = 100

# Two threads: the main one, and one whose id is printed. Ends when its input does.
TWO_THREADS = """
import sys, threading
thread = threading.Thread(target=sys.stdin.read)
thread.start()
print(thread.native_id, flush=True)
"""
# What a process in another namespace finds, as JSON.
LOOK = """
import json, os, sys
from coral.collectors.cgroups import cgroup_directory, cgroup_id, cgroup_of
from coral.collectors.hierarchies import hierarchies
from coral.collectors.options import OptionError
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = cgroup_id(cgroup_directory(name))
    except OptionError as error:
        found[name] = str(error)
own = cgroup_of(os.getpid())
beside = int(os.environ["BESIDE"])
first = cgroup_of(beside) if os.path.exists(f"/proc/{beside}") else None
v2 = hierarchies()[0]
print(json.dumps({
    "found": found, "whole": v2.is_whole, "root": v2.root,
    "own": own and cgroup_id(own), "beside": first and cgroup_id(first),
}))
"""


def remove(directory: Path) -> None:
    """Removes a cgroup and those below it, when their processes have ended."""
    for child in directory.iterdir():
        if child.is_dir():
            remove(child)
    wait_until(lambda: _is_removed(directory))


def _is_removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


@pytest.fixture(params=KINDS)
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup of this test, in each hierarchy."""
    kind = request.param
    top = next(found.directory for found in hierarchies() if found.kind == kind)
    directory = top / f"coral-{uuid.uuid4().hex[:8]}"
    directory.mkdir()
    yield directory
    remove(directory)


@pytest.fixture
def v2() -> Iterator[Path]:
    """A cgroup (v2) of this test."""
    top = next((found.directory for found in hierarchies() if found.kind == "v2"), None)
    if top is None:
        pytest.skip("no cgroup2 hierarchy is mounted here")
    directory = top / f"coral-{uuid.uuid4().hex[:8]}"
    directory.mkdir()
    yield directory
    remove(directory)


@pytest.fixture
def sleeper() -> Iterator[int]:
    """A process that waits."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process.pid


def move(pid: int, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "cgroup.procs").write_text(str(pid))


def test_a_cgroup_of_any_hierarchy_is_found_by_its_path(cgroup: Path, sleeper: int) -> None:
    move(sleeper, cgroup / "inner")
    kind = hierarchy(cgroup)
    assert kind == next(found.kind for found in hierarchies() if found.directory == cgroup.parent)
    assert cgroup_directory(f"/{cgroup.name}/inner") == cgroup / "inner"
    assert cgroup_directory(f"{cgroup}/inner/../inner") == cgroup / "inner"
    assert cgroup_of(sleeper, kind) == cgroup / "inner"
    assert cgroup_tgids(cgroup) == {sleeper}
    ids = {path.stat().st_ino for path in (cgroup, cgroup / "inner")}
    assert cgroup_ids_below(cgroup) == ids == {cgroup_id(cgroup), cgroup_id(cgroup / "inner")}


def test_cgroups_that_come_and_go_meanwhile_disturb_nothing(cgroup: Path, sleeper: int) -> None:
    move(sleeper, cgroup / "stays")
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            for number in range(20):
                (cgroup / f"goes{number}" / "deeper").mkdir(parents=True)
            for number in range(20):
                (cgroup / f"goes{number}" / "deeper").rmdir()
                (cgroup / f"goes{number}").rmdir()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        stays = {cgroup_id(cgroup), cgroup_id(cgroup / "stays")}
        most = 0
        for _ in range(TURNS):
            assert cgroup_tgids(cgroup) == {sleeper}
            ids = cgroup_ids_below(cgroup)
            assert stays <= ids
            most = max(most, len(ids))
        assert most > len(stays)  # it has seen some that went
    finally:
        stop.set()
        thread.join()
    assert cgroup_ids_below(cgroup) == stays


def test_a_removed_cgroup_has_no_processes_and_no_ids(v2: Path) -> None:
    gone = v2 / "gone"
    assert cgroup_tgids(gone) == set()
    assert cgroup_ids_below(gone) == frozenset()
    with pytest.raises(FileNotFoundError):
        cgroup_id(gone)


def test_a_threaded_cgroup_has_the_processes_of_its_threads(v2: Path) -> None:
    threaded = v2 / "threaded"
    threaded.mkdir()
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", TWO_THREADS],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        tid = int(process.stdout.readline())
        move(process.pid, v2)
        (threaded / "cgroup.type").write_text("threaded")
        assert cgroup_tgids(threaded) == set()
        (threaded / "cgroup.threads").write_text(str(tid))
        with pytest.raises(OSError, match="not supported"):
            (threaded / "cgroup.procs").read_text()
        assert cgroup_tgids(threaded) == {process.pid}


# In a pid namespace, so that this script is its process 1 and what it can reach is the host's:
# starts a process in the cgroup $1, and runs the rest in the cgroup $2 and namespaces of its own.
INIT = """
sleep 60 &
echo $! > "$1/cgroup.procs"
export BESIDE=$!
status=0
sh -ec 'echo $$ > "$2/cgroup.procs"; shift 2; exec "$@"' sh "$@" || status=$?
kill $BESIDE
wait
exit $status
"""


def look(v2: Path, names: Sequence[str], *namespaces: str, setup: str) -> Any:
    """What a process in V2/own finds, in NAMESPACES and a cgroup namespace of its own, where SETUP
    was run; a process beside it is in V2/beside."""
    (v2 / "own").mkdir()
    (v2 / "beside").mkdir()
    done = subprocess.run(
        [
            *("unshare", "--pid", "--fork", "--mount-proc", "sh", "-ec", INIT, "init"),
            *(str(v2 / "beside"), str(v2 / "own"), "unshare", "--cgroup", "--mount", *namespaces),
            *("sh", "-ec", f'{setup}\nexec "$@"', "sh", sys.executable, "-P", "-c", LOOK, *names),
        ],
        stdout=subprocess.PIPE, check=True, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout)


REMOUNTED = "umount {mount}; mount -t cgroup2 none {mount}"


@pytest.mark.parametrize("setup", ["", REMOUNTED], ids=["host's mount", "mount of its own"])
def test_a_cgroup_namespace_of_ones_own_hides_no_cgroup(setup: str, v2: Path) -> None:
    names = [f"/{v2.name}/beside", str(v2 / "beside"), "/no/such"]
    seen = look(v2, names, setup=setup.format(mount=v2.parent))
    assert (seen["whole"], seen["root"]) == (True, "/../..")
    beside = cgroup_id(v2 / "beside")
    assert seen["found"][names[0]] == seen["found"][names[1]] == beside
    assert seen["found"]["/no/such"].endswith("; there is none at this path")
    assert (seen["own"], seen["beside"]) == (cgroup_id(v2 / "own"), beside)


def test_a_cgroup_outside_of_what_is_visible_is_refused_with_the_remedy(v2: Path) -> None:
    name = f"/{v2.name}/beside"
    seen = look(
        v2, [name, "/"], "--pid", "--fork", "--mount-proc",
        setup=REMOUNTED.format(mount=v2.parent),
    )  # fmt: skip
    assert not seen["whole"]
    assert seen["found"]["/"] == cgroup_id(v2 / "own")
    assert "the agent sees only a part of the hierarchy" in seen["found"][name]
    assert "docker run --cgroupns=host" in seen["found"][name]


def test_a_path_outside_of_every_hierarchy_is_refused() -> None:
    for path in ("/proc", "/..", "a\0b", "x" * 300):
        with suppress(OptionError):
            directory = cgroup_directory(path)
            assert directory.stat().st_ino == 1, path  # /.. is the root
