"""A compiled eBPF object: chosen programs, set options, loaded, attached, closed.

    with BpfObject("syscall_stats", programs=("coral_enter_btf", "coral_exit_btf")) as o:
        o.attach()
        keys, values = o.map("stats").read()

When the block ends, nothing of it is left in the kernel, whatever happened inside.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import select
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from ctypes import byref, c_char_p, c_size_t, c_uint32
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.element_reader import ElementReader, run_program
from coral.bpf.buffers.maps import HashMap, fdinfo
from coral.bpf.buffers.perf_buffer import PerfReader
from coral.bpf.buffers.ring import RingReader
from coral.bpf.buffers.walk import Walk
from coral.bpf.libbpf import (
    AttachError,
    BpfError,
    LoadError,
    call,
    call_pointer,
    call_string,
    capture_log,
    last_errno,
)
from coral.bpf.loading import seal
from coral.bpf.loading.btf import Btf, Variable

# The most instructions that the verifier processes: BPF_COMPLEXITY_LIMIT_INSNS.
VERIFIER_LIMIT: Final = 1_000_000
VERIFIER_LOG_BYTES: Final = 1 << 20
_ATTACH_BACKOFF_S: Final = 0.02
_STATS_RUN_TIME: Final = 0
# libbpf retries a map that the kernel refuses without its types; if the map must have them, the
# second errno is meaningless.
_RETRIED: Final = re.compile(
    r"\((\w+)\):[^\n]*\(-(\d+)\)\. Retrying without BTF\.\n[^\n]*map '\1': failed to create"
)
_ENV_OBJECT_DIR: Final = "CORAL_BPF_OBJECTS"


class _OpenOptions(ctypes.Structure):
    """struct bpf_object_open_opts of libbpf, with the members used here."""

    _fields_ = (("size", c_size_t), ("object_name", c_char_p))


class RecordReader(Protocol):
    """Reads a program's records: from a ring buffer, or from perf buffers."""

    def drain(self) -> NDArray[Any]:
        """All complete records, as a copy of shape (n,); frees their space."""

    @property
    def wakeup(self) -> select.epoll:
        """Readable once for each wake-up that a program or the kernel asked for."""

    @property
    def lost(self) -> int:
        """Records that the kernel reports as refused so far, if it reports them."""

    @property
    def memory_bytes(self) -> int:
        """The memory of the buffers besides what the kernel charges for their map."""

    def close(self) -> None:
        """Frees the buffers. Safe to call twice."""


class ProgramStats(NamedTuple):
    """The kernel's figures of one loaded program; times only count while statistics are on."""

    run_time_ns: int
    run_count: int
    recursion_misses: int
    verified_instructions: int


PROGRAMS: Final = Path(__file__).resolve().parent.parent / "programs"


def object_path(name: str) -> Path:
    """The path of the object NAME: beside its source, or in the directory CORAL_BPF_OBJECTS."""
    directory = os.environ.get(_ENV_OBJECT_DIR)
    return (Path(directory) if directory else PROGRAMS / name) / f"{name}.bpf.o"


def not_built(path: Path) -> str:
    """The message for a missing object."""
    if _ENV_OBJECT_DIR in os.environ:
        return f"{path} is missing: let {_ENV_OBJECT_DIR} name a directory of built programs"
    return f"{path.name} is not built: run `make setup`"


def enable_run_time_stats() -> int:
    """Turns on the kernel's run-time statistics, for all programs of the machine, until the
    returned descriptor is closed. Raises `BpfError`."""
    fd = call("bpf_enable_stats", _STATS_RUN_TIME)
    if fd < 0:
        raise BpfError("turning run-time statistics on", -fd)
    return fd


