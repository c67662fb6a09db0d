"""From a service's name to its processes.

The steps, in order: the agent's configuration, a systemd unit, a container or pod in the cgroup
path, the command name of a process that listens on a TCP port. The first step that finds any
process decides, with all its matches.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from coral.agent.config import ServiceRule
from coral.agent.errors import NotFoundError
from coral.agent.files import read_regular
from coral.bpf.probing import capabilities
from coral.collectors.cgroups import cgroup_directory, cgroup_tgids
from coral.collectors.contract import ServiceProcesses
from coral.collectors.options import OptionError
from coral.collectors.procfs import PROC, comm_of, running_tgids, thread_group_of

_UNIT: Final = re.compile(r"(.+)\.(?:service|scope)")
# Container runtimes put a prefix before the id in a cgroup's name, and systemd a suffix after it.
_CONTAINER: Final = re.compile(
    r"(?:docker-|cri-containerd-|crio-|libpod-)?(.+?)(?:\.scope|\.slice)?"
)
_POD: Final = re.compile(r"(?:kubepods-(?:besteffort-|burstable-)?)?pod([0-9a-f_-]{36})")
_CONTAINER_ID: Final = re.compile(r"[0-9a-f]{64}")
_SHORT_ID_LENGTH: Final = 12
_NEAR_NAMES: Final = 3
_PID_FILE_BYTES: Final = 32
_PID: Final = re.compile(r"[1-9][0-9]{0,6}")


def resolve(name: str, rules: Mapping[str, ServiceRule]) -> ServiceProcesses:
    """The processes of the service NAME. Blocks. Raises `NotFoundError` with the nearest names."""
    if rule := rules.get(name):
        tgids = _by_rule(name, rule)
        if not tgids:
            raise NotFoundError(
                f"service_name: {name!r} is configured, and no process matches its rule now"
            )
        return ServiceProcesses(name, tuple(tgids))
    units, containers = _by_cgroup()
    for found in (units, containers, _by_listening_comm):
        names = found() if callable(found) else found
        if name in names:
            return ServiceProcesses(name, tuple(sorted(names[name])))
    known = {*rules, *units, *containers, *_by_listening_comm()}
    near = difflib.get_close_matches(name, known, _NEAR_NAMES, cutoff=0.4)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    if lacking := capabilities.lacking(capabilities.LISTENERS, capabilities.held()):
        hint += f". Other users' listening commands were not seen: {capabilities.missing(lacking)}"
    raise NotFoundError(
        f"service_name: no process belongs to {name!r}, as a configured service, systemd unit, "
        f"container, pod or listening command{hint}"
    )


def _by_rule(name: str, rule: ServiceRule) -> list[int]:
    if rule.comm:
        return [tgid for tgid in running_tgids() if comm_of(tgid) == rule.comm]
    if rule.cgroup:
        try:
            return sorted(cgroup_tgids(cgroup_directory(rule.cgroup)))
        except OptionError as error:
            raise NotFoundError(f"services.{name}.cgroup: {error}") from error
    tgid = _in_pid_file(name, rule.pid_file)
    return [tgid] if thread_group_of(tgid) == tgid else []


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


def _by_cgroup() -> tuple[Mapping[str, set[int]], Mapping[str, set[int]]]:
    """Processes by systemd unit, and by container's or pod's name or id."""
    units: dict[str, set[int]] = defaultdict(set)
    containers: dict[str, set[int]] = defaultdict(set)
    for tgid in running_tgids():
        for component in _cgroup_components(tgid):
            if match := _UNIT.fullmatch(component):
                units[match[1]].add(tgid)
                units[component].add(tgid)
            for container in container_names(component):
                containers[container].add(tgid)
    return units, containers


def _cgroup_components(tgid: int) -> set[str]:
    try:
        lines = (PROC / str(tgid) / "cgroup").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return set()  # the process has ended, or /proc hides it (hidepid)
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


def _by_listening_comm() -> Mapping[str, set[int]]:
    import psutil  # noqa: PLC0415  a megabyte that most agents never need

    found: dict[str, set[int]] = defaultdict(set)
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid:
            comm = comm_of(connection.pid)
            if comm:
                found[comm].add(connection.pid)
    return found
