"""Linux capabilities: their names, those that the kernel knows, those that this process has, and
the message for missing ones. It knows nothing about collectors, and changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

# In the order of their numbers in linux/capability.h.
NAMES: Final = (
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID"),
    *("CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE"),
    *("CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW"),
    *("CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT"),
    *("CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE"),
    *("CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE"),
    *("CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE"),
    *("CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ"),
    *("CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE"),
)
ALL: Final = frozenset(NAMES)

# What every tracing program needs, each with its purpose.
TRACING: Final[Mapping[str, str]] = {
    "CAP_BPF": "to load programs and make maps",
    "CAP_PERFMON": "to attach programs that see other processes",
}
# What finding the process behind another user's listening socket needs.
LISTENERS: Final[Mapping[str, str]] = {
    "CAP_SYS_PTRACE": "to see whose socket it is",
    "CAP_DAC_READ_SEARCH": "to list the open files of other users' processes",
}
# What connections in other network namespaces need where there are no iterators.
NAMESPACES: Final[Mapping[str, str]] = {
    "CAP_SYS_ADMIN": "to ask for the connections of other network namespaces",
}
# What perf buffers need, on kernels that have no ring buffers (before 5.8).
BUFFERS: Final[Mapping[str, str]] = {
    "CAP_IPC_LOCK": "to map perf buffers beyond kernel.perf_event_mlock_kb",
}
# What turning on the kernel's run-time statistics needs.
STATISTICS: Final[Mapping[str, str]] = {
    "CAP_SYS_ADMIN": "to turn the kernel's run-time statistics on",
}
# What naming functions needs.
NAMES_OF_CODE: Final[Mapping[str, str]] = {
    "CAP_SYS_PTRACE": "to see what other users' processes have mapped",
    "CAP_DAC_READ_SEARCH": "to read their binaries",
    "CAP_CHECKPOINT_RESTORE": "to read binaries that were deleted or replaced",
    "CAP_SYSLOG": "to name the functions of the kernel",
}
# Alternatives. Before Linux 5.8, CAP_SYS_ADMIN was the only one for CAP_BPF and CAP_PERFMON.
_DOES_AS_WELL: Final[Mapping[str, str]] = {
    "CAP_BPF": "CAP_SYS_ADMIN",
    "CAP_PERFMON": "CAP_SYS_ADMIN",
    "CAP_DAC_READ_SEARCH": "CAP_DAC_OVERRIDE",
    "CAP_CHECKPOINT_RESTORE": "CAP_SYS_ADMIN",
}
_STATUS: Final = Path("/proc/self/status")
_LAST: Final = Path("/proc/sys/kernel/cap_last_cap")


def number(name: str) -> int:
    """The capability's number in the kernel."""
    return NAMES.index(name)


def held(which: str = "CapEff") -> frozenset[str]:
    """The capabilities that this process has now in the set WHICH, a key of /proc/PID/status; none
    if there is no such file."""
    try:
        status = _STATUS.read_text()
    except OSError:
        return frozenset()
    masks = dict(line.split(":", 1) for line in status.splitlines())
    mask = int(masks.get(which, "0"), 16)
    return frozenset(name for bit, name in enumerate(NAMES) if mask >> bit & 1)


def of_kernel() -> frozenset[str]:
    """The capabilities in NAMES that the running kernel knows."""
    try:
        last = int(_LAST.read_text())
    except (OSError, ValueError):
        return ALL
    return frozenset(NAMES[: last + 1])


def required(needs: Mapping[str, str], known: frozenset[str]) -> dict[str, str]:
    """NEEDS, expressed by the capabilities KNOWN to a kernel."""
    found: dict[str, list[str]] = {}
    for name, why in needs.items():
        found.setdefault(name if name in known else _DOES_AS_WELL.get(name, name), []).append(why)
    return {name: ", ".join(reasons) for name, reasons in found.items()}


def lacking(needs: Mapping[str, str], has: frozenset[str]) -> dict[str, str]:
    """The entries of NEEDS that are missing in a process that HAS these capabilities."""
    return {
        name: why
        for name, why in needs.items()
        if name not in has and _DOES_AS_WELL.get(name) not in has
    }


def missing(needs: Mapping[str, str]) -> str:
    """The message for a process without NEEDS: what is missing, its purpose, the remedy."""
    names = " and ".join(f"{name} ({why})" for name, why in needs.items())
    plain = " ".join(needs)
    return (
        f"{names} {'is' if len(needs) == 1 else 'are'} missing: run the agent as root, or give it "
        f"{plain}, by AmbientCapabilities= of its systemd unit or a container's --cap-add"
    )


def obstacle(has: frozenset[str]) -> str:
    """Why a process that HAS these capabilities can load no program; empty if it can."""
    if has & {"CAP_BPF", "CAP_SYS_ADMIN"}:
        return ""
    return missing(lacking(required(TRACING, of_kernel()), has))
