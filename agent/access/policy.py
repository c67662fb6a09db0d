"""What may be watched: decided on what a request resolved to, not on its words.

The same rules hold for the agent's policy, which is about all callers, and for the constraints of a
role. SECURITY.md has them for users. The operator's own continuous collectors are exempt.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, Self

from coral.agent.config import Policy
from coral.agent.config_access import RoleRule
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


@dataclass(frozen=True, slots=True)
class Scope:
    """Which processes may be watched. KEY is where the configuration says so, for messages: a scope
    with lists is for what one of them names."""

    key: str
    services: tuple[str, ...] = ()
    cgroups: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    host: bool = True

    @classmethod
    def of_policy(cls, policy: Policy) -> Self:
        """That of the agent, for all callers."""
        return cls("policy", policy.services, policy.cgroups, (), policy.host_scope)

    @classmethod
    def of_rule(cls, key: str, rule: RoleRule) -> Self:
        """That of a role. An admin may watch the whole machine, unless lists say what."""
        host = rule.host_scope or rule.role == "admin"
        return cls(key, rule.services, rule.cgroups, rule.namespaces, host)

    @property
    def lists(self) -> dict[str, tuple[str, ...]]:
        """The lists that are not empty, by key."""
        lists = {
            "services": self.services,
            "cgroups": self.cgroups,
            "namespaces": self.namespaces,
        }
        return {name: values for name, values in lists.items() if values}


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
    return replace(service, tgids=left)


def check(watched: Watched, service: ServiceProcesses | None, policy: Policy) -> None:
    """Raises `DeniedError` where POLICY does not allow to watch that. SERVICE is what the request
    resolved to by its name, None where its options name the target. Blocks."""
    if protected := sorted(spared(policy).intersection(watched.tgids)):
        raise DeniedError(_not_allowed("pid", str(protected[0]), *_why_spared(protected)))
    check_scope(watched, service, (), Scope.of_policy(policy))


def check_scope(
    watched: Watched,
    service: ServiceProcesses | None,
    namespaces: Sequence[str],
    scope: Scope,
) -> None:
    """Raises `DeniedError` where SCOPE does not include that. All of the processes belong to the
    Kubernetes NAMESPACES, or none is known. Blocks."""
    allowed = bool(scope.lists) and covers(scope, watched, service, namespaces)
    if watched.pods and scope.lists and not allowed:
        # First: how many processes another team's pods have is not for this caller.
        raise DeniedError(_not_listed(watched, service, scope))
    if not scope.host:
        _check_host_scope(watched, service, f"{scope.key}.host_scope", allowed=allowed)
    if not allowed and scope.lists:
        raise DeniedError(_not_listed(watched, service, scope))


def covers(
    scope: Scope, watched: Watched, service: ServiceProcesses | None, namespaces: Sequence[str]
) -> bool:
    """Whether one of the lists of SCOPE names what is watched, or there are none. Blocks where the
    scope names cgroups."""
    if not scope.lists or (namespaces and are_among(namespaces, scope.namespaces)):
        return True
    return _is_listed(watched, service, scope)


def _why_spared(tgids: Iterable[int]) -> tuple[str, str]:
    if INIT in tgids:
        return "policy.allow_init", "it is the machine's first process"
    return "policy.allow_agent", "it is this agent"


def _not_allowed(name: str, value: str, key: str, why: str) -> str:
    field = name if name == "service_name" else f'config["{name}"]'
    return f"{field}: {value!r} is not allowed by this agent's {key}: {why}"


def _check_host_scope(
    watched: Watched, service: ServiceProcesses | None, key: str, *, allowed: bool
) -> None:
    name, value = _words(watched, service)
    if watched.host:
        raise DeniedError(f"config[\"scope\"]: 'host' is not allowed by this agent's {key}")
    tgids: Iterable[int] = watched.tgids
    if watched.cgroup:
        holds = (tgid for tgid in (INIT, os.getpid()) if _holds(watched.cgroup, tgid))
        if (tgid := next(holds, None)) is not None:
            what = "the machine's first process" if tgid == INIT else "this agent"
            why = f"this cgroup holds {what}, as the root of all cgroups does"
            raise DeniedError(_not_allowed(name, value, key, why))
        tgids = cgroup_tgids(watched.cgroup)
    elif watched.pods:
        tgids = {tgid for cgroup in watched.cgroups for tgid in cgroup_tgids(cgroup)}
    elif watched.comm:
        tgids = (tgid for tgid in running_tgids() if comm_of(tgid) == watched.comm)
    elif INIT in watched.tgids and watched.follows_children:
        why = "every process descends from it; give follow_children=false too"
        raise DeniedError(_not_allowed(name, value, key, why))
    if not allowed and (share := _share(frozenset(tgids))) >= _MOST_SHARE:
        why = f"this is {share:.0%} of the machine's processes"
        raise DeniedError(_not_allowed(name, value, key, why))


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


def _is_named(service: ServiceProcesses | None, scope: Scope) -> bool:
    return service is not None and any(fnmatchcase(service.name, name) for name in scope.services)


def _is_listed(watched: Watched, service: ServiceProcesses | None, scope: Scope) -> bool:
    """Whether one of the scope's lists names what is watched."""
    if _is_named(service, scope):
        return True
    if not scope.cgroups or watched.host or watched.comm:
        return False  # processes of a name may start in any cgroup
    covered = _covered(scope)
    if watched.cgroup:
        return covered(watched.cgroup)
    if watched.pods:
        return bool(watched.cgroups) and all(map(covered, watched.cgroups))
    roots = _identities(scope.cgroups)
    each = (not roots.isdisjoint(_above_process(tgid)) for tgid in watched.tgids)
    return bool(watched.tgids) and all(each)


def within(
    scopes: Iterable[Scope], service: ServiceProcesses | None, namespaces: Sequence[str]
) -> Callable[[Path], bool] | None:
    """What a cgroup must be that comes later to a target that all SCOPES include: None where it may
    be any, as all that may come is in namespaces or of a service that they name. Blocks."""
    must = [
        _covered(scope)
        for scope in scopes
        if scope.lists
        and not (namespaces and are_among(namespaces, scope.namespaces))
        and not _is_named(service, scope)
    ]
    return (lambda directory: all(covered(directory) for covered in must)) if must else None


def _covered(scope: Scope) -> Callable[[Path], bool]:
    """Says of a cgroup's directory whether it is one of the scope's list, or below one."""
    roots = _identities(scope.cgroups)
    return lambda directory: not roots.isdisjoint(_above(directory))


def are_among(namespaces: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether each of NAMESPACES is of one of PATTERNS."""
    known = tuple(patterns)
    return all(any(fnmatchcase(each, pattern) for pattern in known) for each in namespaces)


_EXAMPLES: Final = {
    "services": "a service_name of",
    "cgroups": "processes in",
    "namespaces": "processes of a Kubernetes namespace of",
}


def _not_listed(watched: Watched, service: ServiceProcesses | None, scope: Scope) -> str:
    lists = [
        f"{_EXAMPLES[name]} {scope.key}.{name} ({', '.join(values)})"
        for name, values in scope.lists.items()
    ]
    keys = " and ".join(f"{scope.key}.{name}" for name in scope.lists)
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
