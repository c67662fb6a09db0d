"""Processes and cgroups as callers in containers name them, in the words of the agent's host.

The kernel vouches for the process at the other end of a unix socket, and so for its namespaces.
Nobody vouches for a namespace's number that comes by TCP: it may be another machine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from coral.collectors.cgroups import directory_seen_by
from coral.collectors.namespaces import (
    FIRST_CGROUP_NAMESPACE,
    namespace_of,
    pid_depth,
    tgids_in,
)
from coral.collectors.options import OptionError

_HOST: Final[Mapping[str, str]] = {
    "pid": "the ids that the processes have in the agent's pid namespace",
    "cgroup": "the path that the cgroup has on the agent's host",
}
_REMEDY: Final[Mapping[str, str]] = {
    "pid": "start coral with hostPID: true or `docker run --pid=host`, or give the host's ids",
    "cgroup": "start coral with `docker run --cgroupns=host`, or give the host's path",
}
_COMMAND_BY_TCP: Final = (
    "it by the agent's unix socket, unix:/run/coral/agent.sock by default: a command in a pid "
    "namespace of its own ({}), such as a container's, cannot be watched by TCP; or start coral "
    "with hostPID: true or `docker run --pid=host`"
)


@dataclass(frozen=True, slots=True)
class Namespaces:
    """The namespaces in which a request names its target, by their inodes; 0 is the agent's."""

    pid: int = 0
    cgroup: int = 0


HERE: Final = Namespaces()
"""The agent's own."""


def translated(config: Mapping[str, str], named_in: Namespaces, caller: int) -> Mapping[str, str]:
    """CONFIG with `pid` and `cgroup` as they are for this agent. CALLER is the id of the calling
    process, 0 where it is not known. Looks at every process or cgroup. Raises `OptionError`."""
    if pids := config.get("pid"):
        config = {**config, "pid": _pids(pids, named_in.pid, caller, config)}
    if path := config.get("cgroup"):
        config = {**config, "cgroup": _cgroup(path, named_in.cgroup, caller)}
    return config


def _pids(value: str, namespace: int, caller: int, config: Mapping[str, str]) -> str:
    texts = [text.strip() for text in value.split(",") if text.strip()]
    if not all(text.isdecimal() for text in texts) or _is_own("pid", namespace):
        return value  # where it is malformed, it is refused with all other options
    if not caller and config.get("from_exec", "").lower() == "true":
        # A command that its caller is about to start; the user cannot know its id on the host.
        raise OptionError("pid", value, _COMMAND_BY_TCP.format(namespace))
    _check("pid", value, namespace, caller)
    tgids = tgids_in(namespace, pid_depth(caller), set(map(int, texts)))
    for text in texts:
        if int(text) not in tgids:
            raise OptionError(
                "pid", value, f"the ids of processes that run now: {int(text)} does not"
            )
    return ",".join(str(tgids[int(text)]) for text in texts)


def _cgroup(path: str, namespace: int, caller: int) -> str:
    # In the first one, a path is the same on all machines; the agent resolves those from the root.
    if namespace == FIRST_CGROUP_NAMESPACE or _is_own("cgroup", namespace):
        return path
    _check("cgroup", path, namespace, caller)
    return str(directory_seen_by(caller, path))


def _is_own(kind: str, namespace: int) -> bool:
    return namespace in (0, namespace_of("self", kind))


def _check(kind: str, value: str, namespace: int, caller: int) -> None:
    """Raises `OptionError` unless CALLER is known to be in NAMESPACE."""
    if not caller:
        raise _refusal(
            kind,
            value,
            f"which is not the agent's ({namespace}): it translates for callers on its unix socket "
            "only",
        )
    known = namespace_of(caller, kind)
    if known is None:
        raise _refusal(
            kind,
            value,
            "which the agent cannot look at: it has ended, or CAP_SYS_PTRACE is missing",
        )
    if known != namespace:
        raise _refusal(
            kind,
            value,
            f"and the request names another one ({namespace}) than that of the process at the "
            f"other end of the socket ({known})",
        )


def _refusal(kind: str, value: str, why: str) -> OptionError:
    return OptionError(
        kind, value, f"{_HOST[kind]}: the caller is in one of its own, {why}; {_REMEDY[kind]}"
    )
