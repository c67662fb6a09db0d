"""What a session watches and whom it belongs to, as far as access depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coral.collectors.contract import ServiceProcesses, Watched

_SHOWN: Final = 16


@dataclass(frozen=True, slots=True)
class Target:
    """What a request for a collector resolved to.

    SERVICE is None where the request's options name the target. NAMESPACES are the Kubernetes
    namespaces that all of the processes belong to; empty where one may belong to none that is
    known. PODS are those that it has now, for the audit.
    """

    kind: int
    watched: Watched
    service: ServiceProcesses | None = None
    single_events: bool = False
    namespaces: tuple[str, ...] = ()
    pods: tuple[str, ...] = ()

    def described(self) -> dict[str, object]:
        """For the audit: as resolved, shortened."""
        watched = self.watched
        found: dict[str, object] = {}
        if self.service:
            found["service"] = self.service.name
        if watched.host:
            found["host"] = True
        if watched.cgroup:
            found["cgroup"] = str(watched.cgroup)
        if watched.pods:
            found["selector"] = watched.pods
            found["pods"] = list(self.pods[:_SHOWN])
            found["cgroups"] = len(watched.cgroups)
        if watched.comm:
            found["comm"] = watched.comm
        if watched.tgids:
            found["pids"] = list(watched.tgids[:_SHOWN])
            found["processes"] = len(watched.tgids)
        if self.namespaces:
            found["namespaces"] = list(self.namespaces)
        if self.single_events:
            found["mode"] = "events"
        return found


@dataclass(frozen=True, slots=True)
class Ownership:
    """What access to a session depends on.

    BY is the principal that started it; empty for a continuous one, which is the operator's.
    COVERED_BY are the numbers of the grants whose constraints its target meets, which are found
    once, before it starts: so no later decision looks at the machine.
    """

    by: str = ""
    continuous: bool = False
    namespaces: tuple[str, ...] = ()
    covered_by: frozenset[int] = frozenset()


NOBODYS: Final = Ownership()
"""Of a session that only those see who see all."""
