"""Whom a collector watches: the options that say so, and the kernel's map of it.

The C side is bpf/include/targets.bpf.h, whose programs follow forks, execs and exits. Any
collector whose object includes that header can use this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from coral.bpf import BpfObject, Features
from coral.bpf.libbpf import BpfError
from coral.collectors.contract import ServiceProcesses
from coral.collectors.options import OptionError, boolean, choice, items, option, text

PROC: Final = Path("/proc")
COMM_BYTES: Final = 15  # and a terminating zero
_HINTS: Final = 65536  # as in targets.bpf.h
_SELECT_HOST, _SELECT_TARGETS, _SELECT_CGROUP = 0, 1, 2
_STATE_ACTIVE, _STATE_ARMED, _STATE_EXITED = 0, 1, 2
_CGROUP2_MOUNT: Final = re.compile(r"^\S+ \S+ \S+ / (\S+) .* - cgroup2 ", re.MULTILINE)


def _pid(value: str) -> int:
    """The id of a process that runs now."""
    if not value.isdigit() or not 0 < int(value) < 1 << 22:
        raise ValueError("process ids, such as 1234 or 1234,5678")
    tgid = thread_group_of(int(value))
    if tgid is None and _is_hidden(int(value)):
        raise ValueError(
            f"the ids of processes that the agent may see: /proc hides {value} from it "
            "(hidepid), and CAP_SYS_PTRACE is missing"
        )
    if tgid is None:
        raise ValueError(f"the ids of processes that run now: {value} does not")
    if tgid != int(value):
        raise ValueError(f"the ids of processes: {value} is a thread of process {tgid}")
    return tgid


@dataclass(frozen=True)
class TargetOptions:
    """The options that name processes; a collector's own options extend this."""

    pid: tuple[int, ...] = option(
        items(_pid, "process ids, such as 1234 or 1234,5678"),
        "",
        "watch these processes",
    )
    comm: str = option(
        text("a command name of at most 15 bytes", COMM_BYTES),
        "",
        "watch every process of this command name, those that start later too",
    )
    cgroup: str = option(
        text("the path of a cgroup (v2), such as /system.slice/nginx.service", 4096),
        "",
        "watch the processes in this cgroup and below it",
    )
    scope: str = option(choice("host"), "", "`host`: watch every process of this machine")
    follow_children: bool = option(
        boolean(), "true", "watch what the watched processes fork, from its first call on"
    )
    until_exit: bool = option(
        boolean(), "false", "end the session when the processes it began with have ended"
    )
    from_exec: bool = option(
        boolean(),
        "false",
        "of the processes in `pid`, count from their next exec on, this included",
    )

    def check(self, service: ServiceProcesses | None) -> None:
        """Raises `OptionError` unless exactly one thing is named to watch."""
        named = [name for name in ("pid", "comm", "cgroup", "scope") if getattr(self, name)]
        if len(named) > 1:
            raise OptionError(
                named[1],
                str(getattr(self, named[1])),
                f"only one of pid, comm, cgroup, scope; {named[0]} is given too",
            )
        if not named and not service:
            raise OptionError(
                "scope",
                "",
                'a service_name, or one of pid, comm, cgroup, or scope "host" for all processes',
            )
        if self.until_exit and named not in (["pid"], []):
            raise OptionError("until_exit", "true", "it with pid or a service_name only")
        if self.from_exec and named != ["pid"]:
            raise OptionError("from_exec", "true", "it with pid only")
        if self.cgroup:
            cgroup_directory(self.cgroup)


