"""Functions that a runtime compiles while it runs, as it tells them in /tmp/perf-PID.map: a line
for each, with its address and size in hexadecimal digits, and its name
(tools/perf/Documentation/jit-interface.txt of the kernel).
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.attaching.uprobes import ProcessFile
from coral.collectors.procfs import read, start_time_of
from coral.collectors.symbols import fields, intervals
from coral.collectors.symbols.files import Mounts

_NSPID: Final = re.compile(r"^NSpid:.*?(\d+)$", re.MULTILINE)
_MOST_FUNCTIONS: Final = 1 << 20
_MOST_TEXT_BYTES: Final = 64 << 20
_READ_BYTES: Final = 1 << 20
MOST_READ_BYTES: Final = 32 << 20  # at a time: 2 s of nothing but line feeds, 0.3 s of functions
LARGEST_BYTES: Final = 256 << 20  # a file without blocks may claim to have as many as it likes
_PROOF_BYTES: Final = 64
_REST_FACTOR: Final = 20  # after a look, rest this many times as long: 5 % of a CPU at most
_SHORTEST_REST_S: Final = 0.05
_MOST_CORRECTED: Final = 256
_CLOCK_STEP_S: Final = 2.0
_LOOK_EVERY_S: Final = 1.0  # for a file that is not there


class PerfMap:
    """The functions that a runtime in the process TGID has told so far.

    The file is looked for in the process's own mount and pid namespace, and stays open. It is
    followed as it grows, and read anew if it was cut or written anew. Of functions that overlap,
    the one told last counts. Only a file of the process's user, or of root, is believed, which was
    written since the process started: ids are used again, by containers each time. At most
    1,048,576 functions and 64 MB of names of the first 256 MB are read, 32 MB at a time; `why_not`
    says so, or what else is wrong with the file. ROOM tells how many bytes may still be taken, by
    this and others together. Not safe to use from two threads at once. Never raises.

    Times are of CLOCK_MONOTONIC. A function that was told after a sample was taken is not the one
    that was sampled if another was there before.
    """

    def __init__(self, tgid: int, room: Callable[[], int] = lambda: _MOST_TEXT_BYTES) -> None:
        self.tgid = tgid
        self.why_not = ""
        self._room = room
        self._file: ProcessFile | None = None
        self._rest_until = self._look_at = -np.inf
        self._clear()

    def _clear(self) -> None:
        self.position = 0
        """How many bytes of the file were read."""
        self._proof = b""
        self._rest = b""
        self.starts = np.zeros(0, np.uint64)
        """The address of each function."""
        self._ends = np.zeros(0, np.uint64)
        self._told_after = np.zeros(0, np.uint64)  # when the file was last read without them
        self._read_at_ns = 0
        self._at = np.zeros(1, np.int64)
        self._names = bytearray()
        # Ranges made disjoint, of the functions from the first number on; each newer than the one
        # before, and at most half as large.
        self._layers: list[tuple[int, intervals.Ranges]] = []
        self.marks = np.zeros(0, np.uint32)
        """For each function, a number of the caller's, 0 at first."""

    def __len__(self) -> int:
        """The number of functions told, those that others have replaced included."""
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        arrays = (self.starts, self._ends, self._told_after, self._at, self.marks)
        layered = sum(3 * layer.owners.nbytes for _, layer in self._layers)
        return sum(array.nbytes for array in arrays) + layered + len(self._names)

    def find(
        self, addresses: NDArray[np.uint64], times_ns: NDArray[np.uint64] | None = None
    ) -> NDArray[np.int64]:
        """The numbers of the functions that were at ADDRESSES at TIMES_NS (u64[n]), by default now;
        -1 for those at none. What the runtime has told since is read first. Numbers hold until the
        next call."""
        self.catch_up()
        found = np.full(len(addresses), -1, np.int64)
        for _, layer in reversed(self._layers):
            left = np.flatnonzero(found < 0)
            if not len(left):
                break
            at = intervals.find(layer.starts, layer.ends, addresses[left])
            hit = at >= 0
            found[left[hit]] = layer.owners[at[hit]]
        if times_ns is not None and len(self):
            self._correct(found, addresses, times_ns)
        return found

    def catch_up(self) -> None:
        """Reads what the runtime has told since, with at most 5 % of a CPU."""
        if time.monotonic() >= self._rest_until:
            begun = time.monotonic()
            self._follow()
            took = time.monotonic() - begun
            rest = max(took * _REST_FACTOR, _SHORTEST_REST_S)
            self._rest_until = begun + (rest if self._file else _LOOK_EVERY_S)

    def _correct(
        self,
        found: NDArray[np.int64],
        addresses: NDArray[np.uint64],
        times_ns: NDArray[np.uint64],
    ) -> None:
        """Puts the function of then into FOUND where one that was told later is there. 0.2 ms for
        each address in 100,000 functions, and so for 256 at most."""
        late = np.flatnonzero((found >= 0) & (self._told_after[found] > times_ns))
        for at in late[:_MOST_CORRECTED].tolist():
            there = (self.starts <= addresses[at]) & (addresses[at] < self._ends)
            before = np.flatnonzero(there & (self._told_after <= times_ns[at]))
            if len(before):
                found[at] = before[-1]

    def was_told(self, numbers: NDArray[np.int64], time_ns: int) -> NDArray[np.bool_]:
        """Whether functions with NUMBERS that `find` has given, -1 for none, may have been told by
        TIME_NS, of shape (n,)."""
        told: NDArray[np.bool_] = self._told_after[numbers] <= time_ns
        return told

    def name(self, number: int) -> bytes:
        """The name of a function with a NUMBER that `find` has given."""
        return bytes(self._names[self._at[number] : self._at[number + 1]])

    def forget(self) -> None:
        """Drops all functions, which are read again when they are asked for."""
        self._clear()

    def look(self) -> bool:
        """Whether the file is open. Opens it, if it is there by now: then it can be read after the
        process has ended, too. At most once a second."""
        if self._file is None and time.monotonic() >= self._look_at:
            self._open()
            self._look_at = time.monotonic() + _LOOK_EVERY_S
        return self._file is not None

    def close(self) -> None:
        """Closes the file; the names stay. Safe to call twice."""
        if self._file:
            self._file.close()
            self._file = None

    def _follow(self) -> None:
        """Reads what is new in the file."""
        now_ns = time.monotonic_ns()
        self._open()
        if self._file is None:
            return
        try:
            size = os.fstat(self._file.fd).st_size
            if size < self.position or not self._continues():
                self._clear()
            if size > LARGEST_BYTES:
                self.why_not = f"only the first {LARGEST_BYTES >> 20} MB of the perf map are read"
            last = min(size, self.position + MOST_READ_BYTES, LARGEST_BYTES)
            while self.position < last:
                if len(self) >= _MOST_FUNCTIONS or len(self._names) >= _MOST_TEXT_BYTES:
                    return
                if self._room() <= 0:
                    self.why_not = "perf maps of other processes take all the memory for them"
                    return
                wanted = min(_READ_BYTES, last - self.position)
                data = os.pread(self._file.fd, wanted, self.position)
                if not data:
                    break
                self.position += len(data)
                self._proof = (self._proof + data)[-_PROOF_BYTES:]
                self._take(data)
            if self.position >= size:  # else what is read next may have been told before
                self._read_at_ns = now_ns
        except OSError as error:
            self.why_not = f"the perf map cannot be read: {error.strerror}"

    def _continues(self) -> bool:
        """Whether what was read last is still in the file."""
        assert self._file  # noqa: S101
        at = self.position - len(self._proof)
        return os.pread(self._file.fd, len(self._proof), at) == self._proof

    def _open(self) -> None:
        """Opens the file, or another one that is there now in its place."""
        status = read(self.tgid, "status")
        match = _NSPID.search(status or "")
        if match is None:
            return  # the process has ended: the file stays as it is
        path = f"/tmp/perf-{match[1]}.map"  # noqa: S108  where runtimes write it
        if filesystem := Mounts(self.tgid).that_hold(path):
            self.why_not = (
                f"the perf map is on {filesystem}, which could let the agent wait for ever"
            )
            return
        try:
            # A link could lead to a file system that never answers.
            file = ProcessFile(self.tgid, path, follow_links=False)
            found = os.fstat(file.fd)
        except OSError as error:
            if error.errno == errno.ELOOP:
                self.why_not = "the perf map is a link, or in one: links are not followed"
            return
        if self._file and file.identity[:2] == self._file.identity[:2]:
            file.close()
            return
        if found.st_uid not in (0, _user_of(status or "")):
            self.why_not = f"the perf map belongs to another user ({found.st_uid}): not believed"
            file.close()
            return
        if found.st_mtime < _started_at(self.tgid) - _CLOCK_STEP_S:
            file.close()  # of an earlier process with the same id
            return
        self.close()
        self._clear()
        self._file, self.why_not = file, ""

    def _take(self, data: bytes) -> None:
        """Adds the functions in the lines of DATA, which follows what was read before."""
        data = self._rest + data
        text = np.frombuffer(data, np.uint8)
        begins, feeds = fields.lines(text)
        self._rest = data[int(feeds[-1]) + 1 if len(feeds) else 0 :][:_READ_BYTES]
        first = fields.next_byte(text, b" ", begins, feeds)
        second = fields.next_byte(text, b" ", np.minimum(first + 1, feeds), feeds)
        starts, good = fields.hex_numbers(text, begins, first)
        sizes, good_sizes = fields.hex_numbers(text, np.minimum(first + 1, feeds), second)
        names = second + 1
        good &= good_sizes & (names < feeds) & (sizes > 0) & (sizes < np.uint64(1 << 47))
        good &= starts < np.uint64(1 << 63)
        chosen = np.flatnonzero(good)
        if len(chosen) > _MOST_FUNCTIONS - len(self) or len(self._names) >= _MOST_TEXT_BYTES:
            chosen = chosen[: _MOST_FUNCTIONS - len(self)]
            self.why_not = (
                f"only the first {len(self) + len(chosen)} functions of the perf map are known"
            )
        if not len(chosen):
            return
        starts, ends = starts[chosen], starts[chosen] + sizes[chosen]
        blob, at = fields.slices(text, names[chosen], feeds[chosen])
        self._at = np.concatenate((self._at, at[1:].astype(np.int64) + len(self._names)))
        self._names += blob
        number = len(self)
        self.starts = np.concatenate((self.starts, starts))
        self._ends = np.concatenate((self._ends, ends))
        told_after = np.full(len(starts), self._read_at_ns, np.uint64)
        self._told_after = np.concatenate((self._told_after, told_after))
        self.marks = np.concatenate((self.marks, np.zeros(len(starts), np.uint32)))
        self._layer(number)

    def _layer(self, first: int) -> None:
        """Adds the functions from the number FIRST on to what `find` looks through."""
        while self._layers and (len(self) - first) * 2 > len(self._layers[-1][1].starts):
            first = self._layers.pop()[0]
        found = intervals.disjoint(self.starts[first:], self._ends[first:])
        self._layers.append((first, found._replace(owners=found.owners + first)))


def _user_of(status: str) -> int:
    """The effective user id of a process with STATUS, as it is in the agent's user namespace."""
    match = re.search(r"^Uid:\s+\d+\s+(\d+)", status, re.MULTILINE)
    return int(match[1]) if match else -1


def _started_at(tgid: int) -> float:
    """When a process started, by the clock of files; 0 for one that has ended."""
    ticks = start_time_of(tgid)
    if ticks is None:
        return 0.0
    ago_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - ago_s
