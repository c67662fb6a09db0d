"""What the running kernel supports, found by trying, with a reason for everything that it refuses.

Version numbers are never used: distributions back-port, strip and lock down. A probe loads and
attaches an empty program, or creates a small map, and undoes it at once.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from coral.bpf.attaching.each_cpu import CpuEvent, online_cpus
from coral.bpf.attaching.sampling import cpu_clock, cycle_counter
from coral.bpf.attaching.uprobe_links import attach_many
from coral.bpf.libbpf import (
    VMLINUX_BTF,
    AttachError,
    BpfError,
    LibbpfMissingError,
    call,
    call_pointer,
    log_tail,
    release_memory,
    version,
)
from coral.bpf.loading import bcc
from coral.bpf.loading.object import BpfObject, enable_run_time_stats
from coral.bpf.loading.object_file import not_built, object_path
from coral.bpf.probing import capabilities as caps
from coral.bpf.probing import reasons, sock_diag

_PROBE_OBJECT: Final = "features"
_PROBE_RECORD: Final = "coral_p_record"
_PROBE_RUN: Final = "coral_p_syscall"
_PROBE_SESSIONS: Final = "coral_p_sessions"
_PROBE_SOCKETS: Final = ("coral_p_sent", "coral_p_received")
_PROBE_LOOP: Final = "coral_p_loop"
_PROBE_UPROBE: Final = "coral_p_uprobe"
_PROBE_SAMPLE: Final = "coral_p_sample"
_PROBE_STORAGE: Final = ("coral_p_task_storage", "coral_p_storage")  # a program and its map

# Hook kinds, best first, with the program that tries each.
HOOKS: Final = {
    "tp_btf": "coral_p_raw_tp",
    "raw_tp": "coral_p_raw_tp",
    "fentry": "coral_p_fentry",
    "kprobe": "coral_p_kprobe",
}
# Types of iterators, with the program that tries each, and the map that it walks through, if any.
ITERATORS: Final = {
    "iterator": ("coral_p_iter", None),  # through the open files of all tasks
    "map_iterator": ("coral_p_map_iter", "coral_p_map"),
}
# Map kinds, by their number in enum bpf_map_type.
MAPS: Final = {"ring_buffer": 27, "percpu_hash": 5, "perf_buffer": 4}
LOADERS: Final = ("auto", "core", "bcc")
_RARELY_CYCLES: Final = 1 << 40  # minutes of a CPU: a probe takes no sample

# To do without something that the kernel has, and to test the rungs below.
_ENV_WITHOUT: Final = "CORAL_WITHOUT"
_ENV_LOADER: Final = "CORAL_LOADER"


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that a kernel may support; `reason` is empty if it does."""

    name: str
    available: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Features:
    """The features of this machine. `obstacle` is why eBPF cannot be used at all, or empty."""

    kernel_release: str
    libbpf_version: str
    capabilities: frozenset[str]
    features: tuple[Feature, ...]
    obstacle: str = ""
    loader: str = "auto"  # the one to use: one of LOADERS

    def __getitem__(self, name: str) -> Feature:
        return next(
            (feature for feature in self.features if feature.name == name),
            Feature(name, False, self.obstacle or f"{name} was not tried"),
        )

    def without(self, *names: str) -> Features:
        """These without the features named."""
        kept = tuple(feature for feature in self.features if feature.name not in names)
        return replace(self, features=kept)

    @property
    def cap_bpf(self) -> bool:
        """Whether this process may load programs: CAP_BPF, or CAP_SYS_ADMIN, which implies it."""
        return bool(self.capabilities & {"CAP_BPF", "CAP_SYS_ADMIN"})

    def missing(self, names: Iterable[str]) -> list[Feature]:
        """The features among NAMES that this machine lacks."""
        return [feature for name in names if not (feature := self[name]).available]


