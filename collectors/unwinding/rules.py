"""How unwind rules are written in numpy: one integer a register, one row of integers a rule.

The vocabulary is DWARF's (section 6.4 of version 5): the canonical frame address (CFA) is the stack
pointer before the call, and each register is restored by a rule relative to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

import numpy as np
from numpy.typing import NDArray


class Cfa(IntEnum):
    """How a rule finds the canonical frame address."""

    REGISTER = 0  # register + offset
    DEREFERENCED = 1  # the word at register + offset, plus an addend
    PLT = 2  # sp + 8, and 8 more from a byte of each 16-byte stub on
    UNKNOWN = 3  # an expression that is none of these
    NONE = 4  # no table covers the address, which is in a file
    ANONYMOUS = 5  # the address is in executable memory without a file
    TRAMPOLINE = 6  # in CPython's trampolines for perf: sp + 16
    UNMAPPED = 7  # the address is in no executable memory
    PENDING = 8  # the address is in a file whose table has not been compiled yet


class Saved(IntEnum):
    """How a rule restores one register."""

    SAME = 0
    AT_CFA = 1  # in the word at CFA + offset
    UNDEFINED = 2  # of the return address: the outermost frame
    AT_REGISTER = 3  # in the word at register + offset
    IS_CFA = 4  # CFA + offset
    IN_REGISTER = 5  # in another register
    UNKNOWN = 6


class Rule(IntFlag):
    """What else a rule says."""

    SIGNAL = (
        1  # the frame of a signal handler's return: its caller was interrupted, it did not call
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor's registers, in DWARF's numbering."""

    name: str
    registers: int  # words of a sample: registers 0 to this, without it
    stack_pointer: int
    frame_pointer: int
    return_address: int  # the column of the return address
    tracked: tuple[int, ...]  # registers whose rules are kept, the return address last
    instruction_pointer: int  # the word of a sample that has it
    returns_in_register: bool  # a call leaves the return address in a register
    address_mask: int  # the bits of a return address that are no signature


# System V ABI, AMD64 supplement, figure 3.36.
X86_64: Final = Machine("x86_64", 17, 7, 6, 16, (3, 6, 12, 13, 14, 15, 16), 16, False, 2**64 - 1)
# DWARF for the Arm 64-bit Architecture: x0 to x30, sp; the word after them is the pc.
ARM64: Final = Machine("aarch64", 33, 31, 29, 30, (29, 30), 32, True, 2**48 - 1)

# A register's rule in one integer: offset << 12 | register << 4 | Saved.
_OFFSET_BITS: Final = 12


def saved(kind: Saved, *, register: int = 0, offset: int = 0) -> int:
    """The rule of one register as an integer."""
    return (offset << _OFFSET_BITS) | (register << 4) | kind


def saved_at_cfa(offset: NDArray[np.int64]) -> NDArray[np.int64]:
    """`saved(Saved.AT_CFA, offset=...)` of many."""
    return (offset << _OFFSET_BITS) | int(Saved.AT_CFA)


def kind_of(code: NDArray[np.int64]) -> NDArray[np.int64]:
    """`Saved` of registers' rules."""
    return code & 0xF


def register_of(code: NDArray[np.int64]) -> NDArray[np.int64]:
    """The other register of registers' rules."""
    return (code >> 4) & 0xFF


def offset_of(code: NDArray[np.int64]) -> NDArray[np.int64]:
    """The offset of registers' rules, in bytes."""
    return code >> _OFFSET_BITS


def cfa(kind: Cfa, register: int = 0) -> int:
    """How the CFA is found as an integer: its kind and register."""
    return (kind << 8) | register


# Columns of a rule before those of the tracked registers. The addend of a dereferenced CFA is in
# the upper half of its offset.
CFA: Final = 0
CFA_OFFSET: Final = 1
FLAGS: Final = 2
FIRST_REGISTER: Final = 3


def no_rule(machine: Machine, kind: Cfa = Cfa.NONE) -> NDArray[np.int64]:
    """The rule of addresses that no table covers, of shape (columns,)."""
    row = np.zeros(FIRST_REGISTER + len(machine.tracked), np.int64)
    row[CFA] = cfa(kind)
    return row


@dataclass(frozen=True, slots=True)
class Rows:
    """A file's unwind table. Row i holds from `start[i]` to the start of the next."""

    start: NDArray[np.uint64]  # (n,): virtual addresses of the file, ascending; the first is 0
    rule: NDArray[np.uint16] | NDArray[np.uint32]  # (n,): index in `rules`
    rules: NDArray[
        np.int64
    ]  # (m, columns): distinct rules; the first is that of uncovered addresses
    entries: int  # functions' entries (FDEs) in the section
    damaged: int  # entries left out, because they are damaged or use what is not understood

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return int(self.start.nbytes + self.rule.nbytes + self.rules.nbytes)

    def at(self, address: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The rules that hold at ADDRESS, (k,), as (k, columns)."""
        row = np.searchsorted(self.start, address, "right") - 1
        found: NDArray[np.int64] = self.rules[self.rule[row]]
        return found


def empty(machine: Machine, *, entries: int = 0, damaged: int = 0) -> Rows:
    """The table that covers nothing."""
    return Rows(
        np.zeros(1, np.uint64),
        np.zeros(1, np.uint16),
        no_rule(machine)[np.newaxis],
        entries,
        damaged,
    )
