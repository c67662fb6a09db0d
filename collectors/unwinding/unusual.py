"""Frames that are unwound by rules of their own: signal handlers' returns, PLT stubs, CFAs by other
registers or by expressions, the outermost functions, and code without a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding.memory import Memory
from coral.collectors.unwinding.rules import (
    ARM64,
    CFA,
    CFA_OFFSET,
    FIRST_REGISTER,
    FLAGS,
    Cfa,
    Machine,
    Rule,
    Saved,
    kind_of,
    offset_of,
    register_of,
)
from coral.collectors.unwinding.space import UNMAPPED, Index
from coral.collectors.unwinding.stacks import End, Frame

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]
Mask = NDArray[np.bool_]

# numpy compares with plain numbers faster than with members of enumerations.
_SAVED_AT_CFA: Final = int(Saved.AT_CFA)
_SAVED_AT_REGISTER: Final = int(Saved.AT_REGISTER)
_SAVED_IN_REGISTER: Final = int(Saved.IN_REGISTER)
_SAVED_IS_CFA: Final = int(Saved.IS_CFA)
_SAVED_UNDEFINED: Final = int(Saved.UNDEFINED)
_SAVED_UNKNOWN: Final = int(Saved.UNKNOWN)
_CFA_ANONYMOUS: Final = int(Cfa.ANONYMOUS)
_CFA_DEREFERENCED: Final = int(Cfa.DEREFERENCED)
_CFA_NONE: Final = int(Cfa.NONE)
_CFA_PLT: Final = int(Cfa.PLT)
_CFA_REGISTER: Final = int(Cfa.REGISTER)
_CFA_TRAMPOLINE: Final = int(Cfa.TRAMPOLINE)
_CFA_UNKNOWN: Final = int(Cfa.UNKNOWN)
_RULE_SIGNAL: Final = int(Rule.SIGNAL)
_END_BOTTOM: Final = int(End.BOTTOM)
_END_COPY_TOO_SHORT: Final = int(End.COPY_TOO_SHORT)
_END_ERROR: Final = int(End.ERROR)
_END_NO_UNWIND_INFO: Final = int(End.NO_UNWIND_INFO)
_FRAME_EXACT: Final = int(Frame.EXACT)
_FRAME_GUESS: Final = int(Frame.GUESS)

# Further than a stack usually grows, an address is not one of this stack.
LARGEST_STACK_BYTES: Final = 8 << 20
_HIGHEST: Final = np.uint64((1 << 48) - 1)
_WORD: Final = 8
_STUB_BYTES: Final = 16
_HIGHEST_BIT: Final = 62
_ONE: Final = np.uint64(1)
_BY_RULE, _BY_GUESS, _BY_TRAMPOLINE = range(3)

# Where the kernel saves registers, from the stack pointer of a handler's return on: x86-64's struct
# ucontext begins there (uapi/asm/ucontext.h, sigcontext.h), arm64's struct rt_sigframe.
_SAVED_X86: Final = {
    register: 40 + _WORD * nth
    for nth, register in enumerate((*range(8, 16), 5, 4, 6, 3, 1, 0, 2, 7, 16))
}
_SAVED_ARM64: Final = {register: 312 + _WORD * register for register in range(33)}


class Registers:
    """All samples' registers beside the three that every step restores."""

    def __init__(self, machine: Machine, registers: Words, *, follows: bool) -> None:
        self.values = registers.astype(np.int64)
        self.follows = follows
        # Bits of registers that calls preserve, and that are known in callers' frames.
        self.kept = np.full(len(registers), _bits(machine) if follows else 0, np.int64)
        self.all = _bits(machine)
        # Signals that were handled on another stack than they interrupted.
        self.has_moved = np.zeros(len(registers), np.bool_)


def _bits(machine: Machine) -> int:
    return sum(1 << register for register in machine.tracked[:-1])


