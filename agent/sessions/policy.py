"""What callers may watch: decided on what a request resolved to, not on its words.

SECURITY.md has these rules for users. The operator's own continuous collectors are exempt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from coral.agent.config import Policy
from coral.agent.errors import DeniedError
from coral.collectors.cgroups import (
    above,
    cgroup_directory,
    cgroup_of,
    cgroup_tgids,
    hierarchy,
)
from coral.collectors.contract import ServiceProcesses, Watched
from coral.collectors.options import OptionError
from coral.collectors.procfs import comm_of, running_tgids, watchable

INIT: Final = 1
# A target of more processes than this that holds at least this share of the machine's user
# processes is the machine.
_FEW: Final = 8
_MOST_SHARE: Final = 0.9

_Identity = tuple[int, int]


def spared(policy: Policy) -> frozenset[int]:
    """The processes that no session of a caller watches, whatever its target."""
    processes = set()
    if not policy.allow_agent:
        processes.add(os.getpid())
    if not policy.allow_init:
        processes.add(INIT)
    return frozenset(processes)


def spare(service: ServiceProcesses, policy: Policy) -> ServiceProcesses:
    """SERVICE without the processes that the policy spares. Raises `DeniedError` where none is
    left."""
    left = tuple(tgid for tgid in service.tgids if tgid not in spared(policy))
    if not left:
        raise DeniedError(_not_allowed("service_name", service.name, *_why_spared(service.tgids)))
    return ServiceProcesses(service.name, left)


def check(watched: Watched, service: ServiceProcesses | None, policy: Policy) -> None:
    """Raises `DeniedError` where POLICY does not allow to watch that. SERVICE is what the request
    resolved to by its name, None where its options name the target. Blocks."""
    if protected := sorted(spared(policy).intersection(watched.tgids)):
        raise DeniedError(_not_allowed("pid", str(protected[0]), *_why_spared(protected)))
    allowed = _is_listed(watched, service, policy)
    if not policy.host_scope:
        _check_host_scope(watched, service, allowed=allowed)
    if not allowed and (policy.cgroups or policy.services):
        raise DeniedError(_not_listed(watched, service, policy))


def _why_spared(tgids: Iterable[int]) -> tuple[str, str]:
    if INIT in tgids:
        return "policy.allow_init", "it is the machine's first process"
    return "policy.allow_agent", "it is this agent"


def _not_allowed(name: str, value: str, key: str, why: str) -> str:
    field = name if name == "service_name" else f'config["{name}"]'
    return f"{field}: {value!r} is not allowed by this agent's {key}: {why}"


def _check_host_scope(watched: Watched, service: ServiceProcesses | None, *, allowed: bool) -> None:
    name, value = _words(watched, service)
    if watched.host:
        raise DeniedError(
            "config[\"scope\"]: 'host' is not allowed by this agent's policy.host_scope"
        )
    tgids: Iterable[int] = watched.tgids
    if watched.cgroup:
        holds = (tgid for tgid in (INIT, os.getpid()) if _holds(watched.cgroup, tgid))
        if (tgid := next(holds, None)) is not None:
            what = "the machine's first process" if tgid == INIT else "this agent"
            why = f"this cgroup holds {what}, as the root of all cgroups does"
            raise DeniedError(_not_allowed(name, value, "policy.host_scope", why))
        tgids = cgroup_tgids(watched.cgroup)
    elif watched.pods:
        tgids = {tgid for cgroup in watched.cgroups for tgid in cgroup_tgids(cgroup)}
    elif watched.comm:
        tgids = (tgid for tgid in running_tgids() if comm_of(tgid) == watched.comm)
    elif INIT in watched.tgids and watched.follows_children:
        why = "every process descends from it; give follow_children=false too"
        raise DeniedError(_not_allowed(name, value, "policy.host_scope", why))
    if not allowed and (share := _share(frozenset(tgids))) >= _MOST_SHARE:
        why = f"this is {share:.0%} of the machine's processes"
        raise DeniedError(_not_allowed(name, value, "policy.host_scope", why))


def _words(watched: Watched, service: ServiceProcesses | None) -> tuple[str, str]:
    """The name of the field that names the target, and its value, shortened."""
    if service:
        return "service_name", service.name
    if watched.cgroup:
        return "cgroup", str(watched.cgroup)
    if watched.pods:
        kind, _, text = watched.pods.partition(":")
        return kind, text
    if watched.comm:
        return "comm", watched.comm
    first = ",".join(map(str, watched.tgids[:_FEW]))
    return "pid", first + ",..." * (len(watched.tgids) > _FEW)


def is_service_listed(service: ServiceProcesses | None, policy: Policy) -> bool:
    """Whether the policy's list of services names it."""
    return service is not None and any(fnmatchcase(service.name, name) for name in policy.services)


