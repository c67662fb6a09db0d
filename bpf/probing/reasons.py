"""Why a kernel refuses what it was asked for, and what to do about it.

One table says what each feature needs. The text follows from the table, from the error and from
facts about the machine, which `facts` reads; nothing here tries anything.
"""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from coral.bpf.probing import capabilities as caps

_ENOTSUPP: Final = 524  # kernel-internal, not in errno
_FORBIDDEN: Final = (errno.EPERM, errno.EACCES)
_ABSENT: Final = (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV, errno.EINVAL, errno.ESRCH)
_NO_HARDWARE: Final = (errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV)
_CAP_BPF_SINCE: Final = "5.8"  # and CAP_PERFMON; earlier kernels only have CAP_SYS_ADMIN
_LOCKDOWN: Final = Path("/sys/kernel/security/lockdown")
_CONFIDENTIALITY: Final = "confidentiality"
_SECCOMP_FILTER: Final = "2"

_BPF: Final = {"CAP_BPF": caps.TRACING["CAP_BPF"]}
_BPF_SYSCTL: Final = "kernel.unprivileged_bpf_disabled"
_PERF_SYSCTL: Final = "kernel.perf_event_paranoid"
_BTF: Final = "CONFIG_DEBUG_INFO_BTF"
_EVENTS: Final = "CONFIG_BPF_EVENTS"
_SYSCALL: Final = "CONFIG_BPF_SYSCALL"


@dataclass(frozen=True, slots=True)
class Takes:
    """What one feature needs of a machine."""

    since: str = ""  # the first Linux that has it
    config: tuple[str, ...] = (_SYSCALL,)  # options that the kernel has to be built with
    capabilities: Mapping[str, str] = field(default_factory=lambda: _BPF)  # with what for
    sysctl: str = ""  # the setting that denies it to processes without the capabilities
    since_arm64: str = ""  # if it came later on arm64
    locked_down: bool = False  # lockdown=confidentiality forbids it
    without_hardware: str = ""  # what to say of a machine on which the kernel finds no hardware