@cache
def probe() -> Features:
    """Tries everything, once in the life of the process: about 100 ms. Never raises."""
    capabilities = caps.held()
    obstacle = _obstacle(capabilities)
    found: tuple[Feature, ...] = ()
    loader = os.environ.get(_ENV_LOADER, "auto")
    if loader not in LOADERS:
        obstacle = f"{_ENV_LOADER} is {loader!r}; it can be {', '.join(LOADERS)}"
    if not obstacle:
        found = (
            _btf(),
            *(_try(name, _attach_probe(name, program)) for name, program in HOOKS.items()),
            *(_try(name, _attach_iterator(*way)) for name, way in ITERATORS.items()),
            _try("syscall_program", _run_program),
            _try("socket_hooks", _attach_to_sockets),
            _try("loops", _load_loop),
            _try("uprobe_multi", _attach_to_many),
            _try("cpu_clock", _sample_with(cpu_clock, 1)),
            _try("cpu_cycles", _sample_with(cycle_counter, _RARELY_CYCLES)),
            *(_try(name, _make_map(number)) for name, number in MAPS.items()),
            _try("task_storage", _use_task_storage),
            _elements_on_demand(),
            _try("batch", _read_a_batch),
            _try("session_maps", _install_a_map),
            _try("run_time_stats", _enable_stats),
            _pidfd(),
            _sock_diag(),
            _bcc(),
            _others_listeners(capabilities),
        )
        found = tuple(map(_unless_switched_off, found))
    release_memory()
    return Features(
        platform.release(),
        "" if obstacle else version(),
        capabilities,
        found,
        obstacle,
        loader,
    )


def _unless_switched_off(feature: Feature) -> Feature:
    if feature.name in os.environ.get(_ENV_WITHOUT, "").split(","):
        return replace(feature, available=False, reason=f"switched off by {_ENV_WITHOUT}")
    return feature


def _obstacle(capabilities: frozenset[str]) -> str:
    if sys.platform != "linux":
        return f"eBPF needs Linux; this is {platform.system()}"
    try:
        version()
    except LibbpfMissingError as error:
        return str(error)
    if not object_path(_PROBE_OBJECT).exists():
        return not_built(object_path(_PROBE_OBJECT))
    return caps.obstacle(capabilities)


def _try(name: str, attempt: Callable[[], None]) -> Feature:
    try:
        attempt()
    except BpfError as error:
        if not error.errno:
            return Feature(name, False, str(error))
        return _refused(name, error.errno, log_tail(error.log, 1))
    return Feature(name, True)


def _refused(name: str, error: int, said: str = "") -> Feature:
    return Feature(name, False, reasons.explain(name, error, said, reasons.facts()))


def _probe_object(
    *programs: str, walks: Sequence[str] = (), typed: bool = False, storage: bool = False
) -> BpfObject:
    without = () if storage else _PROBE_STORAGE[1:]
    return BpfObject(
        _PROBE_OBJECT, programs=programs, walks=walks, typed=typed, without_maps=without
    )


def _attach_probe(hook: str, program: str) -> Callable[[], None]:
    def attempt() -> None:
        with _probe_object(program, typed=hook == "tp_btf") as probe_object:
            probe_object.attach(tries=1)

    return attempt


def _attach_iterator(program: str, map_name: str | None) -> Callable[[], None]:
    def attempt() -> None:
        with _probe_object(walks=(program,)) as probe_object:
            probe_object.walk(program, _PROBE_RECORD, map_name=map_name)

    return attempt


def _run_program() -> None:
    """Runs a program that calls a function for each element of a map (Linux 5.14)."""
    with _probe_object(walks=(_PROBE_RUN,)) as probe_object:
        probe_object.run(_PROBE_RUN)


def _attach_to_sockets() -> None:
    """Attaches to the tracepoints of each use of a socket (Linux 6.3)."""
    with _probe_object(*_PROBE_SOCKETS) as probe_object:
        probe_object.attach(tries=1)


def _load_loop() -> None:
    """Loads a program that has the kernel call a function again and again (Linux 5.17)."""
    with _probe_object(_PROBE_LOOP):
        pass


def _attach_to_many() -> None:
    """Attaches to functions of a directory (Linux 6.6), which a kernel that has a link for many
    refuses for what it is."""
    probe_object = BpfObject(
        _PROBE_OBJECT,
        programs=(),
        walks=(_PROBE_UPROBE,),
        many_places=True,
        without_maps=_PROBE_STORAGE[1:],
    )
    with probe_object:
        try:
            attach_many(probe_object.program_fd(_PROBE_UPROBE), "/", {0: 0}).detach()
        except AttachError as error:
            if error.errno != errno.EBADF:
                raise


