"""Which memory a sample was taken in: of each program that a process was, one after the other, and
of processes that have ended."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final, NamedTuple

from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.symbols.names import Symbolizer

_MOST_PROCESSES: Final = 1024

_Key = tuple[int, int, int]  # tgid, born, execs


class Process(NamedTuple):
    """A process as the `Symbolizer` knows it, and its memory."""

    tgid: int
    born: int
    maps: ProcessMaps


class Processes:
    """The processes of struct cpu_sample. A process is known from its first samples on: what it
    maps is read when these come, and if it has ended by then, it is taken to have what its parent
    has, unless it has executed a program. Bounded: those that were not sampled for longest are
    forgotten."""

    def __init__(self, symbolizer: Symbolizer) -> None:
        self._symbolizer = symbolizer
        self._known: OrderedDict[_Key, Process] = OrderedDict()
        self._newest: dict[tuple[int, int], int] = {}  # execs, by tgid and born

    def __len__(self) -> int:
        """The number of processes."""
        return len(self._newest)

    def of(self, sample: Any, *, newest: bool) -> Process:  # noqa: ANN401
        """The process of SAMPLE, which is its first sample as that program; NEWEST unless there are
        samples of a later program of the process already."""
        tgid, born, execs = (int(sample[name]) for name in ("tgid", "born", "execs"))
        if found := self._known.get((tgid, born, execs)):
            self._known.move_to_end((tgid, born, execs))
            return found
        before = self._newest.get((tgid, born))
        if before is not None and newest:
            process = self._known[tgid, born, before]
            if process[:2] == (tgid, born):
                self._symbolizer.executed(tgid, int(sample["time_ns"]), born)
            else:  # what was taken for its parent's memory was not its own
                process = self._process(tgid, born)
        else:
            # One that has executed another program since has no directory in /proc for this one.
            process = self._process(tgid, born) if newest else self._process(0, 0)
            if not process.maps.generations and execs == int(sample["parent_execs"]):
                process = self._parent(int(sample["parent"]), execs)
        self._keep((tgid, born, execs), process, newest=newest)
        return process

    def _process(self, tgid: int, born: int) -> Process:
        return Process(tgid, born, self._symbolizer.maps(tgid, born))

    def _parent(self, tgid: int, execs: int) -> Process:
        for (known, _, theirs), process in reversed(self._known.items()):
            if (known, theirs) == (tgid, execs):
                return process
        return self._process(tgid, 0)

    def _keep(self, key: _Key, process: Process, *, newest: bool) -> None:
        self._known[key] = process
        if newest:
            self._newest[key[:2]] = key[2]
        while len(self._known) > _MOST_PROCESSES:
            (tgid, born, execs), _ = self._known.popitem(last=False)
            if self._newest.get((tgid, born)) == execs:
                del self._newest[tgid, born]
                self._symbolizer.forget(tgid, born)