@dataclass(frozen=True, slots=True)
class Callers:
    """What is found of the callers of K frames. Its arrays are written to."""

    cfa: Ints  # (k,): the stack pointer in the caller
    ip: Words
    fp: Ints
    flags: NDArray[np.uint8]  # Frame
    end: NDArray[np.uint8]  # End, of frames without a caller; else 0

    def take(self, index: Ints) -> Callers:
        """A copy of those at INDEX, (j,)."""
        return Callers(
            self.cfa[index], self.ip[index], self.fp[index], self.flags[index], self.end[index]
        )

    def put(self, index: Ints, other: Callers) -> None:
        """Sets those at INDEX, (j,), to OTHER."""
        self.cfa[index], self.ip[index], self.fp[index] = other.cfa, other.ip, other.fp
        self.flags[index], self.end[index] = other.flags, other.end


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of K live samples at one step."""

    sample: Ints  # (k,)
    rule: NDArray[np.uint32]
    window: Words  # slot << 48
    ip: Words
    exact: Mask
    sp: Ints
    fp: Ints
    memory: Memory
    callers: Callers

    def take(self, index: Ints) -> Frames:
        """Those at INDEX, (j,), with a copy of what is found of their callers."""
        return Frames(
            self.sample[index],
            self.rule[index],
            self.window[index],
            self.ip[index],
            self.exact[index],
            self.sp[index],
            self.fp[index],
            self.memory.take(index),
            self.callers.take(index),
        )


@dataclass(frozen=True, slots=True)
class _Known:
    """The registers of K frames: values, (k, registers), and a bit for each that is known, (k,)."""

    values: Ints
    bits: Ints

    def named(self, register: Ints) -> Ints:
        """Of each frame, the value of one REGISTER, (k,)."""
        at = np.minimum(register, self.values.shape[1] - 1)
        found: Ints = self.values[np.arange(len(self.values)), at]
        return found

    def has(self, register: Ints | int) -> Mask:
        """Of each frame, whether REGISTER is known."""
        found: Mask = (self.bits >> np.minimum(register, _HIGHEST_BIT)) & 1 != 0
        return found


def _known(frames: Frames, machine: Machine, registers: Registers) -> _Known:
    values = registers.values[frames.sample]
    values[:, machine.stack_pointer] = frames.sp
    values[:, machine.frame_pointer] = frames.fp
    bits = np.where(frames.exact, -1, registers.kept[frames.sample])
    bits |= 1 << machine.stack_pointer | 1 << machine.frame_pointer
    return _Known(values, bits)


def resolve(frames: Frames, index: Index, registers: Registers) -> Mask:
    """Finds the callers of FRAMES, and why some have none. Returns which of them need a register
    that is not followed, (k,)."""
    kind = index.rules[frames.rule, CFA] >> 8
    incomplete = np.zeros(len(kind), np.bool_)
    frames.callers.end[:] = 0
    for group, of_group in (
        (_BY_RULE, kind < _CFA_NONE),
        (_BY_GUESS, (kind == _CFA_NONE) | (kind == _CFA_ANONYMOUS)),
        (_BY_TRAMPOLINE, kind == _CFA_TRAMPOLINE),
    ):
        count = np.count_nonzero(of_group)
        if not count:
            continue
        chosen = np.flatnonzero(of_group)
        part = frames if count == len(kind) else frames.take(chosen)
        if group == _BY_RULE:
            incomplete[chosen] = _by_rule(part, index, registers)
        elif group == _BY_GUESS:
            _guess(part, index, kind[chosen] == _CFA_ANONYMOUS)
        else:
            _trampoline(part)
        if part is not frames:
            frames.callers.put(chosen, part.callers)
    return incomplete


def _by_rule(frames: Frames, index: Index, registers: Registers) -> Mask:
    machine = index.machine
    known = _known(frames, machine, registers)
    rules = index.rules[frames.rule]
    incomplete = _find_cfa(frames, rules, known)
    _find_return(frames, machine, rules, known)
    _find_frame_pointer(frames, machine, rules, known)
    signals = (rules[:, FLAGS] & _RULE_SIGNAL) != 0
    if signals.any():
        _return_from_signal(frames, machine, np.flatnonzero(signals), registers)
    stuck = (frames.callers.end == 0) & ~signals & (frames.callers.cfa <= frames.sp)
    # A function that has not touched its stack: on arm64 the return address is in a register.
    stuck &= ~(frames.exact & (frames.callers.cfa == frames.sp) & machine.returns_in_register)
    frames.callers.end[stuck] = _END_ERROR
    return incomplete


def _end(frames: Frames, where: Mask, reason: int) -> None:
    frames.callers.end[where & (frames.callers.end == 0)] = reason


def _end_unread(frames: Frames, address: Ints, where: Mask) -> None:
    beyond = frames.memory.is_beyond(address, LARGEST_STACK_BYTES)
    _end(frames, where & beyond, _END_COPY_TOO_SHORT)
    _end(frames, where, _END_ERROR)


def _find_cfa(frames: Frames, rules: Ints, known: _Known) -> Mask:
    kind, register, offset = rules[:, CFA] >> 8, rules[:, CFA] & 0xFF, rules[:, CFA_OFFSET]
    base = known.named(register)
    by_register = (kind == _CFA_REGISTER) | (kind == _CFA_DEREFERENCED)
    unknown: Mask = by_register & ~known.has(register)
    _end(frames, unknown | (kind == _CFA_UNKNOWN), _END_NO_UNWIND_INFO)
    found = base + offset
    stub = kind == _CFA_PLT
    if stub.any():
        within = (frames.ip % np.uint64(_STUB_BYTES)).astype(np.int64)
        entry = frames.sp + _WORD + np.where(within >= offset, _WORD, 0)
        found = np.where(stub, entry, found)
    indirect = kind == _CFA_DEREFERENCED
    if indirect.any():
        low = offset.astype(np.uint32).astype(np.int32).astype(np.int64)
        word, readable = frames.memory.read(base + low)
        _end_unread(frames, base + low, indirect & ~readable)
        addend = (offset - low) >> 32
        found = np.where(indirect, word.view(np.int64) + addend, found)
    frames.callers.cfa[:] = found
    return unknown


def _restored(frames: Frames, code: Ints, register: int, known: _Known) -> tuple[Ints, Mask, Ints]:
    """A register of the callers by the rules CODE, whether it is known, and where it was read."""
    kind, other, offset = kind_of(code), register_of(code), offset_of(code)
    cfa = frames.callers.cfa
    by_other = (kind == _SAVED_AT_REGISTER) | (kind == _SAVED_IN_REGISTER)
    place = np.where(kind == _SAVED_AT_REGISTER, known.named(other), cfa) + offset
    is_read = (kind == _SAVED_AT_CFA) | (kind == _SAVED_AT_REGISTER)
    word, readable = frames.memory.read(place)
    found = np.where(is_read, word.view(np.int64), known.values[:, register])
    found = np.where(kind == _SAVED_IS_CFA, cfa + offset, found)
    found = np.where(kind == _SAVED_IN_REGISTER, known.named(other), found)
    is_known = known.has(np.where(by_other, other, register))
    is_known |= (kind == _SAVED_AT_CFA) | (kind == _SAVED_IS_CFA)
    is_known &= readable | ~is_read
    is_known &= (kind != _SAVED_UNKNOWN) & (kind != _SAVED_UNDEFINED)
    return found, is_known, np.where(is_read, place, 0)


def _column(machine: Machine, register: int) -> int:
    return FIRST_REGISTER + machine.tracked.index(register)


def _find_return(frames: Frames, machine: Machine, rules: Ints, known: _Known) -> None:
    code = rules[:, _column(machine, machine.return_address)]
    if not machine.returns_in_register:
        # Where it is not said to be saved, it is nowhere: the column is no real register.
        known = _Known(known.values, known.bits & ~(1 << machine.return_address))
    found, is_known, place = _restored(frames, code, machine.return_address, known)
    _end(frames, kind_of(code) == _SAVED_UNDEFINED, _END_BOTTOM)
    _end_unread(frames, place, ~is_known & (place != 0))
    _end(frames, ~is_known, _END_NO_UNWIND_INFO)
    frames.callers.ip[:] = found.view(np.uint64)


def _find_frame_pointer(frames: Frames, machine: Machine, rules: Ints, known: _Known) -> None:
    code = rules[:, _column(machine, machine.frame_pointer)]
    found, is_known, _ = _restored(frames, code, machine.frame_pointer, known)
    frames.callers.fp[:] = np.where(is_known, found, 0)


def follow(frames: Frames, index: Index, registers: Registers) -> None:
    """Restores the registers that calls preserve, of the callers of FRAMES; the CFAs are known."""
    machine = index.machine
    known = _known(frames, machine, registers)
    rules = index.rules[frames.rule]
    returns = (rules[:, FLAGS] & _RULE_SIGNAL) != 0
    kept = np.zeros(len(frames.sample), np.int64)
    after = registers.values[frames.sample]
    for register in machine.tracked[:-1]:
        code = rules[:, _column(machine, register)]
        found, is_known, _ = _restored(frames, code, register, known)
        after[:, register] = np.where(returns, after[:, register], found)
        kept |= is_known.astype(np.int64) << register
    registers.values[frames.sample] = after
    registers.kept[frames.sample] = np.where(returns, registers.all, kept)


def _return_from_signal(
    frames: Frames, machine: Machine, chosen: Ints, registers: Registers
) -> None:
    """The caller is what the signal interrupted: all its registers are in the kernel's frame."""
    saved = _SAVED_ARM64 if machine is ARM64 else _SAVED_X86
    memory, sp = frames.memory.take(chosen), frames.sp[chosen]
    readable = np.ones(len(chosen), np.bool_)
    for register, offset in saved.items():
        word, was_read = memory.read(sp + offset)
        readable &= was_read
        registers.values[frames.sample[chosen], register] = word.view(np.int64)
    found = registers.values[frames.sample[chosen]]
    frames.callers.cfa[chosen] = found[:, machine.stack_pointer]
    frames.callers.fp[chosen] = found[:, machine.frame_pointer]
    frames.callers.ip[chosen] = found[:, machine.instruction_pointer].view(np.uint64)
    frames.callers.flags[chosen] = _FRAME_EXACT
    registers.has_moved[frames.sample[chosen]] |= ~memory.read(frames.callers.cfa[chosen])[1]
    frames.callers.end[chosen] = np.where(readable, 0, _END_COPY_TOO_SHORT)


