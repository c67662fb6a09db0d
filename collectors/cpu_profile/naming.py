"""What the sessions of a hub know of code: the memory of processes, their files, and the names."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfObject
from coral.collectors.columns import Strings
from coral.collectors.cpu_profile.frames import FRAME, Places
from coral.collectors.cpu_profile.processes import Processes
from coral.collectors.cpu_profile.user_stacks import machine
from coral.collectors.symbols.files import MappedFiles
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.unwinding.tables import Tables
from coral.collectors.unwinding.unwinder import Unwinder
from coral.mesh.v1 import ebpf_pb2 as pb

_CACHE: Final = "CACHE_DIRECTORY"  # as systemd names it


class Code:
    """One for all sessions of a hub. Hold `lock` while it is used."""

    def __init__(self, bpf_object: BpfObject) -> None:  # noqa: ARG002  as `Slot.common` makes it
        self.lock = threading.Lock()
        self._files = MappedFiles()
        self.processes = Processes(self._files)
        here, cache = machine(), os.environ.get(_CACHE)
        tables = Tables(Path(cache) / "unwind" if cache else None)
        self.unwinder = Unwinder(here, tables) if here else None
        self._strings = Strings()

    @property
    def strings(self) -> Sequence[str]:
        """What numbers of strings in frames stand for."""
        return self._strings.table

    def of_process(self, maps: ProcessMaps, places: Places) -> NDArray[Any]:
        """See `Namer`."""
        ids = maps.locate(places.addresses, places.times_ns)
        frames = np.zeros(len(ids), FRAME)
        frames["flags"] = pb.CPU_FRAME_FLAG_UNNAMED
        for at, (address, number) in enumerate(
            zip(places.addresses.tolist(), ids.tolist(), strict=True)
        ):
            module = "[anon]"
            if number >= 0:
                file = maps.files[maps.file_indexes[number]]
                module = file.module
            frames[at]["function"] = self._strings.index(f"{module}+0x{address:x}")
            frames[at]["module"] = self._strings.index(module)
            frames[at]["address"] = address
        return frames

    def of_kernel(self, places: Places) -> NDArray[Any]:
        """See `Namer`."""
        frames = np.zeros(len(places.addresses), FRAME)
        frames["flags"] = pb.CPU_FRAME_FLAG_UNNAMED | pb.CPU_FRAME_FLAG_KERNEL
        frames["module"] = self._strings.index("[kernel]")
        frames["address"] = places.addresses
        for at, address in enumerate(places.addresses.tolist()):
            frames[at]["function"] = self._strings.index(f"[kernel]+0x{address:x}")
        return frames

    def close(self) -> None:
        """Closes the files."""
        self._files.close()
