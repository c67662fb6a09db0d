"""Which memory a sample was taken in: of each program that a process was, one after the other, and
of processes that have ended."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

from coral.bpf.attaching.mappings import MappedCode
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.symbols.names import Symbolizer

_MOST_PROCESSES: Final = 1024
_MOST_MET: Final = 256
_MOST_EXPECTED: Final = 64
_NEVER_BORN: Final = 1 << 32  # times of birth have 32 bits
_BORN_HZ: Final = 1e9 / 1024
_BORN_ERROR_S: Final = 0.03  # /proc tells hundredths of a second

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
        self._met: OrderedDict[int, Process] = OrderedDict()  # not sampled yet, by tgid
        self._meetings = 0

    def __len__(self) -> int:
        """The number of processes."""
        return len(self._newest)

    def meet(self, mapped: Sequence[MappedCode], sighted: Collection[int] = ()) -> None:
        """Processes have just MAPPED code, or were SIGHTED for the first time: looks at those that
        are new, which may have ended when their samples are read, and once more at those that are
        known and have mapped code."""
        known = {process.tgid for process in self._known.values()}
        executed = {code.tgid: code.time_ns for code in mapped if code.is_of_exec}
        for tgid in dict.fromkeys([*(code.tgid for code in mapped), *sighted]):
            met = self._met.get(tgid)
            if tgid in known or (met and not _is_another(met.maps, executed.get(tgid, 0))):
                continue
            if met:
                self._forget(self._met.pop(tgid))
            self._add_met(tgid)
        self._symbolizer.learn(mapped)

    def expect(self, tgids: Iterable[int]) -> None:
        """The processes TGIDS are watched from now on: looks at 64 of those that are new, which may
        work next and end before their samples are read."""
        known = {process.tgid for process in self._known.values()}
        new = (tgid for tgid in tgids if tgid not in known and tgid not in self._met)
        for tgid in islice(new, _MOST_EXPECTED):
            self._add_met(tgid)

    def _add_met(self, tgid: int) -> None:
        self._meetings += 1
        self._met[tgid] = self._process(tgid, _NEVER_BORN + self._meetings)
        while len(self._met) > _MOST_MET:
            self._forget(self._met.popitem(last=False)[1])

    def catch_up(self) -> float | None:
        """See `Symbolizer.catch_up`."""
        return self._symbolizer.catch_up()

    def of(self, sample: Any, *, newest: bool) -> Process:  # noqa: ANN401
        """The process of SAMPLE, which is its first sample as that program; NEWEST unless there are
        samples of a later program of the process already."""
        tgid, born, execs = (int(sample[name]) for name in ("tgid", "born", "execs"))
        if found := self._known.get((tgid, born, execs)):
            self._known.move_to_end((tgid, born, execs))
            return found
        before = self._newest.get((tgid, born))
        process = self._known[tgid, born, before] if before is not None else None
        own = process if process and process.tgid == tgid else None
        if newest and not own:  # the first program; so far it had its parent's memory, if any
            process = self._seen(tgid, born, int(sample["time_ns"]))
        else:
            met = None if own else self._met_as(tgid, born)
            process = self._executed(own or met, int(sample["time_ns"]), is_over=not newest)
            if process is met:
                del self._met[tgid]
        if not (own or process.maps.generations) and execs == int(sample["parent_execs"]):
            process = self._parent(int(sample["parent"]), execs)
        elif process.tgid == tgid and execs == int(sample["parent_execs"]):
            parent = self._copied_of(int(sample["parent"]), execs)
            self._symbolizer.copied(tgid, process.born, parent)
        self._keep((tgid, born, execs), process, newest=newest or process.tgid == tgid)
        return process

    def _executed(self, process: Process | None, time_ns: int, *, is_over: bool) -> Process:
        """PROCESS as the program that it was at TIME_NS. If that IS OVER, because the process has
        executed another one since, /proc has nothing of it any more: there is what was read
        meanwhile, or nothing."""
        begun_ns = process.maps.began(time_ns, is_over=is_over) if process else None
        if process and begun_ns is not None:
            self._symbolizer.has_executed(process.tgid, begun_ns, process.born, is_over=is_over)
            return process
        if process is None or is_over:
            return self._process(0, 0)
        self._symbolizer.executed(process.tgid, time_ns, process.born)
        return process

    def _seen(self, tgid: int, born: int, time_ns: int) -> Process:
        """A process that is sampled for the first time, at TIME_NS. If another has its number by
        now, nothing is known of it."""
        if met := self._met_as(tgid, born):
            del self._met[tgid]
            return met
        process = self._process(tgid, born)
        if not process.maps.began_after(time_ns):
            return process
        self._symbolizer.forget(tgid, born)
        return self._process(0, 0)

    def _met_as(self, tgid: int, born: int) -> Process | None:
        """The process that was met, unless another one had its id then."""
        met = self._met.get(tgid)
        return met if met and _is_born(met.maps, born) else None

    def _process(self, tgid: int, born: int) -> Process:
        return Process(tgid, born, self._symbolizer.maps(tgid, born))

    def _parent(self, tgid: int, execs: int) -> Process:
        for (known, _, theirs), process in reversed(self._known.items()):
            if (known, theirs) == (tgid, execs):
                return process
        return self._process(tgid, 0)

    def _copied_of(self, tgid: int, execs: int) -> tuple[int, int]:
        """Id and birth, as the `Symbolizer` knows it, of the process TGID that was copied."""
        for (known, _, theirs), process in reversed(self._known.items()):
            if (known, theirs) == (tgid, execs):
                return process.tgid, process.born
        met = self._met.get(tgid)
        return (tgid, met.born) if met else (tgid, 0)

    def _keep(self, key: _Key, process: Process, *, newest: bool) -> None:
        self._known[key] = process
        if newest:
            self._newest[key[:2]] = key[2]
        while len(self._known) > _MOST_PROCESSES:
            (tgid, born, execs), process = self._known.popitem(last=False)
            if self._newest.get((tgid, born)) == execs:
                del self._newest[tgid, born]
                self._forget(process)

    def _forget(self, process: Process) -> None:
        if process not in self._known.values():  # of a child that has its memory
            self._symbolizer.forget(process.tgid, process.born)


def _is_another(maps: ProcessMaps, executed_ns: int) -> bool:
    """Whether a process that has executed a program at EXECUTED_NS is not that of MAPS, or is
    another program of it."""
    return bool(maps.generations) and executed_ns > maps.read_ns and maps.is_over


def _is_born(maps: ProcessMaps, born: int) -> bool:
    """Whether the process of MAPS may be one that was BORN then, as programs tell it (`born_of`);
    true if it had ended before it was met."""
    if maps.started is None:
        return True
    asleep_s = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    started_s = maps.started / os.sysconf("SC_CLK_TCK") - asleep_s
    apart = (born - int(started_s * _BORN_HZ)) % _NEVER_BORN
    return min(apart, _NEVER_BORN - apart) <= _BORN_ERROR_S * _BORN_HZ
