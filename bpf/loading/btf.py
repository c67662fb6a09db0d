"""Reads the BTF of an object: numpy dtypes of C structs, and the locations of global variables.

The C struct is the one definition of every record; the Python side derives its layout from here,
so the two cannot drift. Format: the kernel's Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final

import numpy as np

_MAGIC: Final = 0xEB9F
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FWD, _TYPEDEF = 1, 2, 3, 4, 5, 6, 7, 8
_VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO, _VAR, _DATASEC = 9, 10, 11, 12, 13, 14, 15
_FLOAT, _DECL_TAG, _TYPE_TAG, _ENUM64 = 16, 17, 18, 19
_TRANSPARENT: Final = {_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG, _VAR}
_INT_SIGNED: Final = 1
_INT_BOOL: Final = 4

# Bytes after a type's 12-byte head: a fixed part, and a part for each member.
_TAIL_BYTES: Final = {
    _INT: (4, 0),
    _ARRAY: (12, 0),
    _STRUCT: (0, 12),
    _UNION: (0, 12),
    _ENUM: (0, 8),
    _FUNC_PROTO: (0, 8),
    _VAR: (4, 0),
    _DATASEC: (0, 12),
    _DECL_TAG: (4, 0),
    _ENUM64: (0, 12),
}


@dataclass(frozen=True, slots=True)
class _Type:
    name: str
    kind: int
    size_or_type: int
    tail: bytes
    flag: bool = False  # of an enum: its values are signed; of a struct: it has bit fields

    def members(self) -> list[tuple[int, int, int]]:
        """Three words for each member: name offset, type and bit offset for a struct; type, offset
        and size for a section."""
        return list(struct.iter_unpack("=III", self.tail))


@dataclass(frozen=True, slots=True)
class Variable:
    """A global variable: its section, its offset there in bytes, and the id of its type."""

    section: str
    offset: int
    type_id: int


class NoLayoutError(ValueError):
    """A type that a record cannot contain: a pointer, a function, a union, a bit field."""


class DamagedBtfError(ValueError):
    """The BTF is truncated, or no compiler would write it."""

    def __init__(self) -> None:
        super().__init__("the BTF is damaged or truncated")


class Btf:
    """The types of one object, from the raw bytes of its BTF. All methods raise `DamagedBtfError`
    for invalid bytes. Safe to use by several threads."""

    def __init__(self, raw: bytes) -> None:
        try:
            magic, _, _, header_bytes, type_off, type_bytes, str_off, str_bytes = (
                struct.unpack_from("=HBBIIIII", raw)
            )
        except struct.error as error:
            raise DamagedBtfError from error
        strings_end = header_bytes + str_off + str_bytes
        end = header_bytes + type_off + type_bytes
        if magic != _MAGIC or len(raw) < max(strings_end, end):
            raise DamagedBtfError
        self._strings = raw[header_bytes + str_off : strings_end]
        self._types = [_Type("void", 0, 0, b"")]
        self._dtypes: dict[int, np.dtype[np.generic] | None] = {}  # None: in progress
        self._lock = threading.RLock()  # held while layouts are made
        position = header_bytes + type_off
        while position < end:
            position = self._read_type(raw, position, end)

    def _read_type(self, raw: bytes, position: int, end: int) -> int:
        """Reads a type; the position of the next one."""
        if position + 12 > end:
            raise DamagedBtfError
        name_off, info, size_or_type = struct.unpack_from("=III", raw, position)
        kind, members = info >> 24 & 0x1F, info & 0xFFFF
        fixed, each = _TAIL_BYTES.get(kind, (0, 0))
        tail_end: int = position + 12 + fixed + each * members
        if tail_end > end:
            raise DamagedBtfError
        tail = raw[position + 12 : tail_end]
        flag = bool(info >> 31)
        self._types.append(_Type(self._name(name_off), kind, size_or_type, tail, flag))
        return tail_end

    def _name(self, offset: int) -> str:
        try:
            return self._strings[offset : self._strings.index(b"\0", offset)].decode()
        except ValueError as error:
            raise DamagedBtfError from error

    def _type(self, type_id: int) -> _Type:
        """A type without its typedefs and qualifiers."""
        for _ in self._types:
            if type_id >= len(self._types):
                break
            btf_type = self._types[type_id]
            if btf_type.kind not in _TRANSPARENT:
                return btf_type
            type_id = btf_type.size_or_type
        raise DamagedBtfError

    def dtype(self, type_id: int) -> np.dtype[np.generic]:
        """The numpy layout of a type: integers, enums, floats, bools, structs, and arrays of them;
        an array of `char` is a byte string. Raises `NoLayoutError` for other types."""
        with self._lock:
            return self._dtype_of(type_id)

    def _dtype_of(self, type_id: int) -> np.dtype[np.generic]:
        if type_id not in self._dtypes:
            self._dtypes[type_id] = None
            try:
                self._dtypes[type_id] = self._dtype(self._type(type_id))
            except (DamagedBtfError, NoLayoutError):
                del self._dtypes[type_id]
                raise
            except (TypeError, ValueError, RecursionError) as error:  # fields outside, odd sizes
                del self._dtypes[type_id]
                raise DamagedBtfError from error
        dtype = self._dtypes[type_id]
        if dtype is None:  # a type that contains itself
            raise DamagedBtfError
        return dtype

    def _dtype(  # noqa: PLR0911  one for each kind
        self, btf_type: _Type
    ) -> np.dtype[np.generic]:
        kind = btf_type.kind
        if kind == _INT:
            (described,) = struct.unpack("=I", btf_type.tail)
            encoding, bits = described >> 24 & 0xF, described & 0xFF
            if bits != 8 * btf_type.size_or_type:
                raise NoLayoutError(f"{btf_type.name!r} of {bits} bits: records have whole bytes")
            if encoding & _INT_BOOL:
                return np.dtype(np.bool_)
            return np.dtype(f"{'i' if encoding & _INT_SIGNED else 'u'}{btf_type.size_or_type}")
        if kind in (_ENUM, _ENUM64):
            return np.dtype(f"{'i' if self._is_signed(btf_type) else 'u'}{btf_type.size_or_type}")
        if kind == _FLOAT:
            return np.dtype(f"f{btf_type.size_or_type}")
        if kind == _ARRAY:
            element, _, length = struct.unpack("=III", btf_type.tail)
            if self._is_char(element):
                return np.dtype(f"S{length}")
            return np.dtype((self.dtype(element), (length,)))
        if kind == _STRUCT:
            return self._struct(btf_type)
        raise NoLayoutError(f"BTF type {btf_type.name!r} (kind {kind}) has no record layout")

    def _struct(self, btf_type: _Type) -> np.dtype[np.generic]:
        members = btf_type.members()
        names = [self._name(name_off) for name_off, _, _ in members]
        offsets = [bits for _, _, bits in members]
        if btf_type.flag:  # each has its size in bits in the highest byte, 0 for no bit field
            for name, bits in zip(names, offsets, strict=True):
                if bits >> 24:
                    raise NoLayoutError(
                        f"{name!r} of struct {btf_type.name!r} is a bit field: records have whole "
                        "bytes"
                    )
        return np.dtype(
            {
                "names": names,
                "formats": [self.dtype(member) for _, member, _ in members],
                "offsets": [bits // 8 for bits in offsets],
                "itemsize": btf_type.size_or_type,
            }
        )

    def _is_char(self, type_id: int) -> bool:
        btf_type = self._type(type_id)
        return btf_type.kind == _INT and btf_type.name == "char"

    def struct_dtype(self, name: str) -> np.dtype[np.generic]:
        """The layout of `struct NAME`. Raises KeyError if the object has no such struct."""
        for type_id, btf_type in enumerate(self._types):
            if btf_type.kind == _STRUCT and btf_type.name == name:
                return self.dtype(type_id)
        raise KeyError(f"the object's BTF has no struct {name}")

    def enum(self, name: str) -> Mapping[str, int]:
        """The names and values of `enum NAME`, in the order of the source. KeyError if the object
        has no such enum."""
        for btf_type in self._types:
            if btf_type.kind in (_ENUM, _ENUM64) and btf_type.name == name:
                return MappingProxyType(dict(self._enumerators(btf_type)))
        raise KeyError(f"the object's BTF has no enum {name}")

    def _enumerators(self, btf_type: _Type) -> Iterator[tuple[str, int]]:
        if btf_type.kind == _ENUM:  # a C enumerator is an int, whether or not the flag says so
            for name_off, value in struct.iter_unpack("=Ii", btf_type.tail):
                yield self._name(name_off), value
            return
        for name_off, low, high in struct.iter_unpack("=III", btf_type.tail):
            value = high << 32 | low
            yield self._name(name_off), value - (value >> 63 << 64 if btf_type.flag else 0)

    def _is_signed(self, btf_type: _Type) -> bool:
        """Whether an enum has negative values; clang before 15 does not set the flag."""
        return btf_type.flag or any(value < 0 for _, value in self._enumerators(btf_type))

    @cached_property
    def variables(self) -> dict[str, Variable]:
        """The global variables by name."""
        found = {}
        for section in self._types:
            if section.kind != _DATASEC or section.name in (".maps", "license"):
                continue
            for type_id, offset, _ in section.members():
                if type_id >= len(self._types):
                    raise DamagedBtfError
                found[self._types[type_id].name] = Variable(section.name, offset, type_id)
        return found