def _sample_with(event: Callable[..., CpuEvent], period: int) -> Callable[[], None]:
    """Attaches to an EVENT of one CPU with a PERIOD or frequency (Linux 4.9)."""

    def attempt() -> None:
        with _probe_object(walks=(_PROBE_SAMPLE,)) as probe_object:
            try:
                program = probe_object.program_fd(_PROBE_SAMPLE)
                event(online_cpus()[0], period, program_fd=program).close()
            except OSError as error:
                raise BpfError("opening a perf event", error.errno or errno.EINVAL) from error

    return attempt


def _make_map(number: int) -> Callable[[], None]:
    def attempt() -> None:
        verdict = call("libbpf_probe_bpf_map_type", number, None)
        if verdict != 1:
            raise BpfError("making a map", -verdict if verdict < 0 else errno.EOPNOTSUPP)

    return attempt


def _use_task_storage() -> None:
    """Loads a program that keeps something for each task (Linux 5.13)."""
    with _probe_object(_PROBE_STORAGE[0], storage=True):
        pass


def _enable_stats() -> None:
    os.close(enable_run_time_stats())


def _read_a_batch() -> None:
    """Reads the map of a loaded object in a batch (Linux 5.6)."""
    with _probe_object() as probe_object:
        points = probe_object.map("coral_p_map")
        points.read()
        if not points.batches:
            raise BpfError("reading a map in batches", errno.EOPNOTSUPP)


def _install_a_map() -> None:
    """Loads a program with a loop over the maps in a map (Linux 5.3), and installs one whose size
    is not that of the prototype (Linux 5.10)."""
    with (
        _probe_object(_PROBE_SESSIONS) as probe_object,
        probe_object.make_inner("coral_p_maps", entries=16) as inner,
    ):
        probe_object.install("coral_p_maps", 0, inner.fd)


def _pidfd() -> Feature:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return _refused("pidfd", error.errno or errno.ENOSYS)
    return Feature("pidfd", True)


def _sock_diag() -> Feature:
    try:
        sock_diag.try_it()
    except OSError as error:
        return _refused("sock_diag", error.errno or errno.ETIMEDOUT)
    return Feature("sock_diag", True)


def _bcc() -> Feature:
    try:
        reason = bcc.obstacle()
    except OSError as error:  # an ordinary user may not read there
        reason = f"looking for bcc and its headers: {error}"
    return Feature("bcc", not reason, reason)


def _others_listeners(capabilities: frozenset[str]) -> Feature:
    """Whether the process behind another user's listening socket can be found."""
    lacking = caps.lacking(caps.LISTENERS, capabilities)
    return Feature("others_listeners", not lacking, caps.missing(lacking) if lacking else "")


def _btf() -> Feature:
    if not VMLINUX_BTF.exists():
        return _refused("btf", errno.ENOENT)
    btf = call_pointer("btf__load_vmlinux_btf")
    if not btf:
        return Feature("btf", False, f"{VMLINUX_BTF} is damaged: libbpf cannot read it")
    call_pointer("btf__free", btf)
    return Feature("btf", True)


def kernel_names(names: Iterable[str]) -> frozenset[str]:
    """The names among NAMES that the kernel's BTF has for a type, a function or a member; none if
    the kernel has no BTF. The BTF calls a tracepoint NAME `btf_trace_NAME`."""
    try:
        described = VMLINUX_BTF.read_bytes()
    except OSError:
        return frozenset()
    return frozenset(name for name in names if f"\0{name}\0".encode() in described)


def _elements_on_demand() -> Feature:
    """Whether programs may allocate hash elements on demand, from any context (Linux 6.1).

    The allocator that makes this safe has a type of its own, which is in the kernel's BTF.
    """
    name = "elements_on_demand"
    try:
        present = b"\0bpf_mem_alloc\0" in VMLINUX_BTF.read_bytes()
    except OSError as error:
        return Feature(name, False, f"unknown without BTF: {error.strerror}")
    return Feature(name, True) if present else _refused(name, errno.EOPNOTSUPP)
