"""The processes that a collector watches: the options that select them, and the kernel's map.

The C side is bpf/include/targets.bpf.h, whose programs follow forks, execs and exits. Any
collector whose object includes that header can use this.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfObject, Features
from coral.bpf.libbpf import BpfError
from coral.collectors.cgroups import cgroup2_mount, cgroup_directory, cgroup_tgids
from coral.collectors.contract import ServiceProcesses, Watched
from coral.collectors.options import OptionError, boolean, choice, items, option, text
from coral.collectors.pids import PIDS, pid_anywhere, running_pid
from coral.collectors.procfs import comm_of, running_tgids, start_time_of

COMM_BYTES: Final = 15  # and a terminating zero
_HINTS: Final = 65536  # as in targets.bpf.h
_SELECT_HOST, _SELECT_TARGETS, _SELECT_CGROUP = 0, 1, 2
_STATE_ACTIVE, _STATE_ARMED, _STATE_EXITED = 0, 1, 2


@dataclass(frozen=True)
class TargetOptions:
    """The options that name processes; a collector's own options extend this."""

    pid: tuple[int, ...] = option(
        items(running_pid, PIDS, pid_anywhere),
        "",
        "watch these processes",
    )
    comm: str = option(
        text("a command name of at most 15 bytes", COMM_BYTES),
        "",
        "watch every process with this command name, also those that start later",
    )
    cgroup: str = option(
        text("the path of a cgroup (v2), such as /system.slice/nginx.service", 4096),
        "",
        "watch the processes in this cgroup and in the cgroups below it",
    )
    scope: str = option(choice("host"), "", "`host`: watch every process on this machine")
    follow_children: bool = option(
        boolean(), "true", "also watch the children of watched processes, from their first call on"
    )
    until_exit: bool = option(
        boolean(), "false", "end the session once all processes that it started with have ended"
    )
    from_exec: bool = option(
        boolean(),
        "false",
        "watch the processes in `pid` from their next exec on, including the exec itself",
    )

    def check(self, service: ServiceProcesses | None) -> None:
        """Raises `OptionError` unless the options and SERVICE name exactly one target. Looks at
        nothing on this machine."""
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


@dataclass(frozen=True, slots=True)
class Members:
    """The n processes in one reading of the kernel's map."""

    tgids: NDArray[np.uint32]  # (n,), sorted
    comms: NDArray[np.bytes_]  # (n,): their command names
    exited: NDArray[np.bool_]  # (n,)

    @property
    def ended(self) -> NDArray[np.uint32]:
        """The tgids of those that have ended."""
        return self.tgids[self.exited]

    def comms_of(self, tgids: NDArray[Any]) -> NDArray[np.bytes_]:
        """The command names of TGIDS, both of shape (m,); empty for a process that is not here."""
        if not len(self.tgids):
            return np.zeros(len(tgids), self.comms.dtype)
        at = np.searchsorted(self.tgids, tgids).clip(max=len(self.tgids) - 1)
        return np.where(self.tgids[at] == tgids, self.comms[at], b"")


def comm_text(comm: bytes) -> str:
    """A command name as text; in the kernel it ends at its first zero."""
    return comm.split(b"\0")[0].decode(errors="replace")


