"""Compiles `.eh_frame` to sorted rows, in numpy.

The section is what the compiler says about each function's stack frame (DWARF 5, section 6.4). It
may come from a hostile file: a damaged entry is left out and counted, and nothing is raised. Node's
76,000 entries take 0.2 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding import leb128
from coral.collectors.unwinding.entries import (
    ADDRESS_BITS,
    LARGEST_SECTION_BYTES,
    Common,
    commons,
    entries,
    field,
    ranges,
)
from coral.collectors.unwinding.instructions import Programs, decoded
from coral.collectors.unwinding.programs import run
from coral.collectors.unwinding.rules import FLAGS, Machine, Rows, Rule, empty, no_rule

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]

# Fewer bytes between functions are padding, in which nothing runs.
_SMALLEST_GAP: Final = 16
# Programs are run in parts of the section of this size: all at once would take 160 MB for Node.
_PART_BYTES: Final = 64 << 10
# More than any file that we know of has: a hostile one must not fill the memory.
_MOST_ROWS: Final = 4 << 20
_MOST_RULES: Final = 1 << 16


def compile_section(
    section: bytes, address: int, machine: Machine, *, has_end: bool = False
) -> Rows:
    """The rows of `.eh_frame`, which is loaded at the virtual ADDRESS of its file. With HAS_END, a
    terminator ends it, and other data may follow; otherwise terminators are passed over."""
    size = min(len(section), LARGEST_SECTION_BYTES)
    padded = _padded(np.frombuffer(section, np.uint8, size))
    head, at, end = entries(section, size, has_end=has_end)
    identity = field(padded, at, "<u4").astype(np.int64)
    is_common = identity == 0
    shared, which = commons(section, at[is_common], end[is_common], machine)
    indexes = head[is_common][which]
    at, end, parent = at[~is_common], end[~is_common], (at - identity)[~is_common]
    count = len(at)
    if not shared or not count or address >= 1 << ADDRESS_BITS:
        return empty(machine, entries=count, damaged=count)
    initial, sound = _initial(section, shared, machine)

    place = np.minimum(np.searchsorted(indexes, parent), len(indexes) - 1)
    fits = (indexes[place] == parent) & sound[place]
    at, end, place = at[fits], end[fits], place[fits]
    start, stop, begin, fits = ranges(padded, at, end, place, commons=shared, address=address)
    step = np.array([common.code_alignment for common in shared], np.int64)[place]
    unit = np.array([common.data_alignment for common in shared], np.int64)[place]
    programs = Programs(begin, end, start, step, unit, initial[place]).take(fits)
    ran = _run(padded, programs, machine)
    del padded, programs, head, at, end, parent, identity, place, begin, step, unit
    return _sorted_rows(ran, start[fits], stop[fits], count, machine)


def _padded(data: Bytes) -> Bytes:
    padded = np.zeros(len(data) + leb128.PADDING, np.uint8)
    padded[: len(data)] = data
    return padded


def _initial(
    section: bytes, shared: list[Common], machine: Machine
) -> tuple[Ints, NDArray[np.bool_]]:
    """The rule that each common entry's instructions make, (n, columns), and which are sound."""
    parts = [section[common.begin : common.end] for common in shared]
    size = np.array([len(part) for part in parts], np.int64)
    end = np.cumsum(size + 1)  # a byte before each is its mark
    programs = Programs(
        end - size,
        end,
        np.zeros(len(shared), np.int64),
        np.array([common.code_alignment for common in shared], np.int64),
        np.array([common.data_alignment for common in shared], np.int64),
        np.repeat(no_rule(machine)[np.newaxis], len(shared), axis=0),
    )
    together = b"".join(b"\0" + part for part in parts)
    ran = run(decoded(_padded(np.frombuffer(together, np.uint8))), programs, machine)
    rules = ran.rules[np.searchsorted(ran.program, np.arange(len(shared)))]
    rules[:, FLAGS] = [int(Rule.SIGNAL) if common.is_signal else 0 for common in shared]
    return rules, ~ran.damaged


@dataclass(frozen=True, slots=True)
class _Ran:
    """The rows of N functions, in the order of the section."""

    program: NDArray[np.int32]  # (m,)
    address: Ints  # (m,)
    rule: NDArray[np.uint32]  # (m,): in `rules`
    rules: Sequence[Ints]  # the first is that of uncovered addresses
    damaged: NDArray[np.bool_]  # (n,)


