"""From a service's name to its processes.

The steps, in order: the agent's configuration, a systemd unit, a container or pod in the cgroup
path, the command name of processes that listen on a TCP port. The first step that finds any
process decides, with all its matches. A service found by its processes' name, sockets or pid file
is these processes and their descendants; one found by a cgroup is all processes in the cgroup.
Where only the workers listen, each on a socket of its own (SO_REUSEPORT), their master belongs to
the service, too: the workers that it forks later are its children.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Final

from coral.agent.config import ServiceRule
from coral.agent.errors import NotFoundError
from coral.agent.machine.listeners import listening
from coral.bpf.probing import capabilities
from coral.collectors.cgroups import cgroup_directory, cgroup_tgids
from coral.collectors.contract import ServiceProcesses
from coral.collectors.options import OptionError
from coral.collectors.procfs import Process, read, watchable, with_descendants
from coral.wire.settings.files import read_regular

_UNIT: Final = re.compile(r"(.+)\.(?:service|scope)")
# Container runtimes put a prefix before the id in a cgroup's name, and systemd a suffix after it.
_CONTAINER: Final = re.compile(
    r"(?:docker-|cri-containerd-|crio-|libpod-)?(.+?)(?:\.scope|\.slice)?"
)
_POD: Final = re.compile(r"(?:kubepods-(?:besteffort-|burstable-)?)?pod([0-9a-f_-]{36})")
_CONTAINER_ID: Final = re.compile(r"[0-9a-f]{64}")
_SHORT_ID_LENGTH: Final = 12
_NEAR_NAMES: Final = 3
_LIKELY_NAMES: Final = 12  # of which some are commands that do not listen
_LIKENESS: Final = 0.4
_INIT: Final = 1  # every process descends from it
_PID_FILE_BYTES: Final = 32
_PID: Final = re.compile(r"[1-9][0-9]{0,6}")


def resolve(
    name: str, rules: Mapping[str, ServiceRule], *, descendants: bool = True
) -> ServiceProcesses:
    """The processes of the service NAME. Without DESCENDANTS, only those that themselves have its
    command name, sockets or pid file. Blocks. Raises `NotFoundError` with the nearest names."""
    processes = watchable()
    if rule := rules.get(name):
        found = _by_rule(name, rule, processes)
        if not found:
            raise NotFoundError(
                f"service_name: {name!r} is configured, and no process matches its rule now"
            )
        is_complete = bool(rule.cgroup)
    else:
        units, containers = _by_cgroup(processes)
        found = units.get(name) or containers.get(name) or set()
        is_complete = bool(found)
        found = found or _listening_and_masters(_having(name, processes), processes)
        if not found:
            raise _not_found(name, {*rules, *units, *containers}, processes)
    if descendants and not is_complete:
        found |= with_descendants(found - {_INIT}, processes)
    return ServiceProcesses(name, tuple(sorted(found)))


def _not_found(
    name: str, known: AbstractSet[str], processes: Mapping[int, Process]
) -> NotFoundError:
    """Why nothing is found, with the nearest names: those KNOWN, and listening commands."""
    commands = {process.comm for process in processes.values()}
    likely = difflib.get_close_matches(name, known | commands, _LIKELY_NAMES, _LIKENESS)
    near = [other for other in likely if other in known or listening(_having(other, processes))]
    hint = f"; the nearest names are {', '.join(near[:_NEAR_NAMES])}" if near else ""
    if lacking := capabilities.lacking(capabilities.LISTENERS, capabilities.held()):
        hint += f". Other users' listening commands were not seen: {capabilities.missing(lacking)}"
    return NotFoundError(
        f"service_name: no process belongs to {name!r}, as a configured service, systemd unit, "
        "container, pod or listening command",
        hint,
    )


def _having(comm: str, processes: Mapping[int, Process]) -> set[int]:
    """The processes with a command name."""
    return {process.tgid for process in processes.values() if process.comm == comm}


def _listening_and_masters(named: AbstractSet[int], processes: Mapping[int, Process]) -> set[int]:
    """Those of the processes NAMED that listen, and those that have forked them: parents among
    NAMED that run the same command line."""
    found = listening(named)
    left = list(found)
    while left:
        child = left.pop()
        parent = processes[child].parent
        if parent in named - found and _is_fork(child, parent):
            found.add(parent)
            left.append(parent)
    return found


def _is_fork(child: int, parent: int) -> bool:
    """Whether a process runs its parent's program, with the same arguments."""
    command_line = read(child, "cmdline")
    return bool(command_line) and command_line == read(parent, "cmdline")


def _by_rule(name: str, rule: ServiceRule, processes: Mapping[int, Process]) -> set[int]:
    if rule.comm:
        return _having(rule.comm, processes)
    if not rule.cgroup:
        return {_in_pid_file(name, rule.pid_file)} & processes.keys()
    try:
        return cgroup_tgids(cgroup_directory(rule.cgroup)) & processes.keys()
    except OptionError as error:
        raise NotFoundError(f"services.{name}.cgroup: {error}") from error


def _in_pid_file(name: str, path: str) -> int:
    """The process id in a file. The service's own user may be able to write it: it must be no link,
    and nothing that a reader would wait for."""
    try:
        text = read_regular(Path(path), _PID_FILE_BYTES, follow=False).decode("ascii", "replace")
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise NotFoundError(f"services.{name}.pid_file: {path}: {why}") from error
    if not _PID.fullmatch(text.strip()):
        raise NotFoundError(f"services.{name}.pid_file: {path}: {text!r} is not a process id")
    return int(text)


def _by_cgroup(
    tgids: Iterable[int],
) -> tuple[Mapping[str, set[int]], Mapping[str, set[int]]]:
    """Processes by systemd unit, and by container's or pod's name or id."""
    units: dict[str, set[int]] = defaultdict(set)
    containers: dict[str, set[int]] = defaultdict(set)
    for text, members in _by_cgroup_file(tgids).items():
        for component in _components(text):
            if match := _UNIT.fullmatch(component):
                units[match[1]] |= members
                units[component] |= members
            for container in container_names(component):
                containers[container] |= members
    return units, containers


def _by_cgroup_file(tgids: Iterable[int]) -> Mapping[str, set[int]]:
    """Processes by the text of their /proc/PID/cgroup, which most share with others."""
    found: dict[str, set[int]] = defaultdict(set)
    for tgid in tgids:
        if text := read(tgid, "cgroup"):
            found[text].add(tgid)
    return found


def _components(text: str) -> set[str]:
    lines = text.splitlines()
    return {part for line in lines for part in line.split(":", 2)[2].split("/") if part}


def container_names(component: str) -> Iterator[str]:
    """The names of a container or pod in one component of a cgroup path: the container's id, whole
    and short, the pod's uid, or the name that the runtime gave the cgroup."""
    if match := _POD.match(component):
        yield match[1].replace("_", "-")
        return
    match = _CONTAINER.fullmatch(component)
    if match and not component.endswith(".service"):
        yield match[1]
        if _CONTAINER_ID.fullmatch(match[1]):
            yield match[1][:_SHORT_ID_LENGTH]