TAKES: Final[Mapping[str, Takes]] = {
    "btf": Takes("5.4", (_BTF,), {}),
    "tp_btf": Takes("5.5", (_BTF, _EVENTS), caps.TRACING),
    "raw_tp": Takes("4.17", (_EVENTS,), caps.TRACING),
    # For kernel functions; on arm64 this came two years after the trampoline of 6.0.
    "fentry": Takes(
        "5.5",
        (_BTF, "CONFIG_FUNCTION_TRACER", "CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS"),
        caps.TRACING,
        since_arm64="6.4",
    ),
    "kprobe": Takes(
        "4.17",
        ("CONFIG_KPROBES", "CONFIG_KPROBE_EVENTS", _EVENTS),
        caps.TRACING,
        _PERF_SYSCTL,
        locked_down=True,
    ),
    "iterator": Takes("5.8", (_BTF,), caps.TRACING),
    "map_iterator": Takes("5.9", (_BTF,), caps.TRACING),
    "syscall_program": Takes("5.14", capabilities=caps.TRACING),
    "socket_hooks": Takes("6.3", (_EVENTS, "CONFIG_NET"), caps.TRACING),
    "loops": Takes("5.17", capabilities=caps.TRACING),
    "uprobe_multi": Takes("6.6", ("CONFIG_UPROBE_EVENTS", _EVENTS), caps.TRACING),
    "cpu_clock": Takes("4.9", ("CONFIG_PERF_EVENTS", _EVENTS), caps.TRACING, _PERF_SYSCTL),
    "cpu_cycles": Takes(
        "4.9",
        ("CONFIG_PERF_EVENTS", _EVENTS),
        caps.TRACING,
        _PERF_SYSCTL,
        without_hardware="this machine counts no CPU cycles, as is usual for virtual ones",
    ),
    "ring_buffer": Takes("5.8"),
    "task_storage": Takes("5.13", (_SYSCALL, _BTF, _EVENTS), caps.TRACING),
    "percpu_hash": Takes("4.6"),
    "perf_buffer": Takes("4.3", (_SYSCALL, "CONFIG_PERF_EVENTS")),
    "elements_on_demand": Takes("6.1"),
    "batch": Takes("5.6"),
    "session_maps": Takes("5.10", capabilities=caps.TRACING),
    "run_time_stats": Takes("5.8", capabilities=caps.STATISTICS),
    "pidfd": Takes("5.3", (), {}),
    "sock_diag": Takes("3.3", ("CONFIG_INET_DIAG", "CONFIG_INET_TCP_DIAG"), {}),
}
_OPTIONS: Final = frozenset(option for takes in TAKES.values() for option in takes.config)


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about a machine that explain refusals; None if a fact cannot be read."""

    release: str
    machine: str
    capabilities: frozenset[str]
    config: frozenset[str] | None  # the options of the table that are set
    lockdown: str | None  # none, integrity or confidentiality
    seccomp: bool  # a filter applies to this process
    sysctls: Mapping[str, str]


def explain(name: str, error: int, said: str, facts: Facts) -> str:
    """Why the feature NAME failed with ERROR, an errno; libbpf or the kernel logged SAID."""
    takes = TAKES.get(name, Takes())
    code = errno.errorcode.get(error, str(error))
    if error in _FORBIDDEN:
        return f"{code}: {_forbidden(takes, facts)}"
    if error in _NO_HARDWARE and takes.without_hardware:
        return f"{code}: {takes.without_hardware}"
    if error in (*_ABSENT, _ENOTSUPP) and (why := _absent(takes, facts)):
        return f"{code}: {why}"
    return f"{code}: {said or os.strerror(error)}"


def _forbidden(takes: Takes, facts: Facts) -> str:
    known = caps.ALL
    if _numbers(facts.release) < _numbers(_CAP_BPF_SINCE):
        known -= set(caps.TRACING)
    if missing := caps.lacking(caps.required(takes.capabilities, known), facts.capabilities):
        rules = (_BPF_SYSCTL if "CAP_BPF" in missing else "", takes.sysctl)
        values = ((rule, facts.sysctls.get(rule, "0")) for rule in rules)
        said = "".join(f" ({rule} is {value})" for rule, value in values if int(value) > 0)
        return caps.missing(missing) + said
    if takes.locked_down and facts.lockdown == _CONFIDENTIALITY:
        return "kernel lockdown is at confidentiality: boot with lockdown=integrity or none"
    suspects = []
    if facts.seccomp:
        suspects.append("the seccomp filter around the agent (it must let bpf, perf_event_open by)")
    if facts.lockdown is None:
        suspects.append(f"kernel lockdown (to see it: mount -t securityfs none {_LOCKDOWN.parent})")
    elif facts.lockdown != "none":
        suspects.append(f"kernel lockdown, which is at {facts.lockdown}")
    suspects.append("a security module's policy")
    return f"forbidden, though no capability is missing: by {', or '.join(suspects)}"


def _absent(takes: Takes, facts: Facts) -> str:
    """Why the kernel does not have it; empty if it should."""
    since = takes.since_arm64 if takes.since_arm64 and facts.machine == "aarch64" else takes.since
    if since and _numbers(facts.release) < _numbers(since):
        return f"Linux {since} has it, and this is {facts.release}: run a newer kernel"
    if facts.config is None:
        options = ", ".join(takes.config)
        return f"this kernel, whose configuration cannot be read, may be without one of {options}"
    unset = [option for option in takes.config if option not in facts.config]
    if unset:
        them = "it" if len(unset) == 1 else "them"
        return f"this kernel is built without {', '.join(unset)}: run one that has {them}"
    return ""


def _numbers(release: str) -> tuple[int, int]:
    """The first two numbers of a release such as 6.1.0-56-amd64."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


@cache
def facts() -> Facts:
    """The facts about this machine and process, read once. Never raises."""
    status = _status()
    return Facts(
        release=platform.release(),
        machine=platform.machine(),
        capabilities=caps.held(),
        config=_config(platform.release()),
        lockdown=lockdown_level(_text(_LOCKDOWN)),
        seccomp=status.get("Seccomp") == _SECCOMP_FILTER,
        sysctls={
            name: value
            for name in (_BPF_SYSCTL, _PERF_SYSCTL)
            if (value := _text(Path("/proc/sys", name.replace(".", "/"))).strip())
        },
    )


def lockdown_level(text: str) -> str | None:
    """The level in brackets in `none [integrity] confidentiality`; None if there is none."""
    match = re.search(r"\[(\w+)\]", text)
    return match[1] if match else None


def options_set(lines: Iterable[str]) -> frozenset[str]:
    """The options of the table that a kernel's configuration sets."""
    set_ = (line.partition("=")[0] for line in lines if line.rstrip().endswith(("=y", "=m")))
    return frozenset(set_) & _OPTIONS


def _config(release: str) -> frozenset[str] | None:
    import gzip  # noqa: PLC0415  seldom needed

    packed, plain = Path("/proc/config.gz"), Path(f"/boot/config-{release}")
    try:
        with gzip.open(packed, "rt") if packed.exists() else plain.open() as lines:
            return options_set(lines)
    except OSError:
        return None


def _status() -> Mapping[str, str]:
    lines = _text(Path("/proc/self/status")).splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
