"""Unwinds many samples at once, one frame of each at a step.

A step looks up the rules of all samples' addresses, and reads the words that they name from the
copied stacks. Frames that most functions have are done in a few operations of numpy here; the
others are in `unusual`. x86-64 and arm64.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding import unusual
from coral.collectors.unwinding.entries import ADDRESS_BITS
from coral.collectors.unwinding.memory import Memory
from coral.collectors.unwinding.rules import FLAGS, Rule
from coral.collectors.unwinding.space import PENDING, UNMAPPED, Index, Space
from coral.collectors.unwinding.stacks import End, Frame, Samples, Stacks, Unwinding, replaced

MOST_FRAMES: Final = 1024
_HIGHEST: Final = np.uint64((1 << ADDRESS_BITS) - 1)
_LARGEST_STACK_BYTES: Final = unusual.LARGEST_STACK_BYTES
_NOT_BY_TABLE: Final = np.uint8(Frame.GUESS | Frame.EXACT)
_EVERY_BIT: Final = (1 << 64) - 1
_UNKNOWN: Final = max(UNMAPPED, PENDING)
# numpy compares with plain numbers faster than with members of enumerations.
_EXACT: Final = np.uint8(Frame.EXACT)
_ERROR, _CUT, _BOTTOM = int(End.ERROR), int(End.COPY_TOO_SHORT), int(End.BOTTOM)
_ONE: Final = np.uint64(1)
_SHIFT: Final = np.uint64(ADDRESS_BITS)


def unwind(samples: Samples, space: Space, most_frames: int = MOST_FRAMES) -> Stacks:
    """The stacks of SAMPLES, each cut after MOST_FRAMES. Takes 2 to 8 microseconds a stack of C.

    Never raises for what is in registers and stacks: they may be anything.
    """
    index = space.index()
    stacks, incomplete = _Walk(samples, index, most_frames, follows=False).run()
    if len(incomplete):
        # Few functions need registers that their callees have saved: only their stacks are
        # unwound with all registers followed.
        again, _ = _Walk(samples.take(incomplete), index, most_frames, follows=True).run()
        stacks = replaced(stacks, incomplete, again)
    return stacks


class _Walk:
    """The samples that still have frames, and the frames found."""

    def __init__(self, samples: Samples, index: Index, most: int, *, follows: bool) -> None:
        machine, count = index.machine, len(samples)
        self.index = index
        self.most = most
        self.memory = Memory.of(samples)
        self.live = np.arange(count)
        self.ip = samples.registers[:, machine.instruction_pointer].copy()
        self.sp = samples.registers[:, machine.stack_pointer].astype(np.int64)
        self.fp = samples.registers[:, machine.frame_pointer].astype(np.int64)
        self.window = samples.memory.astype(np.uint64) << _SHIFT
        self.flags = np.full(count, Frame.EXACT, np.uint8)
        # Beside the instruction, stack and frame pointers, of all samples.
        self.others = unusual.Registers(machine, samples.registers, follows=follows)
        self.ends = np.full(count, End.TOO_MANY_FRAMES, np.uint8)
        self.unmapped = np.zeros(count, np.uint64)
        self.lengths = np.zeros(count, np.int64)
        self.found: list[tuple[NDArray[np.int64], NDArray[np.uint64], NDArray[np.uint8]]] = []
        self.incomplete: list[NDArray[np.int64]] = []

    def run(self) -> tuple[Stacks, NDArray[np.int64]]:
        """All stacks, and which of them need registers that were not followed."""
        for _ in range(self.most):
            if not len(self.live):
                break
            rule = self._rules()
            if len(self.live):
                self.found.append((self.live, self.ip, self.flags))
                self.lengths[self.live] += 1
                self._step(rule)
        none = np.zeros(0, np.int64)
        return self._stacks(), np.concatenate([none, *self.incomplete])

    def _rules(self) -> NDArray[np.uint32]:
        """The rules of all live frames; stacks of which the next address is no code end here."""
        exact = self.flags & _EXACT
        look = self.ip - (exact == 0) if np.count_nonzero(exact) else self.ip - _ONE
        rule = self.index.rule_at((look & _HIGHEST) | self.window)
        wrong = (rule <= _UNKNOWN) | (look >= _HIGHEST)
        if np.count_nonzero(wrong):
            self.unmapped[self.live[wrong]] = look[wrong]
            self.ends[self.live[wrong]] = _ERROR
            shown = wrong & (exact != 0)  # an interrupted instruction was there, wherever it is
            self.found.append((self.live[shown], self.ip[shown], self.flags[shown]))
            self.lengths[self.live[shown]] += 1
            self._keep(~wrong)
            rule = rule[~wrong]
        return rule

    def _step(self, rule: NDArray[np.uint32]) -> None:
        index = self.index
        plain = index.is_plain[rule]
        cfa = np.where(index.by_frame_pointer[rule], self.fp, self.sp) + index.cfa_offset[rule]
        ip, readable = self.memory.read(cfa + index.return_offset[rule])
        saved, _ = self.memory.read(cfa + index.frame_pointer_offset[rule])
        fp = np.where(index.saves_frame_pointer[rule], saved.view(np.int64), self.fp)
        flags = np.zeros(len(rule), np.uint8)
        end = np.zeros(len(rule), np.uint8)
        good = readable & (cfa > self.sp)
        if np.count_nonzero(good) < len(good):
            end[~good] = _ERROR
            beyond = self.memory.is_beyond(cfa + index.return_offset[rule], _LARGEST_STACK_BYTES)
            beyond |= self.others.has_moved[self.live]
            end[~readable & beyond & (cfa > self.sp)] = _CUT
        end[index.is_outermost[rule]] = _BOTTOM
        callers = unusual.Callers(cfa, ip, fp, flags, end)
        if self.others.follows or np.count_nonzero(plain) < len(plain):
            self._unusual(rule, np.flatnonzero(~plain), callers)
        if index.machine.address_mask != _EVERY_BIT:
            ip &= np.uint64(index.machine.address_mask)
        end[(ip == 0) & (end == 0)] = _BOTTOM
        self.ip, self.sp, self.fp, self.flags = ip, cfa, fp, flags
        if np.count_nonzero(end):
            self.ends[self.live] = np.where(end != 0, end, self.ends[self.live])
            self._keep(end == 0)

    def _unusual(
        self, rule: NDArray[np.uint32], chosen: NDArray[np.int64], callers: unusual.Callers
    ) -> None:
        """Sets what is found of the CALLERS of the samples CHOSEN; follows the registers of all."""
        exact = self.flags & _EXACT != 0
        every = unusual.Frames(
            self.live, rule, self.window, self.ip, exact, self.sp, self.fp, self.memory, callers
        )
        frames = every.take(chosen)
        incomplete = unusual.resolve(frames, self.index, self.others)
        callers.put(chosen, frames.callers)
        signals = self.index.rules[frames.rule, FLAGS] & Rule.SIGNAL != 0
        self.flags[chosen[signals]] |= np.uint8(Frame.SIGNAL)
        if self.others.follows:
            unusual.follow(every, self.index, self.others)
        elif incomplete.any():
            self.incomplete.append(frames.sample[incomplete])

    def _keep(self, kept: NDArray[np.bool_]) -> None:
        self.live, self.ip, self.flags = self.live[kept], self.ip[kept], self.flags[kept]
        self.sp, self.fp, self.window = self.sp[kept], self.fp[kept], self.window[kept]
        self.memory = self.memory.take(kept)

    def _stacks(self) -> Stacks:
        total = int(self.lengths.sum())
        addresses, flags = np.empty(total, np.uint64), np.empty(total, np.uint8)
        place = np.cumsum(self.lengths) - self.lengths
        for sample, ip, of_frame in self.found:
            at = place[sample]
            addresses[at] = ip
            flags[at] = of_frame
            place[sample] = at + 1
        by_table = np.zeros(len(self.lengths), np.bool_)
        by_table[
            np.repeat(np.arange(len(self.lengths)), self.lengths)[flags & _NOT_BY_TABLE == 0]
        ] = True
        return Stacks(
            addresses,
            flags,
            self.lengths,
            self.ends,
            np.where(by_table, Unwinding.EH_FRAME, Unwinding.FRAME_POINTERS).astype(np.uint8),
            self.unmapped,
        )
