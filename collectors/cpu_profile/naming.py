"""What the sessions of a hub know of code: the memory of processes, their files, and the names."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfObject
from coral.collectors.columns import Strings
from coral.collectors.cpu_profile.frames import FRAME, Places
from coral.collectors.symbols.files import MappedFiles
from coral.collectors.symbols.maps import ProcessMaps
from coral.mesh.v1 import ebpf_pb2 as pb

_MOST_PROCESSES: Final = 1024


class Code:
    """One for all sessions of a hub. Hold `lock` while it is used."""

    def __init__(self, bpf_object: BpfObject) -> None:  # noqa: ARG002  as `Slot.common` makes it
        self.lock = threading.Lock()
        self._files = MappedFiles()
        self._processes: OrderedDict[tuple[int, int], tuple[int, ProcessMaps]] = OrderedDict()
        self._strings = Strings()

    @property
    def strings(self) -> Sequence[str]:
        """What numbers of strings in frames stand for."""
        return self._strings.table

    def maps_of(self, process: Any) -> ProcessMaps:  # noqa: ANN401
        """The memory of a process, one of its struct cpu_sample."""
        key = int(process["tgid"]), int(process["born"])
        execs = int(process["execs"])
        if found := self._processes.get(key):
            self._processes.move_to_end(key)
            before, maps = found
            if before != execs:
                maps.executed(int(process["time_ns"]))
                self._processes[key] = execs, maps
            return maps
        maps = ProcessMaps(key[0], self._files)
        if maps.has_ended:  # it has the memory of its parent, unless it has executed a program
            for (tgid, _), (others, theirs) in reversed(self._processes.items()):
                if tgid == process["parent"] and others == execs:
                    maps = theirs
                    break
        self._processes[key] = execs, maps
        while len(self._processes) > _MOST_PROCESSES:
            self._processes.popitem(last=False)
        return maps

    def of_process(self, process: Any, places: Places) -> NDArray[Any]:  # noqa: ANN401
        """See `Namer`."""
        maps = self.maps_of(process)
        ids = maps.locate(places.addresses, places.times_ns)
        frames = np.zeros(len(ids), FRAME)
        frames["flags"] = pb.CPU_FRAME_FLAG_UNNAMED
        for at, (address, number) in enumerate(zip(places.addresses.tolist(), ids.tolist(), strict=True)):
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