def _is_listed(watched: Watched, service: ServiceProcesses | None, policy: Policy) -> bool:
    """Whether one of the policy's lists names what is watched."""
    if is_service_listed(service, policy):
        return True
    if not policy.cgroups or watched.host or watched.comm:
        return False  # processes of a name may start in any cgroup
    covered = covers(policy)
    if watched.cgroup:
        return covered(watched.cgroup)
    if watched.pods:
        return bool(watched.cgroups) and all(map(covered, watched.cgroups))
    roots = _identities(policy.cgroups)
    return all(not roots.isdisjoint(_above_process(tgid)) for tgid in watched.tgids)


def covers(policy: Policy) -> Callable[[Path], bool]:
    """Says of a cgroup's directory whether it is one of the policy's list, or below one."""
    roots = _identities(policy.cgroups)
    return lambda directory: not roots.isdisjoint(_above(directory))


def _not_listed(watched: Watched, service: ServiceProcesses | None, policy: Policy) -> str:
    lists = []
    if policy.services:
        lists.append(f"a service_name of policy.services ({', '.join(policy.services)})")
    if policy.cgroups:
        lists.append(f"processes in policy.cgroups ({', '.join(policy.cgroups)})")
    keys = " and ".join(
        key
        for key, values in (
            ("policy.services", policy.services),
            ("policy.cgroups", policy.cgroups),
        )
        if values
    )
    name, value = ("scope", "host") if watched.host else _words(watched, service)
    return _not_allowed(name, value, keys, f"give {' or '.join(lists)}")


def _holds(directory: Path, tgid: int) -> bool:
    """Whether a process is in a cgroup or below it."""
    cgroup = cgroup_of(tgid, hierarchy(directory))
    return cgroup is not None and _identity(directory) in _above(cgroup)


def _above(directory: Path) -> frozenset[_Identity | None]:
    """A cgroup and those above it, by device and inode: a mount elsewhere has them too."""
    return frozenset(map(_identity, above(directory))) - {None}


def _above_process(tgid: int) -> frozenset[_Identity | None]:
    """The cgroups that a process is in, of every hierarchy, and those above them."""
    directories = (cgroup_of(tgid, "v2"), cgroup_of(tgid, "memory"))
    return frozenset[_Identity | None]().union(*(_above(found) for found in directories if found))


def _identities(paths: Iterable[str]) -> frozenset[_Identity]:
    """Those of the cgroups that exist."""
    found = set()
    for path in paths:
        try:
            identity = _identity(cgroup_directory(path))
        except OptionError:
            continue
        if identity:
            found.add(identity)
    return frozenset(found)


def _identity(directory: Path) -> _Identity | None:
    try:
        found = directory.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _share(tgids: frozenset[int]) -> float:
    """The share of this machine's user processes that TGIDS are; 0 for a few."""
    if len(tgids) <= _FEW:
        return 0
    users = watchable().keys() - {INIT, os.getpid()}
    return len(tgids & users) / max(len(users), 1)