def _is_code(index: Index, address: Words, window: Words) -> Mask:
    before = address - _ONE
    rule = index.rule_at((before & _HIGHEST) | window)
    found: Mask = (rule != UNMAPPED) & (before < _HIGHEST)
    return found


def _guess(frames: Frames, index: Index, is_anonymous: Mask) -> None:
    """Without a table: by the frame pointer if what it leads to can be a frame. In memory without
    a file, CPython's trampoline for perf has none: there by its size."""
    machine, memory, callers = index.machine, frames.memory, frames.callers
    fp = frames.fp
    before, readable = memory.read(fp)
    caller, also = memory.read(fp + _WORD)
    caller &= np.uint64(machine.address_mask)
    fits = readable & also & (fp >= frames.sp) & (fp & (_WORD - 1) == 0)
    good = fits & _is_code(index, caller, frames.window)
    callers.cfa[:], callers.ip[:] = fp + 2 * _WORD, caller
    callers.fp[:], callers.flags[:] = before.view(np.int64), _FRAME_GUESS
    if np.count_nonzero(good) == len(good):
        return
    callers.end[~good] = _END_NO_UNWIND_INFO
    callers.end[~good & memory.is_beyond(fp + _WORD, LARGEST_STACK_BYTES)] = _END_COPY_TOO_SHORT
    callers.end[(fp == 0) | (fits & (caller == 0))] = _END_BOTTOM
    left = np.flatnonzero(~good & is_anonymous & ~frames.exact)
    if len(left) and not machine.returns_in_register:
        part = frames.take(left)
        _trampoline(part)
        fits = (part.callers.end == 0) & _is_code(index, part.callers.ip, part.window)
        part = part.take(np.flatnonzero(fits))
        part.callers.flags[:] = _FRAME_GUESS
        callers.put(left[fits], part.callers)


def _trampoline(frames: Frames) -> None:
    """CPython's: it makes room for one word, calls, and returns (Python/asm_trampoline.S)."""
    callers = frames.callers
    caller, readable = frames.memory.read(frames.sp + _WORD)
    callers.cfa[:], callers.ip[:] = frames.sp + 2 * _WORD, caller
    callers.fp[:], callers.flags[:] = frames.fp, 0
    callers.end[:] = np.where(readable, 0, _END_COPY_TOO_SHORT)
