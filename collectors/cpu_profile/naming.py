"""What the sessions of a hub know of code: the memory of processes, their unwind tables and the
names of their functions."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfObject
from coral.collectors.cpu_profile.frames import FRAME, Places
from coral.collectors.cpu_profile.processes import Process, Processes
from coral.collectors.cpu_profile.user_stacks import machine
from coral.collectors.symbols.names import Named, Symbolizer
from coral.collectors.symbols.strings import Strings
from coral.collectors.unwinding.tables import Tables
from coral.collectors.unwinding.unwinder import Unwinder
from coral.mesh.v1 import ebpf_pb2 as pb

_CACHE: Final = "CACHE_DIRECTORY"  # as systemd names it
_NO_FILE: Final = "[anonymous]"


class Code:
    """One for all sessions of a hub. Hold `lock` while it is used."""

    def __init__(self, bpf_object: BpfObject) -> None:  # noqa: ARG002  as `Slot.common` makes it
        self.lock = threading.Lock()
        self._symbolizer = Symbolizer()
        self.processes = Processes(self._symbolizer)
        here, cache = machine(), os.environ.get(_CACHE)
        tables = Tables(Path(cache) / "unwind" if cache else None)
        self.unwinder = Unwinder(here, tables) if here else None

    @property
    def strings(self) -> Strings:
        """What numbers of strings in frames stand for, until `trim`."""
        return self._symbolizer.strings

    def trim(self) -> None:
        """Drops names, if there are too many: between two batches."""
        self._symbolizer.trim()

    def of_process(self, process: Process, places: Places) -> NDArray[Any]:
        """See `Namer`."""
        named = self._symbolizer.names(
            process.tgid, places.addresses, places.is_return, places.times_ns, process.born
        )
        frames = _frames(named)
        of_runtime = ~named.is_unnamed & (named.modules == self.strings.number(_NO_FILE))
        frames["flags"][of_runtime] |= pb.CPU_FRAME_FLAG_JIT
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
