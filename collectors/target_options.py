"""The options that say what a collector watches, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coral.collectors.contract import ServiceProcesses
from coral.collectors.options import OptionError, boolean, choice, items, option, text
from coral.collectors.pids import PIDS, pid_anywhere, running_pid
from coral.collectors.selectors import SELECTORS, selector

COMM_BYTES: Final = 15  # and a terminating zero
TARGETS: Final = ("pid", "comm", "cgroup", *SELECTORS, "scope")
"""The options of which a request without a service names one."""


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
    pod: str = option(selector("pod"), "", "watch a pod of Kubernetes, or one of its containers")
    pods: str = option(
        selector("pods"),
        "",
        "watch the pods of a namespace with these labels, also later ones",
    )
    namespace: str = option(
        selector("namespace"), "", "watch the pods of this namespace, also later ones"
    )
    workload: str = option(
        selector("workload"), "", "watch the pods of this workload, also later ones"
    )
    container: str = option(selector("container"), "", "watch this container")
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
        named = [name for name in TARGETS if getattr(self, name)]
        if len(named) > 1:
            raise OptionError(
                named[1],
                str(getattr(self, named[1])),
                f"only one of {', '.join(TARGETS)}; {named[0]} is given too",
            )
        if not named and not service:
            raise OptionError(
                "scope",
                "",
                f'a service_name, or one of {", ".join(TARGETS[:-1])}, or scope "host" for all '
                "processes",
            )
        if self.until_exit and named not in (["pid"], []):
            raise OptionError("until_exit", "true", "it with pid or a service_name only")
        if not self.follow_children and named and named[0] in SELECTORS:
            raise OptionError("follow_children", "false", "true: a pod is all of its processes")
        if self.from_exec and named != ["pid"]:
            raise OptionError("from_exec", "true", "it with pid only")

    @property
    def selector(self) -> str:
        """The name of the option that selects pods or containers; empty if there is none."""
        return next((name for name in SELECTORS if getattr(self, name)), "")
