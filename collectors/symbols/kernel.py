"""Functions of the kernel, its modules and its eBPF programs, as /proc/kallsyms lists them."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from coral.collectors.procfs import PROC
from coral.collectors.symbols import fields, intervals
from coral.collectors.symbols.elf import build_id_in

KERNEL: Final = "[kernel]"
_SYS: Final = Path("/sys")
_DIGITS: Final = 16
_TYPE_AT, _NAME_AT = 17, 19
_CODE: Final = b"tTwW"
_GLOBAL: Final = b"T"
_LARGEST_BYTES: Final = 64 << 20
_CHUNK_BYTES: Final = 1 << 20
_LONGEST_LAST_BYTES: Final = 4096  # of the last function of a module or of all
_LOOK_EVERY_S: Final = 10.0  # at most
_REST_FACTOR: Final = 200  # after a read, rest this many times as long: 0.5 % of a CPU at most
# Labels at the ends of sections, which contain nothing themselves.
_MARKS: Final = (b"_etext", b"_einittext", b"__init_end")
_FIRST: Final = (b"_text", b"_stext")
_MODULE: Final = re.compile(r"^(\S+) ([0-9]+) .* 0x([0-9a-f]+)", re.MULTILINE)


class KernelFunction(NamedTuple):
    """A function: its name and its module, `[kernel]`, `[ext4]` or, for eBPF programs, `[bpf]`."""

    name: str
    module: str


class KernelSymbols:
    """The kernel's functions by address. They are read when first asked for, and again when an
    address has none, seldom, because some never have one: modules and eBPF programs come and go.
    0.1 s for 120,000.

    `why_not` says what is missing if addresses are hidden from this process, and is empty
    otherwise; nothing has a name then. Not safe to use from two threads at once.
    """

    def __init__(self, path: Path = PROC / "kallsyms") -> None:
        self.why_not = ""
        self._path = path
        self._read_again_at = -np.inf
        self._starts = self._ends = np.zeros(0, np.uint64)
        self._at = np.zeros(1, np.uint32)
        self._owners = np.zeros(0, np.int32)
        self._text = b""
        self._first = 0
        self._modules: dict[str, int] = {}
        self.marks = np.zeros(0, np.uint32)
        """For each function, a number of the caller's, 0 at first."""

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        arrays = (self._starts, self._ends, self._owners, self._at, self.marks)
        return sum(array.nbytes for array in arrays) + len(self._text)

    def prepare(self) -> None:
        """Reads them, if that was never tried."""
        if self._read_again_at == -np.inf:
            self._read_and_rest()

    def find(self, addresses: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The numbers of the functions that contain ADDRESSES (u64[n]); -1 for those in none.
        Numbers hold until the next call."""
        found = intervals.find(self._starts, self._ends, addresses)
        if (found < 0).any() and time.monotonic() >= self._read_again_at:
            self._read_and_rest()
            found = intervals.find(self._starts, self._ends, addresses)
        return found

    def _read_and_rest(self) -> None:
        began_s = time.thread_time()
        self._read()
        rest_s = max(_LOOK_EVERY_S, _REST_FACTOR * (time.thread_time() - began_s))
        self._read_again_at = time.monotonic() + rest_s

    def function(self, number: int) -> KernelFunction:
        """The function with a NUMBER that `find` has given."""
        owner = int(self._owners[number])
        line = self._text[self._at[owner] : self._at[owner + 1]].decode(errors="replace")
        name, _, module = line.partition("\t")
        return KernelFunction(name, module or KERNEL)

    def relative(self, addresses: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """ADDRESSES from the first byte of the kernel's code, or of the module that contains it,
        so that nothing reveals where the kernel is in memory; 0 where that is not known."""
        starts = np.array(sorted([*self._modules.values(), self._first]), np.uint64)
        at = np.searchsorted(starts, addresses, side="right") - 1
        return np.where((at >= 0) & (starts[at] > 0), addresses - starts[at], 0)

    def build_id(self, module: str) -> bytes:
        """The build id of the kernel, or of a module; empty if it has none or is hidden."""
        path = _SYS / "kernel/notes"
        name = module.strip("[]")
        if module != KERNEL:
            if not re.fullmatch(r"[\w-]+", name):
                return b""
            path = _SYS / "module" / name / "notes/.note.gnu.build-id"
        try:
            return build_id_in(path.read_bytes())
        except OSError:
            return b""

    def _read(self) -> None:
        try:
            data = _read_bounded(self._path)
        except OSError as error:
            self.why_not = f"{self._path} cannot be read ({error.strerror})"
            return
        text = np.frombuffer(data, np.uint8)
        starts, ends = fields.lines(text)
        long_enough = ends - starts > _NAME_AT
        starts, ends = starts[long_enough], ends[long_enough]
        addresses, good = fields.hex_numbers(text, starts, starts + _DIGITS)
        starts, ends, addresses = starts[good], ends[good], addresses[good]
        if not addresses.any():
            self.why_not = (
                "the kernel's functions have no names: addresses in /proc/kallsyms are hidden from "
                "processes without CAP_SYSLOG (kernel.kptr_restrict)"
            )
            return
        self.why_not = ""
        self._take(text, starts, ends, addresses)

    def _take(
        self,
        text: NDArray[np.uint8],
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        addresses: NDArray[np.uint64],
    ) -> None:
        kinds = text[starts + _TYPE_AT]
        code = np.isin(kinds, np.frombuffer(_CODE, np.uint8))
        bounds = intervals.distinct(addresses)
        # Of several names at an address: global, without an underscore in front, the first listed.
        names = starts + _NAME_AT
        rank = (text[names] == ord("_")) * 2 + (kinds != ord(_GLOBAL))
        chosen = np.flatnonzero(code)
        chosen = chosen[np.lexsort((chosen, rank[chosen], addresses[chosen]))]
        first = np.concatenate(([True], np.diff(addresses[chosen]) > 0))
        chosen = chosen[first]
        after = np.searchsorted(bounds, addresses[chosen], side="right")
        limit = addresses[chosen] + np.uint64(_LONGEST_LAST_BYTES)
        following = np.where(after < len(bounds), bounds[np.minimum(after, len(bounds) - 1)], limit)
        modules = _module_of(text, names, ends)[chosen]
        # The last of a module must not reach into the next one.
        last = np.append(modules[1:] != modules[:-1], True)
        following = np.where(last, np.minimum(following, limit), following)
        by_place = np.argsort(names[chosen], kind="stable")
        self._text, self._at = fields.slices(text, names[chosen][by_place], ends[chosen][by_place])
        owners = np.empty(len(chosen), np.int32)
        owners[by_place] = np.arange(len(chosen))
        self._starts, self._ends, self._owners = addresses[chosen], following, owners
        self.marks = np.zeros(len(chosen), np.uint32)
        self._drop_marks()
        self._first = self._first_address(text, names, ends, addresses)
        self._modules = _modules()

    def _drop_marks(self) -> None:
        """Labels at the ends of sections own nothing."""
        for mark in _MARKS:
            at = self._text.find(mark)
            while at >= 0:
                number = np.searchsorted(self._at, at)
                if self._at[number] == at and self._at[number + 1] == at + len(mark):
                    of_mark = self._owners == number
                    self._ends[of_mark] = self._starts[of_mark]
                at = self._text.find(mark, at + 1)

    @staticmethod
    def _first_address(
        text: NDArray[np.uint8],
        names: NDArray[np.int64],
        ends: NDArray[np.int64],
        addresses: NDArray[np.uint64],
    ) -> int:
        """Where the kernel's code begins; 0 if it does not say."""
        for mark in _FIRST:
            same = ends - names == len(mark)
            for n, letter in enumerate(mark):
                same &= text[np.minimum(names + n, len(text) - 1)] == letter
            if same.any():
                return int(addresses[same][0])
        return 0


def _module_of(
    text: NDArray[np.uint8], names: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """A number for the module in each line, equal for equal ones: the first letters of its name.
    0 for the kernel."""
    tabs = fields.next_byte(text, b"\t", names, ends)
    found = np.zeros(len(names), np.uint64)
    for n in range(1, 9):
        at = tabs + n
        letter = np.where(at < ends, text[np.minimum(at, len(text) - 1)], 0)
        found = found << np.uint64(8) | letter.astype(np.uint64)
    return found


def _modules() -> dict[str, int]:
    """The addresses of the modules, by their names."""
    try:
        text = (PROC / "modules").read_text()
    except OSError:
        return {}
    return {name: int(address, 16) for name, _, address in _MODULE.findall(text)}


def _read_bounded(path: Path) -> bytearray:
    content = bytearray()  # parts and what they are joined to would be there at once
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while len(content) < _LARGEST_BYTES and (chunk := os.read(fd, _CHUNK_BYTES)):
            content += chunk
    finally:
        os.close(fd)
    return content
