"""The memory of the processes that were sampled: of each program that a process was, one after the
other, and of processes that have ended."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from coral.collectors.symbols.files import MappedFiles
from coral.collectors.symbols.maps import ProcessMaps

_MOST_PROCESSES: Final = 1024
_NO_PROCESS: Final = 0  # has no directory in /proc: a memory without mappings

_Key = tuple[int, int, int]  # tgid, born, execs


class Processes:
    """The memory by struct cpu_sample. A process is known from its first samples on: what it maps
    is read when these come, and if it has ended by then, it is taken to have what its parent has,
    unless it has executed a program. Bounded: the memory of processes that were not sampled for
    longest is forgotten."""

    def __init__(self, files: MappedFiles) -> None:
        self._files = files
        self._nothing = ProcessMaps(_NO_PROCESS, files)
        self._known: OrderedDict[_Key, ProcessMaps] = OrderedDict()
        self._newest: dict[tuple[int, int], int] = {}  # execs, by tgid and born

    def __len__(self) -> int:
        """The number of processes."""
        return len(self._newest)

    def maps_of(self, sample: Any, *, newest: bool) -> ProcessMaps:  # noqa: ANN401
        """The memory of the process of SAMPLE, which is its first sample as that program; NEWEST
        unless there are samples of a later program of the process already."""
        process = int(sample["tgid"]), int(sample["born"])
        key = (*process, int(sample["execs"]))
        if found := self._known.get(key):
            self._known.move_to_end(key)
            return found
        before = self._newest.get(process)
        if before is not None and newest:
            maps = self._known[*process, before]
            maps.executed(int(sample["time_ns"]))
        else:
            maps = ProcessMaps(process[0], self._files) if newest else self._nothing
            if not len(maps.starts) and key[2] == int(sample["parent_execs"]):
                maps = self._parents(int(sample["parent"]), key[2])
        self._keep(key, maps, newest=newest)
        return maps

    def _parents(self, tgid: int, execs: int) -> ProcessMaps:
        for (known, _, theirs), maps in reversed(self._known.items()):
            if (known, theirs) == (tgid, execs):
                return maps
        return ProcessMaps(tgid, self._files)

    def _keep(self, key: _Key, maps: ProcessMaps, *, newest: bool) -> None:
        self._known[key] = maps
        if newest:
            self._newest[key[:2]] = key[2]
        while len(self._known) > _MOST_PROCESSES:
            (tgid, born, execs), _ = self._known.popitem(last=False)
            if self._newest.get((tgid, born)) == execs:
                del self._newest[tgid, born]
