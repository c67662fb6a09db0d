"""Keeps the namespaces of a cluster while its standard input is open, and then removes everything:

    python -P -m tests.cluster.janitor DIRECTORY CGROUP

Run apart from the tests, so that it does its work however they end. It makes a network and a mount
namespace, in which the directories that Kubernetes writes to without being asked are empty, and the
cgroup CGROUP in every hierarchy. Then it prints the id of the process that holds the namespaces. At
the end it kills every process in one of the three, and removes the cgroups and DIRECTORY.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_CGROUPS: Final = Path("/sys/fs/cgroup")
_OWN: Final = ("/run", "/var/lib/cni", "/var/lib/kubelet", "/var/log/pods", "/var/log/containers")
_KINDS: Final = ("net", "mnt")
_PATIENCE_S: Final = 60.0
_PREPARE: Final = """
ip link set lo up
for directory; do
    mkdir -p "$directory"
    mount -t tmpfs tmpfs "$directory"
done
mount --make-rshared /
echo ready
exec sleep infinity
"""

Namespace = tuple[str, str]


def main(directory: Path, cgroup: str) -> None:
    """See the module."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, signal.SIG_IGN)  # the end of the input is what counts
    cgroups = [top / cgroup for top in hierarchies()]
    namespaces: set[Namespace] = set()
    holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-ec", _PREPARE, "sh", *_OWN],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        for path in cgroups:
            _make(path)
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        namespaces = _namespaces(holder.pid) - _namespaces(os.getpid())
        assert len(namespaces) == len(_KINDS)
        print(holder.pid, flush=True)
        sys.stdin.read()
    finally:
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end and (
            left := set(_members(namespaces, cgroups)) - {holder.pid}
        ):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        holder.kill()
        holder.wait()
        for path in cgroups:
            _remove(path)
        shutil.rmtree(directory, ignore_errors=True)


def hierarchies() -> list[Path]:
    """Where each hierarchy of cgroups is mounted."""
    if (_CGROUPS / "cgroup.controllers").exists():
        return [_CGROUPS]
    return [path for path in _CGROUPS.iterdir() if path.is_dir() and not path.is_symlink()]


def _make(cgroup: Path) -> None:
    cgroup.mkdir()
    for name in ("cpuset.cpus", "cpuset.mems"):  # no process may enter without
        if (cgroup.parent / name).exists():
            (cgroup / name).write_text((cgroup.parent / name).read_text())


def _namespaces(pid: int) -> set[Namespace]:
    """The namespaces of a process, of the kinds that the cluster has its own of."""
    return {(kind, str(Path(f"/proc/{pid}/ns/{kind}").readlink())) for kind in _KINDS}


def _members(namespaces: set[Namespace], cgroups: list[Path]) -> Iterator[int]:
    """The processes that are in one of NAMESPACES, or in or below one of CGROUPS."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ends meanwhile
            if namespaces & _namespaces(int(process.name)):
                yield int(process.name)
    for cgroup in cgroups:
        for file in cgroup.rglob("cgroup.procs"):
            with suppress(OSError):
                yield from map(int, file.read_text().split())


def _remove(cgroup: Path) -> None:
    for directory, _, _ in os.walk(cgroup, topdown=False):
        end = time.monotonic() + _PATIENCE_S
        while Path(directory).exists() and time.monotonic() < end:
            with suppress(OSError):  # a process that was killed is still on its way out
                Path(directory).rmdir()
                break
            time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
