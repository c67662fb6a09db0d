"""Which unwind rule holds at which address of which process.

All addresses are in two sorted arrays: mappings by (process, address), and rows by (file, address).
A rule is found by one search in each, for samples of any number of processes at once; a file's rows
are there once, however many processes have mapped it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding.entries import ADDRESS_BITS
from coral.collectors.unwinding.rules import (
    CFA,
    CFA_OFFSET,
    FIRST_REGISTER,
    FLAGS,
    Cfa,
    Machine,
    Rows,
    Rule,
    Saved,
    kind_of,
    no_rule,
    offset_of,
)

_Part = tuple[NDArray[np.uint64], NDArray[np.uint64]]
_WINDOW: Final = 1 << ADDRESS_BITS
# Tables of a single rule, before those of files.
_PLAIN: Final = (Cfa.UNMAPPED, Cfa.PENDING, Cfa.NONE, Cfa.ANONYMOUS, Cfa.TRAMPOLINE)
# The numbers of rules in every index: code of which nothing is known, and memory without code.
UNMAPPED: Final = _PLAIN.index(Cfa.UNMAPPED)
PENDING: Final = _PLAIN.index(Cfa.PENDING)


@dataclass(frozen=True, slots=True)
class Region:
    """Executable memory of a process."""

    start: int
    end: int
    bias: int  # what to add to virtual addresses of the file; modulo 2^64
    rows: Rows | None  # of the file, if there is one that has a table
    kind: Cfa = Cfa.NONE  # without rows: NONE, PENDING, ANONYMOUS or TRAMPOLINE


@dataclass(frozen=True, slots=True)
class Index:
    """The arrays that `walk` searches. Never changed once made."""

    machine: Machine
    mapping: NDArray[np.uint64]  # (m,): slot << 48 | first address
    shift: NDArray[np.uint64]  # (m,): what to add for file << 48 | virtual address
    row: NDArray[np.uint64]  # (r,): file << 48 | first virtual address
    row_rule: NDArray[np.uint32]  # (r,)
    rules: NDArray[np.int64]  # (k, columns)
    # Of each rule, (k,): whether the CFA is sp or the frame pointer plus an offset, the return
    # address is saved, and the frame pointer saved or the same: then the next columns say all.
    is_plain: NDArray[np.bool_]
    is_outermost: NDArray[np.bool_]  # the frame has no caller; is_plain too
    by_frame_pointer: NDArray[np.bool_]
    cfa_offset: NDArray[np.int64]
    return_offset: NDArray[np.int64]
    saves_frame_pointer: NDArray[np.bool_]
    frame_pointer_offset: NDArray[np.int64]

    def rule_at(self, key: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """The rules at KEY, (k,): slot << 48 | address."""
        mapping = self.mapping.searchsorted(key, "right") - 1
        row = self.row.searchsorted(key + self.shift[mapping], "right") - 1
        return self.row_rule[row]


class Space:
    """The memories of several processes. A memory is what a process has mapped for a time, named by
    any KEY of the caller."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._slots: dict[Hashable, int] = {}
        self._memories: list[Sequence[Region]] = []
        # Of each memory, what `Index.mapping` and `Index.shift` have of it, once that was made.
        self._parts: list[_Part | None] = []
        self._tables: dict[int, Rows] = {}  # by identity
        self._index: Index | None = None
        self._joined: _Joined | None = None

    def __len__(self) -> int:
        """The number of memories."""
        return len(self._slots)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._slots

    def slot(self, key: Hashable) -> int:
        """The number of a memory in `Samples.memory`, until `keep_only` is called."""
        return self._slots[key]

    @property
    def tables(self) -> int:
        """The number of tables, each of a file."""
        return len(self._tables)

    @property
    def row_bytes(self) -> int:
        """Bytes of all files' rows."""
        return sum(rows.nbytes for rows in self._tables.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays to search, which are copies of all files' rows."""
        index = self._index
        return 0 if index is None else int(index.row.nbytes + index.row_rule.nbytes)

    def put(self, key: Hashable, regions: Sequence[Region]) -> None:
        """Sets what the memory KEY has mapped: disjoint REGIONS."""
        slot = self._slots.setdefault(key, len(self._slots))
        regions = sorted(regions, key=lambda region: region.start)
        if slot == len(self._memories):
            self._memories.append(regions)
            self._parts.append(None)
        else:
            self._memories[slot], self._parts[slot] = regions, None
        for region in regions:
            if region.rows is not None:
                self._add(region.rows)
        self._index = None

    def _add(self, rows: Rows) -> None:
        if id(rows) not in self._tables:
            self._tables[id(rows)] = rows
            self._joined = None

    def keep_only(self, keys: set[Hashable]) -> None:
        """Forgets all memories but KEYS, and the tables that only they had. Slots change."""
        kept = {key: self._memories[slot] for key, slot in self._slots.items() if key in keys}
        self._slots, self._memories, self._parts, self._tables = {}, [], [], {}
        self._index = self._joined = None
        for key, regions in kept.items():
            self.put(key, regions)

    def index(self) -> Index:
        """The arrays to search, made again after a change."""
        if self._index is None:
            self._index = self._built()
        return self._index

    def _built(self) -> Index:
        if self._joined is None:
            self._joined = _joined(self.machine, self._tables)
        return _index(self._joined, self._mappings(self._joined.numbers))

    def _mappings(self, numbers: dict[int, int]) -> _Part:
        """Those of all memories. A new one comes often, so the others' are kept: tables are only
        added, and keep their NUMBERS."""
        nothing = np.zeros(1, np.uint64)
        parts: list[_Part] = [(nothing, nothing)]
        for slot, regions in enumerate(self._memories):
            part = self._parts[slot]
            if part is None:
                part = self._parts[slot] = _mapped(slot, regions, numbers)
            parts.append(part)
        mapping, shift = zip(*parts, strict=True)
        return np.concatenate(mapping), np.concatenate(shift)


def _mapped(slot: int, regions: Sequence[Region], numbers: dict[int, int]) -> _Part:
    """What `Index.mapping` and `Index.shift` have of the memory in SLOT."""
    mapping, shift = [], []
    base = slot * _WINDOW
    after = 0
    for region in regions:
        if not after <= region.start < region.end < _WINDOW:
            continue
        if region.start > after:
            mapping.append(base + after)
            shift.append(-base)
        table, bias = _PLAIN.index(region.kind), 0
        if region.rows is not None:
            first = (region.start - region.bias) % (1 << 64)
            if first + region.end - region.start < _WINDOW:
                table, bias = numbers[id(region.rows)], region.bias
        mapping.append(base + region.start)
        shift.append(table * _WINDOW - bias - base)
        after = region.end
    mapping.append(base + after)
    shift.append(-base)
    modulus = 1 << 64
    return (
        np.array(mapping, np.uint64),
        np.array([number % modulus for number in shift], np.uint64),
    )


@dataclass(frozen=True, slots=True)
class _Joined:
    """The tables of all files as one. Unlike mappings, files seldom change."""

    numbers: dict[int, int]  # of tables, by their identity
    machine: Machine
    row: NDArray[np.uint64]
    row_rule: NDArray[np.uint32]
    rules: NDArray[np.int64]


def _joined(machine: Machine, tables: dict[int, Rows]) -> _Joined:
    numbers = {}
    rows = [np.arange(len(_PLAIN), dtype=np.uint64) * np.uint64(_WINDOW)]
    row_rules = [np.arange(len(_PLAIN), dtype=np.uint32)]
    rules = [no_rule(machine, kind)[np.newaxis] for kind in _PLAIN]
    total = len(_PLAIN)
    for number, (identity, table) in enumerate(tables.items(), len(_PLAIN)):
        numbers[identity] = number
        rows.append(table.start + np.uint64(number * _WINDOW))
        row_rules.append(table.rule.astype(np.uint32) + np.uint32(total))
        rules.append(table.rules)
        total += len(table.rules)
    return _Joined(
        numbers, machine, np.concatenate(rows), np.concatenate(row_rules), np.concatenate(rules)
    )


def _index(joined: _Joined, mappings: tuple[NDArray[np.uint64], NDArray[np.uint64]]) -> Index:
    machine, rules = joined.machine, joined.rules
    column = {register: FIRST_REGISTER + n for n, register in enumerate(machine.tracked)}
    kind, register = rules[:, CFA] >> 8, rules[:, CFA] & 0xFF
    returns = rules[:, column[machine.return_address]]
    pointer = rules[:, column[machine.frame_pointer]]
    saves = kind_of(pointer) == Saved.AT_CFA
    is_plain = (kind == Cfa.REGISTER) & (kind_of(returns) == Saved.AT_CFA)
    is_plain &= (register == machine.stack_pointer) | (register == machine.frame_pointer)
    is_plain &= saves | (kind_of(pointer) == Saved.SAME)
    is_plain &= rules[:, FLAGS] & Rule.SIGNAL == 0
    is_outermost = kind_of(returns) == Saved.UNDEFINED
    return Index(
        machine,
        *mappings,
        joined.row,
        joined.row_rule,
        rules,
        is_plain | is_outermost,
        is_outermost,
        register == machine.frame_pointer,
        np.where(is_plain, rules[:, CFA_OFFSET], 0),
        np.where(is_plain, offset_of(returns), 0),
        saves,
        np.where(saves, offset_of(pointer), 0),
    )
