"""What is known of code: the memory of processes, their unwind tables, the names of functions."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.libbpf import release_memory
from coral.collectors.cpu_profile.frames import FRAME, Places
from coral.collectors.cpu_profile.processes import Process, Processes
from coral.collectors.cpu_profile.user_stacks import machine
from coral.collectors.symbols.named import Named
from coral.collectors.symbols.names import Symbolizer
from coral.collectors.symbols.strings import Strings
from coral.collectors.unwinding.tables import Tables
from coral.collectors.unwinding.unwinder import Unwinder
from coral.mesh.v1 import ebpf_pb2 as pb

_CACHE: Final = "CACHE_DIRECTORY"  # as systemd names it
_LOOK_EVERY_S: Final = 0.05
_MUCH_BYTES: Final = 1 << 20
CODES: Final = set["Code"]()
"""Those at work, for the metrics."""


class Code:
    """The memory of processes, their unwind tables and the names in them. Not safe to use from two
    threads at once, but for `prepare`. Calls MEET now and then while it names: new processes may be
    gone before a batch is done."""

    def __init__(self, meet: Callable[[], object] = lambda: None) -> None:
        self._meet = meet
        self._met_s = 0.0
        self._preparing = threading.Lock()
        self._symbolizer = Symbolizer()
        self.processes = Processes(self._symbolizer)
        here, cache = machine(), os.environ.get(_CACHE)
        tables = Tables(Path(cache) / "unwind" if cache else None)
        self.unwinder = Unwinder(here, tables) if here else None
        self.memory_bytes: Mapping[str, int] = {}  # by what it is for
        CODES.add(self)

    @property
    def strings(self) -> Strings:
        """What numbers of strings in frames stand for, until `trim`."""
        return self._symbolizer.strings

    def look(self, *, now: bool = False) -> None:
        """Looks at the processes that are new, NOW or if that was a while ago."""
        if now or time.monotonic() > self._met_s + _LOOK_EVERY_S:
            self._meet()
            self._met_s = time.monotonic()

    def prepare(self) -> None:
        """Before names are asked for: reads the symbols of the kernel, which takes longest of all.
        Safe to call while another thread uses the rest."""
        with self._preparing:
            kernel = self._symbolizer.kernel
            before = kernel.nbytes
            kernel.prepare()
            if kernel.nbytes > before + _MUCH_BYTES:
                release_memory()

    def read_told(self, processes: Iterable[Process]) -> None:
        """Reads what the runtimes of PROCESSES have told of their functions: before a batch is
        unwound and named, which takes a while."""
        for process in processes:
            self._symbolizer.read_told(process.tgid, process.born)

    def trim(self) -> None:
        """Drops names, if there are too many: between two batches."""
        self._symbolizer.trim()

    def note_memory(self) -> None:
        """Brings `memory_bytes` up to date. Once that has grown, gives back what was used to make
        it, which is several times as much."""
        before = sum(self.memory_bytes.values())
        stats = self._symbolizer.stats
        self.memory_bytes = {
            "symbols": stats.tables.memory_bytes,
            "kernel_symbols": stats.kernel_bytes,
            "perf_maps": stats.perf_map_bytes,
            "names": stats.string_bytes,
            "unwind_tables": self.unwinder.nbytes if self.unwinder else 0,
        }
        if sum(self.memory_bytes.values()) > before + _MUCH_BYTES:
            release_memory()

    def close(self) -> None:
        """Closes the files of processes. Safe to call twice."""
        CODES.discard(self)
        self._symbolizer.close()

    def of_process(self, process: Process, places: Places) -> NDArray[Any]:
        """See `Namer`."""
        self.look()
        named = self._symbolizer.names(
            process.tgid, places.addresses, places.is_return, places.times_ns, process.born
        )
        frames = _frames(named)
        frames["flags"][named.is_told] |= pb.CPU_FRAME_FLAG_JIT
        return frames

    def of_kernel(self, places: Places) -> NDArray[Any]:
        """See `Namer`."""
        frames = _frames(self._symbolizer.names(0, places.addresses, places.is_return))
        frames["flags"] |= pb.CPU_FRAME_FLAG_KERNEL
        return frames


def _frames(named: Named) -> NDArray[Any]:
    frames = np.zeros(len(named.functions), FRAME)
    frames["function"], frames["module"] = named.functions, named.modules
    frames["build_id"], frames["address"] = named.build_ids, named.addresses
    frames["flags"][named.is_unnamed] = pb.CPU_FRAME_FLAG_UNNAMED
    return frames