class BpfObject:
    """One object, and the only owner of everything that it has in the kernel.

    `programs` are loaded and attached; `walks` are loaded, for `walk`, `element_reader` or `run`;
    others are not. `options` set the C program's `const volatile` globals; `map_entries` and
    `map_flags` change maps before they are made; `without_maps` are not made at all: no chosen
    program may use them. A name that the object does not have is a KeyError. Maps are read in
    batches where the kernel has them, unless BATCHES is off. Nothing touches the kernel before
    `load`.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        programs: Sequence[str],
        walks: Sequence[str] = (),
        options: Mapping[str, object] | None = None,
        map_entries: Mapping[str, int] | None = None,
        map_flags: Mapping[str, int] | None = None,
        without_maps: Collection[str] = (),
        batches: bool = True,
    ) -> None:
        self.path = name if isinstance(name, Path) else object_path(name)
        self._hooked = tuple(programs)
        self._chosen = (*programs, *walks)
        self._options = dict(options or {})
        self._map_entries = dict(map_entries or {})
        self._map_flags = dict(map_flags or {})
        self._without_maps = frozenset(without_maps)
        self._batches = batches
        self._object = 0
        # Figures are read by another thread than the one that closes.
        self._lock = threading.Lock()
        self._programs: dict[str, int] = {}
        self._maps: dict[str, int] = {}
        self._links: list[Callable[[], object]] = []
        self._readers: list[RecordReader] = []
        self._walks: list[Walk | ElementReader] = []
        self._sections: dict[str, mmap.mmap] = {}
        self._map_memory_bytes = 0

    def __enter__(self) -> Self:
        try:
            self.load()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self) -> None:
        """Opens the object, sets its options, loads its programs and maps. Raises `LoadError`."""
        what = f"opening {self.path.name}"
        try:
            elf = seal.opened(self.path.read_bytes())
        except OSError as error:
            why = "" if self.path.exists() else not_built(self.path)
            raise LoadError(what, error.errno or errno.EIO, why) from error
        except seal.DamagedError as error:
            raise LoadError(f"{what}: {error}; install the agent anew") from error
        # libbpf names the maps of sections after it, as it does with the name of a file.
        name = self.path.name.partition(".")[0].encode()
        options = _OpenOptions(ctypes.sizeof(_OpenOptions), name)
        with capture_log() as said:
            self._object = call_pointer(
                "bpf_object__open_mem", elf, c_size_t(len(elf)), byref(options)
            )
            if not self._object:
                raise LoadError(what, last_errno(), said())
            try:
                self.btf = self._read_btf()
                self._programs = dict(self._children("program"))
                self._maps = dict(self._children("map"))
                # libbpf forgets them if the kernel only accepts the map without its types.
                self._map_types = {
                    name: (
                        call("bpf_map__btf_key_type_id", bpf_map),
                        call("bpf_map__btf_value_type_id", bpf_map),
                    )
                    for name, bpf_map in self._maps.items()
                }
                self._configure()
            except (TypeError, ValueError, OverflowError) as error:
                raise LoadError(
                    f"{self.path.name} is damaged, or of another version of this agent: {error}"
                ) from error
        self._load()

    def _load(self) -> None:
        """Creates the maps and loads the chosen programs."""
        logs = []
        for name, program in self._programs.items():
            call("bpf_program__set_autoload", program, name in self._chosen)
            if name in self._chosen:
                # libbpf first loads without a log, and requests one only if that fails.
                logs.append(ctypes.create_string_buffer(VERIFIER_LOG_BYTES))
                call("bpf_program__set_log_buf", program, logs[-1], c_size_t(VERIFIER_LOG_BYTES))
        for name in self._without_maps:
            call("bpf_map__set_autocreate", self._maps[name], False)
        with capture_log() as said:
            error = -call("bpf_object__load", self._object)
        if error:
            verifier_log = "".join(log.value.decode(errors="replace") for log in logs)
            if retried := _RETRIED.search(said()):
                error = int(retried[2])
            raise LoadError(f"loading {self.path.name}", error, verifier_log or said())

    def _read_btf(self) -> Btf:
        size = c_uint32()
        btf = call_pointer("bpf_object__btf", self._object)
        raw = call_pointer("btf__raw_data", btf, byref(size)) if btf else 0
        if not raw:
            raise LoadError(f"{self.path.name} has no BTF: compile it with -g")
        return Btf(ctypes.string_at(raw, size.value))

    def _children(self, kind: str) -> Iterator[tuple[str, int]]:
        child = 0
        while child := call_pointer(f"bpf_object__next_{kind}", self._object, child or None):
            yield call_string(f"bpf_{kind}__name", child), child

    def _configure(self) -> None:
        for name in self._chosen:
            self._programs[name]  # raises a KeyError with its name
        for name, entries in self._map_entries.items():
            call("bpf_map__set_max_entries", self._maps[name], entries)
        for name, flags in self._map_flags.items():
            call("bpf_map__set_map_flags", self._maps[name], flags)
        for name, value in self._options.items():
            self._initial_value(name)[...] = value

    def _section_map(self, section: str) -> int:
        return next((m for name, m in self._maps.items() if name.endswith(section)), 0)

    def _described(self, name: str) -> tuple[Variable, np.dtype[np.generic]]:
        variable = self.btf.variables[name]
        return variable, self.btf.dtype(variable.type_id)

    def _initial_value(self, name: str) -> NDArray[Any]:
        """The initial value of the global NAME, in its section."""
        variable, dtype = self._described(name)
        size = c_size_t()
        address = call_pointer(
            "bpf_map__initial_value", self._section_map(variable.section), byref(size)
        )
        if not address:
            raise ValueError(f"it has no section {variable.section}")
        memory = memoryview((ctypes.c_char * size.value).from_address(address)).cast("B")
        return np.ndarray((), dtype, memory, variable.offset)

    def _variable(self, name: str) -> NDArray[Any]:
        variable, dtype = self._described(name)
        if variable.section not in self._sections:
            bpf_map = self._section_map(variable.section)
            try:
                self._sections[variable.section] = mmap.mmap(
                    call("bpf_map__fd", bpf_map), call("bpf_map__value_size", bpf_map)
                )
            except OSError as error:
                what = f"mapping {variable.section} of {self.path.name}"
                raise LoadError(what, error.errno or errno.EIO) from error
        return np.ndarray((), dtype, self._sections[variable.section], variable.offset)

    def read_variable(self, name: str) -> Any:  # noqa: ANN401  its type is the C type's
        """The present value of a global variable of the loaded programs."""
        return self._variable(name)[()]

    def write_variable(self, name: str, value: object) -> None:
        """Sets a global variable of the loaded programs, which see it at their next read."""
        self._variable(name)[...] = value

    def write_elements(self, name: str, indices: Sequence[int], value: object) -> None:
        """Sets elements of a global array of the loaded programs, and no other bytes."""
        self._variable(name)[list(indices)] = value

    def attach(self, tries: int = 3) -> None:
        """Attaches all of `programs`, trying each up to TRIES times with growing pauses. Raises
        `AttachError`; programs attached earlier stay so until `close`."""
        for name in self._hooked:
            self._attach(name, tries)

    def _attach(self, name: str, tries: int) -> None:
        for attempt in range(tries):
            if attempt:
                time.sleep(_ATTACH_BACKOFF_S * 2**attempt)
            with capture_log() as said:
                error = self._attach_once(name)
                if not error:
                    return
                log = said()
        raise AttachError(f"attaching {name} ({tries} tries)", error, log)

    def _attach_once(self, name: str) -> int:
        """0, or the errno."""
        link = call_pointer("bpf_program__attach", self._programs[name])
        if not link:
            return last_errno()
        self._links.append(partial(call, "bpf_link__destroy", link))
        return 0

    def map_fd(self, name: str) -> int:
        """The descriptor of a map of the loaded object; negative if it was not created."""
        return call("bpf_map__fd", self._maps[name])

    def program_fd(self, name: str) -> int:
        """The descriptor of a loaded program, for `attaching` and maps of programs."""
        return self._program_fd(name)

    def _program_fd(self, name: str) -> int:
        return call("bpf_program__fd", self._programs[name])

    def map(self, name: str) -> HashMap:
        """A map of the loaded object, with dtypes from its BTF. KeyError if there is none."""
        key_type, value_type = self._map_types[name]
        return HashMap(
            name,
            self.map_fd(name),
            call("bpf_map__type", self._maps[name]),
            self.btf.dtype(key_type),
            self.btf.dtype(value_type),
            batches=self._batches,
        )

    def write_fd(self, name: str, index: int, fd: int) -> None:
        """Puts a descriptor (of a cgroup, of a program) into an array map of descriptors."""
        key, value = c_uint32(index), c_uint32(fd)
        error = -call("bpf_map_update_elem", self.map_fd(name), byref(key), byref(value), 0)
        if error:
            raise BpfError(f"writing map {name}", error)

    def ring(self, name: str, record: str) -> RingReader:
        """The reader of a ring buffer whose records are `struct RECORD`; closed with the object."""
        try:
            reader = RingReader(
                self.map_fd(name),
                call("bpf_map__max_entries", self._maps[name]),
                self.btf.struct_dtype(record),
            )
        except OSError as error:
            raise LoadError(f"opening the ring buffer {name}", error.errno or errno.EIO) from error
        self._readers.append(reader)
        return reader

    def perf(
        self, name: str, record: str, *, bytes_per_cpu: int, wakeup_bytes: int, order_by: str
    ) -> PerfReader:
        """The reader of the perf buffers whose records are `struct RECORD`; closed with the object.
        Drained records are sorted by the field ORDER_BY, a time."""
        try:
            reader = PerfReader(
                self.map_fd(name),
                bytes_per_cpu,
                self.btf.struct_dtype(record),
                wakeup_bytes,
                order_by,
            )
        except BpfError as error:
            raise LoadError(error.what, error.errno, error.log) from error
        self._readers.append(reader)
        return reader

    def walk(self, name: str, record: str, *, map_name: str | None = None) -> Walk:
        """The iterator of the program NAME, which writes `struct RECORD`s. It is closed with the
        object, and works after the programs were detached. Raises `BpfError`."""
        map_fd = None if map_name is None else self.map_fd(map_name)
        walk = Walk(self._programs[name], map_fd, self.btf.struct_dtype(record))
        self._walks.append(walk)
        return walk

    def element_reader(self, name: str, record: str, *, keys: str, records: str) -> ElementReader:
        """The reader of the elements of the map KEYS through the program NAME, which makes `struct
        RECORD`s of them in the array map RECORDS; otherwise like `walk`."""
        reader = ElementReader(
            self._program_fd(name),
            self.map(keys),
            self.map_fd(records),
            call("bpf_map__max_entries", self._maps[records]),
            self.btf.struct_dtype(record),
        )
        self._walks.append(reader)
        return reader

    def run(self, name: str) -> None:
        """Runs the `syscall` program NAME once. Raises `BpfError`."""
        run_program(self._program_fd(name))

    @property
    def attached(self) -> bool:
        """Whether any program is attached."""
        return bool(self._links)

    @property
    def map_memory_bytes(self) -> int:
        """What the kernel charges for all maps of the object; the last known figure if there is no
        descriptor left to read it."""
        with self._lock, suppress(OSError):
            charged = sum(fdinfo(fd).get("memlock", 0) for fd in self._map_fds() if fd >= 0)
            self._map_memory_bytes = charged + sum(r.memory_bytes for r in self._readers)
        return self._map_memory_bytes

    def _map_fds(self) -> Iterable[int]:
        return [self.map_fd(name) for name in self._maps]

    def program_stats(self) -> dict[str, ProgramStats]:
        """The kernel's figures of each loaded program; empty once closed. A program is left out if
        there is no descriptor left to read its figures."""
        found = {}
        with self._lock:
            for name in self._chosen if self._programs else ():
                try:
                    info = fdinfo(self._program_fd(name))
                except OSError:
                    continue
                found[name] = ProgramStats(
                    info.get("run_time_ns", 0),
                    info.get("run_cnt", 0),
                    info.get("recursion_misses", 0),
                    info.get("verified_insns", 0),
                )
        return found

    def detach(self) -> None:
        """Detaches every program; maps stay readable until `close`."""
        while self._links:
            self._links.pop()()

    def close(self) -> None:
        """Detaches the programs and frees everything. Safe to call twice, or before `load`."""
        self.detach()
        while self._walks:
            self._walks.pop().close()
        while self._readers:
            self._readers.pop().close()
        while self._sections:
            self._sections.popitem()[1].close()
        with self._lock:
            self._programs, self._maps = {}, {}
            if self._object:
                call_pointer("bpf_object__close", self._object)
                self._object = 0
