"""What call frame instructions do to the rules of registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.unwinding import instructions as ops
from coral.collectors.unwinding import leb128
from coral.collectors.unwinding.expressions import cfa_of, saved_by
from coral.collectors.unwinding.instructions import Code, Programs, Stream
from coral.collectors.unwinding.rules import (
    CFA,
    CFA_OFFSET,
    FIRST_REGISTER,
    Cfa,
    Machine,
    Saved,
    cfa,
    saved,
    saved_at_cfa,
)

Ints = NDArray[np.int64]

_LARGEST_OFFSET: Final = (1 << 31) - 1
RESTORED: Final = -(1 << 62)  # as a register's rule: that of the common entry

_REGISTERS: Final = 32  # that rules can name
_Decode = Callable[[NDArray[np.uint8], Ints], Ints]
_NAME_A_REGISTER: Final = (
    ops.OFFSET_EXTENDED, ops.OFFSET_EXTENDED_SF, ops.RESTORE_EXTENDED, ops.UNDEFINED,
    ops.SAME_VALUE, ops.REGISTER, ops.EXPRESSION, ops.VAL_OFFSET, ops.VAL_OFFSET_SF,
    ops.VAL_EXPRESSION, ops.NEGATIVE_OFFSET_EXTENDED,
)  # fmt: skip
_SET_AN_OFFSET: Final = (ops.DEF_CFA, ops.DEF_CFA_SF, ops.DEF_CFA_OFFSET, ops.DEF_CFA_OFFSET_SF)
_WITH_OFFSET: Final = (
    (ops.OFFSET_EXTENDED, leb128.unsigned, Saved.AT_CFA, 1),
    (ops.OFFSET_EXTENDED_SF, leb128.signed, Saved.AT_CFA, 1),
    (ops.NEGATIVE_OFFSET_EXTENDED, leb128.unsigned, Saved.AT_CFA, -1),
    (ops.VAL_OFFSET, leb128.unsigned, Saved.IS_CFA, 1),
    (ops.VAL_OFFSET_SF, leb128.signed, Saved.IS_CFA, 1),
)


class Effects:
    """What each instruction of a STREAM, (t,), sets: the CFA, its offset, or one register's rule.

    Programs that use what no rule can say are marked in DAMAGED, (n,).
    """

    def __init__(
        self, code: Code, stream: Stream, programs: Programs, damaged: NDArray[np.bool_]
    ) -> None:
        total = len(stream.at)
        self._data, self._number_end = code.data, code.number_end
        self._stream = stream
        self._damaged = damaged
        self._factor = programs.data_alignment[stream.program]
        self._register, self._rule = np.full(total, -1, np.int64), np.zeros(total, np.int64)
        self._sets_cfa, self._sets_offset = np.zeros(total, np.bool_), np.zeros(total, np.bool_)
        self._cfa, self._offset = np.zeros(total, np.int64), np.zeros(total, np.int64)
        self._registers()
        self._register_expressions()
        self._cfas()
        self._cfa_expressions()

    def columns(self, machine: Machine) -> Iterator[tuple[int, NDArray[np.bool_], Ints]]:
        """Of each column of a rule: its number, which instructions set it, and to what."""
        yield CFA, self._sets_cfa, self._cfa
        yield CFA_OFFSET, self._sets_offset, self._offset
        for nth, register in enumerate(machine.tracked, FIRST_REGISTER):
            yield nth, self._register == register, self._rule

    def _those(self, *opcodes: int) -> Ints:
        found = self._stream.opcode == opcodes[0]
        for opcode in opcodes[1:]:
            found |= self._stream.opcode == opcode
        return np.flatnonzero(found)

    def _first(self, index: Ints, decode: _Decode) -> Ints:
        """The instructions' first number."""
        return decode(self._data, self._stream.at[index] + 1)

    def _second(self, index: Ints, decode: _Decode) -> Ints:
        return decode(self._data, self._after_first(index))

    def _after_first(self, index: Ints) -> Ints:
        return self._number_end[self._stream.at[index] + 1].astype(np.int64)

    def _bounded(self, index: Ints, value: Ints) -> Ints:
        wrong = (value > _LARGEST_OFFSET) | (value < -_LARGEST_OFFSET)
        self._damaged[self._stream.program[index[wrong]]] = True
        return np.where(wrong, 0, value)

    def _factored(self, index: Ints, value: Ints) -> Ints:
        return self._bounded(index, self._bounded(index, value) * self._factor[index])

    def _registers(self) -> None:
        register, rule, operand = self._register, self._rule, self._stream.operand
        index = self._those(ops.OFFSET)
        register[index] = operand[index]
        offset = self._factored(index, self._first(index, leb128.unsigned))
        rule[index] = saved_at_cfa(offset)
        index = self._those(ops.RESTORE)
        register[index], rule[index] = operand[index], RESTORED

        index = self._those(*_NAME_A_REGISTER)
        register[index] = self._first(index, leb128.unsigned)
        rule[index] = saved(Saved.UNKNOWN)
        rule[self._those(ops.RESTORE_EXTENDED)] = RESTORED
        rule[self._those(ops.UNDEFINED)] = saved(Saved.UNDEFINED)
        rule[self._those(ops.SAME_VALUE)] = saved(Saved.SAME)
        for opcode, decode, kind, sign in _WITH_OFFSET:
            index = self._those(opcode)
            offset = sign * self._factored(index, self._second(index, decode))
            rule[index] = saved_at_cfa(offset) + (int(kind) - int(Saved.AT_CFA))
        index = self._those(ops.REGISTER)
        other = self._second(index, leb128.unsigned)
        known = (other >= 0) & (other < _REGISTERS)
        in_register = saved(Saved.IN_REGISTER) | np.where(known, other, 0) << 4
        rule[index] = np.where(known, in_register, saved(Saved.UNKNOWN))

    def _cfas(self) -> None:
        new, offset = self._cfa, self._offset
        index = self._those(ops.DEF_CFA, ops.DEF_CFA_SF, ops.DEF_CFA_REGISTER)
        self._sets_cfa[index] = True
        register = self._first(index, leb128.unsigned)
        known = (register >= 0) & (register < _REGISTERS)
        new[index] = np.where(known, register, cfa(Cfa.UNKNOWN))
        index = self._those(ops.DEF_CFA)
        offset[index] = self._bounded(index, self._second(index, leb128.unsigned))
        index = self._those(ops.DEF_CFA_SF)
        offset[index] = self._factored(index, self._second(index, leb128.signed))
        index = self._those(ops.DEF_CFA_OFFSET)
        offset[index] = self._bounded(index, self._first(index, leb128.unsigned))
        index = self._those(ops.DEF_CFA_OFFSET_SF)
        offset[index] = self._factored(index, self._first(index, leb128.signed))
        self._sets_offset[self._those(*_SET_AN_OFFSET)] = True

    def _blocks(self, index: Ints, begin: Ints) -> Iterator[tuple[int, bytes]]:
        """The expressions of the instructions at INDEX, whose lengths are at BEGIN."""
        raw = self._data.tobytes() if len(index) else b""
        for at, first in zip(index.tolist(), begin.tolist(), strict=True):
            yield at, raw[first + 1 : first + 1 + raw[first]]

    def _register_expressions(self) -> None:
        index = self._those(ops.EXPRESSION)
        known: dict[bytes, int] = {}
        for at, block in self._blocks(index, self._after_first(index)):
            if block not in known:
                known[block] = saved_by(block)
            self._rule[at] = known[block]

    def _cfa_expressions(self) -> None:
        index = self._those(ops.DEF_CFA_EXPRESSION)
        self._sets_cfa[index] = self._sets_offset[index] = True
        known: dict[bytes, tuple[int, int]] = {}
        for at, block in self._blocks(index, self._stream.at[index] + 1):
            if block not in known:
                known[block] = cfa_of(block)
            self._cfa[at], self._offset[at] = known[block]