def _weights(columns: int) -> Ints:
    # A linear hash of a rule stands for it: two rules of one hash are no accident, but somebody's
    # own file.
    return np.random.default_rng(0).integers(1, 2**62, columns, np.int64) * 2 + 1


def _run(padded: Bytes, programs: Programs, machine: Machine) -> _Ran:
    none = no_rule(machine)
    weights = _weights(len(none))
    rules, numbers = [none], {int((none * weights).sum()): 0}  # by digest
    damaged = np.zeros(len(programs.begin), np.bool_)
    program: list[NDArray[np.int32]] = []
    address: list[Ints] = []
    rule: list[NDArray[np.uint32]] = []
    total = 0
    parts = np.flatnonzero(np.diff(programs.begin // _PART_BYTES, prepend=-1) != 0).tolist()
    for first, last in pairwise([*parts, len(programs.begin)]):
        part = programs.take(slice(first, last))
        origin = int(part.begin[0]) - 1
        code = decoded(_padded(padded[origin : int(part.end[-1])]))
        ran = run(code, part.moved(-origin), machine)
        damaged[first:last] = ran.damaged
        digests, where, of_row = np.unique(
            (ran.rules * weights).sum(axis=1), return_index=True, return_inverse=True
        )
        for digest, at in zip(digests.tolist(), where.tolist(), strict=True):
            if numbers.setdefault(digest, len(rules)) == len(rules):
                rules.append(ran.rules[at])
        number = np.array([numbers[digest] for digest in digests.tolist()], np.uint32)
        program.append((ran.program + first).astype(np.int32))
        address.append(ran.address)
        rule.append(number[of_row])
        total += len(of_row)
        if total > _MOST_ROWS or len(rules) > _MOST_RULES:
            damaged[last:] = True
            break
    return _Ran(
        _joined(program, np.int32),
        _joined(address, np.int64),
        _joined(rule, np.uint32),
        rules,
        damaged,
    )


def _joined(parts: list[NDArray[Any]], type_: type[np.generic]) -> NDArray[Any]:
    """PARTS as one array; frees them."""
    joined = np.concatenate([np.zeros(0, type_), *parts])
    parts.clear()
    return joined


def _sorted_rows(ran: _Ran, start: Ints, stop: Ints, count: int, machine: Machine) -> Rows:
    """The rows of all functions by address. Where functions overlap, the one that begins later has
    the rest. COUNT is that of all entries, sound or not."""
    # A function of no bytes is none; of several that begin at one address the longest is kept.
    order = np.lexsort((-stop, start))
    order = order[(~ran.damaged & (stop > start))[order]]
    if not len(order):
        return empty(machine, entries=count, damaged=count)
    order = order[np.append(True, np.diff(start[order]) > 0)]
    damaged = count - len(start) + int(ran.damaged.sum())
    limit = np.full(len(start), -1, np.int64)
    limit[order] = np.minimum(stop[order], np.append(start[order][1:], np.int64(1) << ADDRESS_BITS))
    kept = ran.address < limit[ran.program]

    # Addresses that no function covers: from the file's first one, and from a function's end that
    # is not another's start.
    gaps = stop[order][np.append(start[order][1:] - stop[order][:-1] >= _SMALLEST_GAP, True)]
    gaps = np.append(np.int64(0), gaps) if start[order[0]] > 0 else gaps
    address = np.concatenate([ran.address[kept], gaps])
    rule = np.concatenate([ran.rule[kept], np.zeros(len(gaps), np.uint32)])
    by_address = np.argsort(address, kind="stable")
    rule = rule[by_address]
    changes = np.append(True, rule[1:] != rule[:-1])
    rule = rule[changes]
    address = address[by_address[changes]]
    address[0] = 0
    is_used = np.zeros(len(ran.rules), np.bool_)
    is_used[rule] = is_used[0] = True
    table = np.array([ran.rules[number] for number in np.flatnonzero(is_used).tolist()], np.int64)
    place = np.cumsum(is_used) - 1
    short = len(table) <= np.iinfo(np.uint16).max
    renumbered = place.astype(np.uint16 if short else np.uint32)[rule]
    return Rows(address.view(np.uint64), renumbered, table, count, damaged)