class Targets:
    """The watched processes of one loaded object."""

    def __init__(self, options: TargetOptions, service: ServiceProcesses | None) -> None:
        options.check(service)
        self._options = options
        self._tgids = options.pid
        if service and not (options.pid or options.comm or options.cgroup or options.scope):
            self._tgids = service.tgids
        self._pidfds: list[int] = []

    @property
    def label(self) -> str:
        """A name for what is watched: the command's, the cgroup's, or `host`."""
        options = self._options
        if self._tgids:
            return comm_of(self._tgids[0]) or f"pid {self._tgids[0]}"
        return options.comm or Path(options.cgroup).name or "host"

    @property
    def object_options(self) -> Mapping[str, object]:
        """The read-only globals of targets.bpf.h."""
        options = self._options
        selection = _SELECT_TARGETS
        if options.scope:
            selection = _SELECT_HOST
        elif options.cgroup:
            selection = _SELECT_CGROUP
        return {
            "selection": selection,
            "follow_children": options.follow_children,
            "select_comm": bool(options.comm),
            **_comm_words(options.comm),
        }

    @property
    def exit_fds(self) -> Sequence[int]:
        """Process descriptors of the first targets, if the session is to end with them."""
        return self._pidfds

    def fill(self, bpf_object: BpfObject) -> None:
        """Names the targets to the kernel. After attach, so that no fork falls between."""
        self._map = bpf_object.map("targets")
        if self._options.cgroup:
            fd = os.open(cgroup_directory(self._options.cgroup), os.O_RDONLY | os.O_DIRECTORY)
            try:
                bpf_object.write_fd("cgroups", 0, fd)
            finally:
                os.close(fd)
        if self._options.comm:
            self._tgids = tuple(
                tgid for tgid in running_tgids() if comm_of(tgid) == self._options.comm
            )
        state = _STATE_ARMED if self._options.from_exec else _STATE_ACTIVE
        bpf_object.write_elements("target_hints", [tgid % _HINTS for tgid in self._tgids], 1)
        for tgid in self._tgids:
            self._map.write(tgid, ((comm_of(tgid) or "").encode(), state, 0))
        if self._options.until_exit:
            self._open_pidfds()

    def fill_members(self) -> None:
        """Names the processes of a cgroup to the kernel, for programs that look for what a process
        had before; the others it knows. After `fill`."""
        if not self._options.cgroup:
            return
        for procs in cgroup_directory(self._options.cgroup).rglob("cgroup.procs"):
            for tgid in map(int, procs.read_text().split()):
                self._map.write(tgid, ((comm_of(tgid) or "").encode(), _STATE_ACTIVE, 0))

    def present(self) -> dict[int, str]:
        """Command names by tgid of the processes that are watched now, for who looks for what they
        had before. After `fill_members`."""
        if self._options.scope:
            return {tgid: comm_of(tgid) or "" for tgid in running_tgids()}
        if self._options.from_exec:
            return {}
        return self.read()[0]

    def _open_pidfds(self) -> None:
        for tgid in self._tgids:
            try:
                self._pidfds.append(os.pidfd_open(tgid))
            except ProcessLookupError:
                continue  # it has ended since it was asked for
        if not self._pidfds:
            raise BpfError("every process to watch has ended before the programs were attached")

    def unfollowed(self, bpf_object: BpfObject) -> int:
        """Processes that should have been watched and did not fit into the map."""
        return int(bpf_object.read_variable("targets_full"))

    def read(self) -> tuple[dict[int, str], list[int]]:
        """Command names by tgid, and the tgids that have ended."""
        tgids, targets = self._map.read()
        names = {
            int(tgid): comm.split(b"\0")[0].decode(errors="replace")
            for tgid, comm in zip(tgids.tolist(), targets["comm"].tolist(), strict=True)
        }
        return names, [int(tgid) for tgid in tgids[targets["state"] == _STATE_EXITED]]

    def forget(self, tgids: Iterable[int]) -> None:
        """Removes processes that have ended."""
        self._map.delete(np.array(list(tgids), self._map.key_dtype))

    def close(self) -> None:
        """Closes the process descriptors."""
        while self._pidfds:
            os.close(self._pidfds.pop())


def refused_options(features: Features) -> dict[str, str]:
    """The options of `TargetOptions` that cannot be had here, with what can."""
    refused = {}
    if not features["pidfd"].available:
        refused["until_exit"] = f"`false`: {features['pidfd'].reason}"
    if cgroup2_mount() is None:
        refused["cgroup"] = (
            "no value: no cgroup2 hierarchy is mounted here; mount -t cgroup2 none /sys/fs/cgroup"
        )
    return refused


def _comm_words(comm: str) -> Mapping[str, int]:
    """A command name as the programs compare it: its bytes, padded with zeros, as two words."""
    low, high = np.frombuffer(comm.encode().ljust(COMM_BYTES + 1, b"\0"), np.uint64).tolist()
    return {"wanted_comm_low": low, "wanted_comm_high": high}


def cgroup_directory(path: str) -> Path:
    """The directory of a cgroup (v2): PATH itself, or PATH below the hierarchy's mount point.
    Raises `OptionError`."""
    mount = cgroup2_mount()
    accepts = "the path of a cgroup v2 directory"
    if mount is None:
        raise OptionError("cgroup", path, f"{accepts}: no cgroup2 hierarchy is mounted here")
    for candidate in (Path(path), mount / path.lstrip("/")):
        resolved = candidate.resolve()
        if resolved.is_relative_to(mount) and (resolved / "cgroup.procs").exists():
            return resolved
    raise OptionError("cgroup", path, f"{accepts} below {mount}; there is none at this path")


def cgroup2_mount() -> Path | None:
    """Where the cgroup v2 hierarchy is mounted."""
    match = _CGROUP2_MOUNT.search((PROC / "self/mountinfo").read_text())
    return Path(match[1]) if match else None


def running_tgids() -> list[int]:
    """The processes of this machine."""
    return [int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()]


def comm_of(tgid: int) -> str | None:
    """A process's command name; None where it has ended, or is hidden."""
    try:
        return (PROC / str(tgid) / "comm").read_text(errors="replace").rstrip("\n")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def thread_group_of(tid: int) -> int | None:
    """The process that a thread belongs to; None where there is no such thread, or it is hidden."""
    try:
        status = (PROC / str(tid) / "status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    match = re.search(r"^Tgid:\s+(\d+)", status, re.MULTILINE)
    return int(match[1]) if match else None


def _is_hidden(pid: int) -> bool:
    """Of a process that /proc does not show, whether it is there all the same."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