class Targets:
    """The watched processes of one loaded object."""

    def __init__(self, options: TargetOptions, service: ServiceProcesses | None) -> None:
        options.check(service)
        if options.cgroup:
            cgroup_directory(options.cgroup)
        self._options = options
        self._service = service.name if service else ""
        self._tgids = options.pid
        if service and not (options.pid or options.comm or options.cgroup or options.scope):
            self._tgids = service.tgids
        # A process id may go to another process before `fill`; its start time tells.
        self._started = {tgid: start_time_of(tgid) for tgid in self._tgids}
        self._pidfds: list[int] = []
        self.spared: frozenset[int] = frozenset()  # processes to leave out, whatever the target

    @property
    def watched(self) -> Watched:
        """What the options and the service resolved to."""
        options = self._options
        return Watched(
            self._tgids,
            options.comm,
            cgroup_directory(options.cgroup) if options.cgroup else None,
            bool(options.scope),
            options.follow_children,
        )

    @property
    def label(self) -> str:
        """A name for what is watched: the command's, the cgroup's, or `host`."""
        options = self._options
        if self._tgids:
            return comm_of(self._tgids[0]) or f"pid {self._tgids[0]}"
        return options.comm or Path(options.cgroup).name or "host"

    @property
    def key(self) -> tuple[str, ...]:
        """What is watched, the same for equal targets. A service is one target, whichever processes
        it had when the session began."""
        options = self._options
        if options.cgroup:
            return ("cgroup", str(cgroup_directory(options.cgroup)))
        for name, value in (("comm", options.comm), ("scope", options.scope)):
            if value:
                return (name, value)
        if options.pid:
            return ("pid", *map(str, sorted(options.pid)))
        return ("service", self._service)

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
        """Process descriptors of the first targets, if the session should end with them."""
        return self._pidfds

    def prepare(self, bpf_object: BpfObject) -> None:
        """Marks the spared processes in the kernel's map, where programs would add them by
        themselves. Call it before `attach`. Raises `BpfError`."""
        self._map = bpf_object.map("targets")
        if self._options.scope or self._options.cgroup:
            for tgid in self.spared:
                # Armed, a process counts from its next exec on; the agent has none.
                self._map.write(tgid, ((comm_of(tgid) or "").encode(), _STATE_ARMED, 0))

    def fill(self, bpf_object: BpfObject) -> None:
        """Writes the targets to the kernel's map. Call it after `attach`, so that no fork is
        missed. Raises `BpfError`."""
        if self._options.cgroup:
            fd = os.open(cgroup_directory(self._options.cgroup), os.O_RDONLY | os.O_DIRECTORY)
            try:
                bpf_object.write_fd("cgroups", 0, fd)
            finally:
                os.close(fd)
        if self._options.comm:
            self._tgids = tuple(
                tgid
                for tgid in running_tgids()
                if tgid not in self.spared and comm_of(tgid) == self._options.comm
            )
        self._tgids = tuple(tgid for tgid in self._tgids if not self._was_replaced(tgid))
        state = _STATE_ARMED if self._options.from_exec else _STATE_ACTIVE
        bpf_object.write_elements("target_hints", [tgid % _HINTS for tgid in self._tgids], 1)
        for tgid in self._tgids:
            self._map.write(tgid, ((comm_of(tgid) or "").encode(), state, 0))
        if self._options.until_exit:
            self._open_pidfds()

    def fill_members(self) -> None:
        """Writes the processes of a cgroup to the kernel's map, for programs that look up what a
        process already had open; all other targets are there. Call it after `fill`."""
        if not self._options.cgroup:
            return
        for tgid in cgroup_tgids(cgroup_directory(self._options.cgroup)) - self.spared:
            self._map.write(tgid, ((comm_of(tgid) or "").encode(), _STATE_ACTIVE, 0))

    def present(self) -> dict[int, str]:
        """Command names by tgid of the processes that are watched now, for callers that look up
        what these processes already had open. Call it after `fill_members`."""
        if self._options.scope:
            return {
                tgid: comm_of(tgid) or "" for tgid in running_tgids() if tgid not in self.spared
            }
        if self._options.from_exec:
            return {}
        members = self.read()
        names = map(comm_text, members.comms.tolist())
        present = zip(members.tgids.tolist(), names, strict=True)
        return {tgid: name for tgid, name in present if tgid not in self.spared}

    def _was_replaced(self, tgid: int) -> bool:
        """Whether the process that was asked for has ended and another one has its id."""
        started, now = self._started.get(tgid), start_time_of(tgid)
        return None not in (started, now) and started != now

    def _open_pidfds(self) -> None:
        for tgid in self._tgids:
            try:
                self._pidfds.append(os.pidfd_open(tgid))
            except ProcessLookupError:
                continue  # it has ended since it was asked for
        if not self._pidfds:
            raise BpfError("every process to watch has ended before the programs were attached")

    def unfollowed(self, bpf_object: BpfObject) -> int:
        """How many processes should be watched and did not fit into the map."""
        return int(bpf_object.read_variable("targets_full"))

    def read(self) -> Members:
        """The processes that are watched now, and those that have ended since they were last
        forgotten."""
        tgids, targets = self._map.read()
        tgids, at = np.unique(tgids, return_index=True)
        return Members(tgids, targets["comm"][at], targets["state"][at] == _STATE_EXITED)

    def forget(self, tgids: NDArray[Any]) -> None:
        """Removes the processes of TGIDS, of shape (n,), which have ended, from the map."""
        if len(tgids):
            self._map.delete(tgids.astype(self._map.key_dtype))

    def close(self) -> None:
        """Closes the process descriptors."""
        while self._pidfds:
            os.close(self._pidfds.pop())


def refused_options(features: Features) -> dict[str, str]:
    """Options of `TargetOptions` that are unsupported on this machine, each with the value to use
    instead and the reason."""
    refused = {}
    if not features["pidfd"].available:
        refused["until_exit"] = f"`false`: {features['pidfd'].reason}"
    if cgroup2_mount() is None:
        refused["cgroup"] = (
            "no value: no cgroup2 hierarchy is mounted here; mount -t cgroup2 none /sys/fs/cgroup"
        )
    return refused


def _comm_words(comm: str) -> Mapping[str, int]:
    """A command name in the form that the programs compare: its bytes, padded with zeros, as two
    words."""
    low, high = np.frombuffer(comm.encode().ljust(COMM_BYTES + 1, b"\0"), np.uint64).tolist()
    return {"wanted_comm_low": low, "wanted_comm_high": high}
