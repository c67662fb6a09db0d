"""A process whose addresses get names: its mappings, and the perf maps of its programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.symbols.files import FileKind
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.symbols.perf_map import PerfMap

_MOST_PROGRAMS: Final = 8  # of a process, one after the other


@dataclass(slots=True)
class KnownProcess:
    """A process: its mappings, and what its runtimes have told of code that they made."""

    maps: ProcessMaps
    # With the times from which they hold: one for each program that the process has executed.
    perf_maps: list[tuple[int, PerfMap]] = field(default_factory=list)
    # The process, by its id and birth, that this one is a copy of: it executes no other program.
    copy_of: tuple[int, int] | None = None

    @property
    def has_code_of_its_own(self) -> bool:
        """Whether it executes memory that no file is mapped to."""
        return any(file.kind is FileKind.ANONYMOUS for file in self.maps.files)

    def close(self) -> None:
        """Closes its perf maps."""
        for _, perf_map in self.perf_maps:
            perf_map.close()

    def begin_program(self, time_ns: int, perf_map: PerfMap) -> None:
        """PERF_MAP holds from TIME_NS on. Keeps those of the last few programs: a process can
        execute any number of them."""
        self.perf_maps.append((time_ns, perf_map))
        while len(self.perf_maps) > _MOST_PROGRAMS:
            self.perf_maps.pop(0)[1].close()

    def in_time(
        self, which: NDArray[np.int64], times_ns: NDArray[np.uint64] | None
    ) -> Iterator[tuple[PerfMap, NDArray[np.int64]]]:
        """The perf maps that held at TIMES_NS, or now, each with those of the samples WHICH."""
        if times_ns is None:
            yield self.perf_maps[-1][1], which
            return
        begins = [since_ns for since_ns, _ in self.perf_maps]
        at = np.searchsorted(np.array(begins, np.uint64), times_ns[which], side="right") - 1
        for number in np.unique(at[at >= 0]).tolist():
            yield self.perf_maps[number][1], which[at == number]
