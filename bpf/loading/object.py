"""A compiled eBPF object: chosen programs, set options, loaded, attached, closed.

    with BpfObject("syscall_stats", programs=("coral_enter", "coral_exit")) as o:
        o.attach()
        keys, values = o.map("stats").read()

When the block ends, nothing of it is left in the kernel, whatever happened inside.
"""

from __future__ import annotations

import errno
import select
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from ctypes import byref, c_uint32
from pathlib import Path
from typing import Any, Final, Protocol, Self

from coral.bpf.attaching.link import Link, Links
from coral.bpf.buffers.element_reader import ElementReader, run_program
from coral.bpf.buffers.maps import HashMap, MapMemory
from coral.bpf.buffers.perf_buffer import PerfReader
from coral.bpf.buffers.program_stats import ProgramStats, read_program_stats
from coral.bpf.buffers.records import MOST_BYTES, RecordKind, Records
from coral.bpf.buffers.ring import RingReader
from coral.bpf.buffers.walk import Walk
from coral.bpf.closing import close_all
from coral.bpf.libbpf import AttachError, BpfError, LoadError, call
from coral.bpf.loading.btf import Btf
from coral.bpf.loading.by_bcc import LoadedByBcc
from coral.bpf.loading.by_libbpf import LoadedByLibbpf
from coral.bpf.loading.description import Description, Loaded, Loader
from coral.bpf.loading.map_definition import InnerMap
from coral.bpf.loading.object_file import ObjectFile, object_path

# The most instructions that the verifier processes: BPF_COMPLEXITY_LIMIT_INSNS.
VERIFIER_LIMIT: Final = 1_000_000
_ATTACH_BACKOFF_S: Final = 0.02
_STATS_RUN_TIME: Final = 0
# The loaders, by their names in the ladder.
LOADERS: Final[Mapping[str, Loader]] = {"core": LoadedByLibbpf, "bcc": LoadedByBcc}


