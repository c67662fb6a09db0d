"""A Debian 12 of its own, with systemd as its first process, in a container of systemd-nspawn.

It has the kernel of this machine, and a network without anybody else in it. What is written there
is in memory, and gone with it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import psutil

from deploy.image.apt import run as apt
from deploy.image.apt import sources_of
from tests.support import wait_until

CACHE: Final = Path(os.environ.get("CORAL_TEST_CACHE", "/var/cache/coral-tests"))
_START_S: Final = 120.0
_STOP: Final = "RTMIN+4"  # systemd(1): power off
_ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}  # fmt: skip
# Of this machine: how names and mirrors are found.
_COPIED: Final = ("/etc/hosts", "/etc/resolv.conf", "/etc/apt/apt.conf.d")
_CONTAINER: Final = ("systemd-nspawn", "--quiet", "--register=no", "--keep-unit")


class Machine:
    """A running Debian, whose first process is LEADER here."""

    def __init__(self, leader: int) -> None:
        self._leader = leader

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs COMMAND as its root."""
        variables = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        inside = ("nsenter", "--target", str(self._leader), "--all", "env", "-i", *variables)
        done = subprocess.run(
            [*inside, *map(str, command)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def says(self, *command: object) -> str:
        """What COMMAND prints, without the end of the line."""
        return self.run(*command).stdout.rstrip()

    def shown(self, unit: str, *names: str) -> dict[str, str]:
        """The properties NAMES of UNIT."""
        told = self.says("systemctl", "show", f"--property={','.join(names)}", unit)
        return dict(re.findall(r"^(\w+)=(.*)$", told, re.MULTILINE))


def root_for(package: Path) -> Path:
    """A directory with a small Debian 12, and beside what is installed the files of the packages
    that PACKAGE depends on. It is made once, by debootstrap, and kept."""
    depends = apt("dpkg-deb", "--field", package, "Depends").strip()
    root = CACHE / f"debian-12-{hashlib.sha256(depends.encode()).hexdigest()[:12]}"
    if root.exists():
        return root
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = root.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    mirror = sources_of("bookworm")[0].split()[0]
    wanted = ("--variant=minbase", "--include=systemd,systemd-sysv,dbus")
    apt("debootstrap", *wanted, "bookworm", unfinished, mirror)
    (unfinished / "etc/apt/sources.list").write_text("".join(f"deb {it}\n" for it in sources_of()))
    for path in map(Path, _COPIED):
        if path.is_dir():
            shutil.copytree(path, unfinished / path.relative_to("/"), dirs_exist_ok=True)
        else:
            shutil.copy(path, unfinished / path.relative_to("/"))
    shared = f"--bind-ro={package}:/tmp/{package.name}"
    inside = (*_CONTAINER, "--directory", unfinished, shared, "--resolv-conf=off", "--pipe")
    for words in (("update",), ("--yes", "--download-only", "install", f"/tmp/{package.name}")):
        apt(*inside, "apt-get", "-qq", *words)
    unfinished.rename(root)
    return root


@contextmanager
def debian(root: Path, shared: Path) -> Iterator[Machine]:
    """Boots what is in ROOT; the directory SHARED is there at /packages."""
    command = [
        *(*_CONTAINER, "--directory", root, "--boot", "--volatile=overlay", "--private-network"),
        *(
            "--link-journal=no",
            "--resolv-conf=off",
            "--timezone=off",
            f"--bind-ro={shared}:/packages",
        ),
        # The agent's own unit takes them away again.
        *("--capability=all", "--system-call-filter=bpf perf_event_open"),
    ]
    with _own_cgroups() as enter:
        container = subprocess.Popen(
            ["sh", "-c", f'{enter}exec "$@"', "sh", *map(str, command)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            leader = wait_until(lambda: _leader_of(container), _START_S)
            machine = Machine(leader)
            wait_until(lambda: _has_booted(machine), _START_S)
            yield machine
        finally:
            with suppress(Exception):
                subprocess.run(["kill", "-s", _STOP, str(_leader_of(container))], check=True)
                container.wait(_START_S)
            container.kill()
            container.wait()


def _leader_of(container: subprocess.Popen[bytes]) -> int:
    """The first process of a container; 0 if there is none yet."""
    assert container.poll() is None, "systemd-nspawn has ended"
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(container.pid).children():
            if child.exe().endswith("/systemd"):
                return child.pid
    return 0


def _has_booted(machine: Machine) -> bool:
    return machine.run("systemctl", "is-system-running", check=False).stdout.strip() == "running"


@contextmanager
def _own_cgroups() -> Iterator[str]:
    """A cgroup for systemd-nspawn in each hierarchy where it makes some of its own, which it does
    not remove; yields a piece of shell that enters them."""
    made = [path / f"coral-test-{os.getpid()}" for path in _cgroups()]
    for path in made:
        path.mkdir()
    try:
        yield "".join(f"echo $$ >{path}/cgroup.procs; " for path in made)
    finally:
        for path in made:
            for each in sorted((path, *path.rglob("*/")), reverse=True):
                wait_until(lambda each=each: _removed(each))  # type: ignore[misc]


def _removed(cgroup: Path) -> bool:
    with suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


def _cgroups() -> Sequence[Path]:
    """The directories of this process's cgroup of version 2 and of systemd's hierarchy."""
    found = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, name, path = line.split(":", 2)
        if name in ("", "name=systemd"):
            mounts = ("unified", "") if not name else ("systemd",)
            at = (Path("/sys/fs/cgroup", mount, path.lstrip("/")) for mount in mounts)
            found += [next(it for it in at if (it / "cgroup.procs").exists())]
    return found
