"""The few DWARF expressions that unwind tables really use, recognised by their form.

Expressions of other forms are not evaluated: the frames that need one end the stack. Operations:
DWARF 5, section 2.5.
"""

from __future__ import annotations

from typing import Final

from coral.collectors.unwinding.rules import Cfa, Saved, cfa, saved

_STUB_BYTES: Final = 16
_DEREF: Final = 0x06
_PLUS_UCONST: Final = 0x23
_BREG0: Final = 0x70
_BREG31: Final = 0x8F
_LIT0: Final = 0x30
# What linkers write for .plt: rsp + 8 + (((rip + 0) & 15) >= k) * 8, k in its eighth byte.
_PLT_HEAD: Final = bytes([0x77, 8, 0x80, 0, 0x3F, 0x1A])
_PLT_TAIL: Final = bytes([0x2A, 0x33, 0x24, 0x22])
_LARGEST: Final = 1 << 31

Address = tuple[int, int, int]  # register, offset, bytes of the expression that are left


def cfa_of(block: bytes) -> tuple[int, int]:
    """`cfa()` and the offset (with an addend in the upper half) of a CFA expression."""
    if len(block) == len(_PLT_HEAD) + 1 + len(_PLT_TAIL):
        boundary = block[len(_PLT_HEAD)] - _LIT0
        if (
            block.startswith(_PLT_HEAD)
            and block.endswith(_PLT_TAIL)
            and 0 <= boundary < _STUB_BYTES
        ):
            return cfa(Cfa.PLT), boundary
    address = _register_plus_offset(block)
    if address is None:
        return cfa(Cfa.UNKNOWN), 0
    register, offset, left = address
    rest = block[len(block) - left :]
    if not rest:
        return cfa(Cfa.REGISTER, register), offset
    addend = _addend(rest[1:]) if rest[0] == _DEREF else None
    if addend is None:
        return cfa(Cfa.UNKNOWN), 0
    return cfa(Cfa.DEREFERENCED, register), (addend << 32) + offset


def saved_by(block: bytes) -> int:
    """The rule of a register that is saved at the address that an expression gives."""
    address = _register_plus_offset(block)
    if address is None or address[2]:
        return saved(Saved.UNKNOWN)
    return saved(Saved.AT_REGISTER, register=address[0], offset=address[1])


def _register_plus_offset(block: bytes) -> Address | None:
    if len(block) < 2 or not _BREG0 <= block[0] <= _BREG31:  # noqa: PLR2004
        return None
    value, size = _number(block[1:], is_signed=True)
    if size == 0 or not -_LARGEST <= value < _LARGEST:
        return None
    return block[0] - _BREG0, value, len(block) - 1 - size


def _addend(block: bytes) -> int | None:
    if not block:
        return 0
    if block[0] == _PLUS_UCONST:
        value, size = _number(block[1:], is_signed=False)
        if size and size == len(block) - 1 and value < _LARGEST:
            return value
    return None


def _number(block: bytes, *, is_signed: bool) -> tuple[int, int]:
    """A LEB128 number and its bytes; 0 bytes where it does not end."""
    value = 0
    for at, byte in enumerate(block):
        value |= (byte & 0x7F) << (7 * at)
        if byte < 0x80:  # noqa: PLR2004
            bits = 7 * (at + 1)
            if is_signed and byte & 0x40:
                value -= 1 << bits
            return value, at + 1
    return 0, 0