class RecordReader(Protocol):
    """Reads a program's records: from a ring buffer, or from perf buffers."""

    def drain(self, most_bytes: int = MOST_BYTES) -> Records:
        """Complete records of at most about MOST_BYTES, and at least one, as copies; frees their
        space. The default is a few milliseconds of work for all that follows."""

    def rest(self) -> bool:
        """Lets the kernel wake the reader for the next record, if it does so at all; whether there
        is no record yet."""

    @property
    def pending_bytes(self) -> int:
        """Bytes that programs have written, or are writing, and that have not been drained."""

    @property
    def filling(self) -> bool:
        """Whether a drain should not wait any longer."""

    @property
    def capacity_bytes(self) -> int:
        """The size of the buffers."""

    @property
    def wakeup(self) -> select.epoll:
        """Readable once for each wake-up: when the buffer fills up and, with `wakes_at_rest`, for
        the first record after `rest`."""

    @property
    def wakes_at_rest(self) -> bool:
        """Whether the kernel wakes the reader for the first record after `rest`."""

    @property
    def lost(self) -> int:
        """Records that the kernel reports as refused so far, if it reports them."""

    @property
    def memory_bytes(self) -> int:
        """The memory of the buffers besides what the kernel charges for their map."""

    def close(self) -> None:
        """Frees the buffers. Safe to call twice."""


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
    `map_flags` change maps before they are made, or the prototype of the maps in a map of maps;
    `without_maps` are not made at all: no chosen program may use them. `shared` are maps of another
    object, by their descriptors, which are used instead of new ones of those names. With TYPED,
    programs of `raw_tp/` are loaded as those of `tp_btf/`: the verifier knows the types of their
    arguments. With MANY_PLACES, programs of `uprobe` are loaded for a link to many functions at
    once (Linux 6.6), and for nothing else. A name that the object does not have is a KeyError. Maps
    are read in batches where the kernel has them, unless BATCHES is off. LOADER is one of
    `LOADERS`. Nothing touches the kernel before `load`.
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
        shared: Mapping[str, int] | None = None,
        typed: bool = False,
        many_places: bool = False,
        batches: bool = True,
        loader: str = "core",
    ) -> None:
        self.path = name if isinstance(name, Path) else object_path(name)
        self._description = Description(
            programs=tuple(programs),
            walks=tuple(walks),
            options=dict(options or {}),
            map_entries=dict(map_entries or {}),
            map_flags=dict(map_flags or {}),
            without_maps=frozenset(without_maps),
            shared=dict(shared or {}),
            typed=typed,
            many_places=many_places,
        )
        self._batches = batches
        self._loader = LOADERS[loader]
        self._file: ObjectFile | None = None
        self._loaded: Loaded | None = None
        # Figures are read by another thread than the one that closes.
        self._lock = threading.Lock()
        self._links = Links()
        self._readers: dict[tuple[str, int], RecordReader] = {}  # by map of maps, and slot
        self._walks: list[Walk] = []
        self._map_memory_bytes = 0
        self._memories: dict[int, MapMemory] = {}

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
        self._loaded = self._loader(self._file or self._open(), self._description)

    def make_maps(self, names: Collection[str]) -> None:
        """Makes those of the maps NAMES that the object is to have, before `load`, so that others
        that share them can be loaded at the same time; only for the loader `core`. Their
        descriptors are open until `close`. Raises `LoadError`."""
        file = self._open()
        for name in names:
            if name not in self._description.without_maps:
                file.make_map(name)

    def _open(self) -> ObjectFile:
        try:
            self._file = ObjectFile(self.path)
            self._configure(self._file)
        except (TypeError, ValueError, OverflowError) as error:
            raise LoadError(
                f"{self.path.name} is damaged, or of another version of this agent: {error}"
            ) from error
        return self._file

    def _configure(self, file: ObjectFile) -> None:
        wanted = self._description
        for name in wanted.chosen:
            file.programs[name]  # raises a KeyError with its name
        for name in (*wanted.without_maps, *wanted.shared):
            file.maps[name]
        for name in {**wanted.map_entries, **wanted.map_flags}:
            file.change_map(name, wanted.map_entries.get(name), wanted.map_flags.get(name))
        for name, value in wanted.options.items():
            file.initial_value(name)[...] = value

    @property
    def btf(self) -> Btf:
        """The types of the object."""
        return self._opened.btf

    @property
    def _opened(self) -> ObjectFile:
        if self._file is None:
            raise RuntimeError(f"{self.path.name} is not open")
        return self._file

    @property
    def _in_kernel(self) -> Loaded:
        if self._loaded is None:
            raise RuntimeError(f"{self.path.name} is not loaded")
        return self._loaded

    def read_variable(self, name: str) -> Any:  # noqa: ANN401  its type is the C type's
        """The present value of a global variable of the loaded programs."""
        return self._in_kernel.read_variable(name)

    def write_variable(self, name: str, value: object) -> None:
        """Sets a global variable of the loaded programs, which see it at their next read."""
        self._in_kernel.write_variable(name, value)

    def write_elements(self, name: str, indices: Sequence[int], value: object) -> None:
        """Sets elements of a global array of the loaded programs, and no other bytes."""
        self._in_kernel.write_elements(name, indices, value)

    def attach(self, tries: int = 3) -> None:
        """Attaches all of `programs`, trying each up to TRIES times with growing pauses. Raises
        `AttachError`; programs attached earlier stay so until `close`."""
        for name in self._description.programs:
            self._links.keep(self._attached(name, tries))

    def attach_one(self, name: str, tries: int = 3) -> Link:
        """Attaches one of the loaded programs to the hook of its section; otherwise like
        `attach`."""
        return self._links.keep(self._attached(name, tries))

    def _attached(self, name: str, tries: int) -> Link:
        attempt = 1
        while True:
            try:
                return self._in_kernel.attach(name)
            except AttachError as error:
                if attempt >= tries:
                    hook = self._opened.hook_of(name)[1]
                    what = f"attaching {name} to {hook} ({tries} tries)"
                    raise AttachError(what, error.errno, error.log) from error
            time.sleep(_ATTACH_BACKOFF_S * 2**attempt)
            attempt += 1

    def attach_to(self, program: str, target: Callable[[int], Link]) -> Link:
        """Attaches one of the loaded programs to TARGET, a function that attaches the program of a
        descriptor. It is detached with the object, or earlier by itself. Raises `AttachError`."""
        return self._links.keep(target(self.program_fd(program)))

    def map_fd(self, name: str) -> int:
        """The descriptor of a map of the loaded object; negative if it was not created."""
        return self._in_kernel.map_fd(name)

    @property
    def map_names(self) -> Collection[str]:
        """The maps of the object, without the sections of global variables."""
        return [name for name in self._opened.definitions if "." not in name]

    def map_fds(self, names: Collection[str]) -> Mapping[str, int]:
        """The descriptors of those of the maps NAMES that are made, for another object to share."""
        made = self._opened.made
        fds = {name: self.map_fd(name) if self._loaded else made.get(name, -1) for name in names}
        return {name: fd for name, fd in fds.items() if fd >= 0}

    def program_fd(self, name: str) -> int:
        """The descriptor of a loaded program, for `attaching` and maps of programs."""
        return self._in_kernel.program_fd(name)

    @property
    def programs(self) -> Sequence[str]:
        """The programs that are attached, by name."""
        return self._description.programs

    @property
    def loaded_programs(self) -> Sequence[str]:
        """These, and those that user space runs."""
        return self._description.chosen

    def map(self, name: str) -> HashMap:
        """A map of the loaded object, with dtypes from its BTF. KeyError if there is none."""
        definition = self._opened.definitions[name]
        return HashMap(
            name,
            self.map_fd(name),
            definition.kind,
            self.btf.dtype(definition.key_type),
            self.btf.dtype(definition.value_type),
            batches=self._batches,
        )

    def make_inner(self, name: str, entries: int | None = None) -> InnerMap:
        """A new map for the map of maps NAME, with dtypes from the object's BTF, and with ENTRIES
        (of a ring buffer: bytes) unless it is to be as large as the prototype. The caller closes
        it. KeyError if there is no such map; raises `LoadError`."""
        inner = self._opened.definitions[name].inner
        if inner is None:
            raise KeyError(f"{name} is no map of maps")
        if entries is not None:
            inner = inner.changed(entries)
        return InnerMap(inner, self.btf.dtype, batches=self._batches)

    def install(self, name: str, slot: int, fd: int) -> None:
        """Puts a map into a slot of the map of maps NAME, for the programs to find. Waits until no
        program uses an earlier map of that slot (some milliseconds). Raises `BpfError`: EINVAL for
        a map that is not like the prototype."""
        self.write_fd(name, slot, fd)

    def uninstall(self, name: str, slot: int) -> None:
        """Empties a slot of the map of maps NAME, and waits until no program uses its map (some
        milliseconds). Safe to call twice. Raises `BpfError`."""
        error = -call("bpf_map_delete_elem", self.map_fd(name), byref(c_uint32(slot)))
        if error not in (0, errno.ENOENT):
            raise BpfError(f"emptying slot {slot} of map {name}", error)

    def write_fd(self, name: str, index: int, fd: int) -> None:
        """Puts a descriptor (of a cgroup, a map, a program) into an array map of descriptors."""
        key, value = c_uint32(index), c_uint32(fd)
        error = -call("bpf_map_update_elem", self.map_fd(name), byref(key), byref(value), 0)
        if error:
            raise BpfError(f"writing map {name}", error)

    def record_kinds(self, order_by: Mapping[str, str | None]) -> Sequence[RecordKind]:
        """The kinds of records whose structs ORDER_BY names, each with the field to sort it by: the
        number of `struct call` is RECORD_CALL of `enum record_kind`."""
        numbers = self.btf.enum("record_kind")
        if "process_change" in order_by:
            numbers = {**numbers, **self.btf.enum("process_record_kind")}
        return [
            RecordKind(name, numbers[f"RECORD_{name.upper()}"], self.btf.struct_dtype(name), field)
            for name, field in order_by.items()
        ]

    def ring(
        self, name: str, kinds: Sequence[RecordKind], *, ring_bytes: int, slot: int = 0
    ) -> RingReader:
        """The reader of a new ring buffer with records of KINDS, in a slot of the map of maps NAME;
        closed with the object. Raises `BpfError`."""
        with self.make_inner(name, ring_bytes) as ring:
            try:
                reader = RingReader(ring.fd, ring_bytes, kinds)
            except OSError as error:
                what = f"opening the ring buffer {name}"
                raise LoadError(what, error.errno or errno.EIO) from error
            self._install_reader(name, slot, ring.fd, reader)
        return reader

    def perf(
        self, name: str, kinds: Sequence[RecordKind], *, bytes_per_cpu: int, slot: int = 0
    ) -> PerfReader:
        """The reader of new perf buffers with records of KINDS; otherwise like `ring`."""
        with self.make_inner(name) as perf:
            try:
                reader = PerfReader(perf.fd, bytes_per_cpu, kinds)
            except BpfError as error:
                raise LoadError(error.what, error.errno, error.log) from error
            self._install_reader(name, slot, perf.fd, reader)
        return reader

    def _install_reader(self, name: str, slot: int, fd: int, reader: RecordReader) -> None:
        try:
            self.install(name, slot, fd)
        except BpfError:
            reader.close()
            raise
        self._readers[name, slot] = reader

    def walk(self, name: str, record: str, *, map_name: str | None = None) -> Walk:
        """The iterator of the program NAME, which writes `struct RECORD`s. It is closed with the
        object, and works after the programs were detached. Raises `BpfError`."""
        map_fd = None if map_name is None else self.map_fd(map_name)
        walk = Walk(self.program_fd(name), map_fd, self.btf.struct_dtype(record))
        self._walks.append(walk)
        return walk

    def element_reader(
        self, name: str, record: str, *, keys: HashMap, records: str
    ) -> ElementReader:
        """The reader of the elements of the map KEYS through the program NAME, which makes `struct
        RECORD`s of them in the array map RECORDS. The caller closes it. Raises `BpfError`."""
        return ElementReader(
            self.program_fd(name),
            keys,
            self.map_fd(records),
            self._opened.definitions[records].entries,
            self.btf.struct_dtype(record),
        )

    def run(self, name: str) -> None:
        """Runs the `syscall` program NAME once. Raises `BpfError`."""
        run_program(self.program_fd(name))

    @property
    def attached(self) -> bool:
        """Whether any program is attached."""
        return bool(self._links)

    @property
    def map_memory_bytes(self) -> int:
        """What the kernel charges for all maps that the object made, apart from those of
        `make_inner`, which have a figure of their own; the last known figure if there is no
        descriptor left to read it."""
        with self._lock, suppress(OSError):
            if self._loaded:
                charged = sum(self._memory_of(fd) for fd in self._loaded.made_maps())
                readers = sum(reader.memory_bytes for reader in self._readers.values())
                self._map_memory_bytes = charged + readers
        return self._map_memory_bytes

    def _memory_of(self, fd: int) -> int:
        return self._memories.setdefault(fd, MapMemory()).read(fd)

    def program_stats(self) -> dict[str, ProgramStats]:
        """The kernel's figures of each loaded program; empty once closed. Raises `BpfError`."""
        with self._lock:
            names = self._description.chosen if self._loaded else ()
            return {name: read_program_stats(self.program_fd(name)) for name in names}

    def detach(self) -> None:
        """Detaches every program; maps stay readable until `close`."""
        self._links.detach()

    def close(self) -> None:
        """Detaches the programs and frees everything, whatever fails; see `close_all`. Safe to call
        twice, or before `load`."""
        readers: list[Walk | RecordReader] = [*self._walks, *self._readers.values()]
        self._readers, self._walks = {}, []
        close_all([self.detach, *(reader.close for reader in readers), self._free])

    def _free(self) -> None:
        with self._lock:
            owner, self._loaded, self._file = self._loaded or self._file, None, None
            if owner:
                owner.close()
