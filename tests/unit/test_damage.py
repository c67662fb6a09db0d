"""Damaged objects and types are refused with the documented error, whatever their bytes are."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.bpf import LoadError
from coral.bpf.loading import bcc, seal
from coral.bpf.loading.btf import Btf, DamagedBtfError, NoLayoutError
from tests.support import ROOT

SEAL_BYTES = 16
OBJECTS = sorted((ROOT / "bpf/programs").glob("*/*.bpf.o"))


def btf(types: bytes, strings: bytes = b"\0int\0char\0s\0a\0") -> bytes:
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return header + types + strings


def of_kind(
    kind: int, size_or_type: int, tail: tuple[int, ...] = (), *, name: int = 0, members: int = 0
) -> bytes:
    head = struct.pack("=III", name, kind << 24 | members, size_or_type)
    return head + struct.pack(f"={len(tail)}I", *tail)


# 1: int; 2: char; 3: an array of 4 chars; 4: struct s { int int; char a[4]; }; 5: a pointer to it;
# 6: typedef; 7: an array of 2 ints; 8 to 10: int a, in section .bss
GOOD = btf(
    of_kind(1, 4, (1 << 24 | 32,), name=1)
    + of_kind(1, 1, (1 << 24 | 8,), name=5)
    + of_kind(3, 0, (2, 1, 4))
    + of_kind(4, 8, (1, 1, 0, 12, 3, 32), name=10, members=2)
    + of_kind(2, 4)
    + of_kind(8, 4, name=12)
    + of_kind(3, 0, (1, 1, 2))
    + of_kind(14, 1, (1,), name=12)
    + of_kind(15, 4, (8, 0, 4), name=12, members=1)
)


def every_answer(types: Btf) -> Iterator[np.dtype[np.generic]]:
    for type_id in range(20):
        try:
            yield types.dtype(type_id)
        except ValueError:  # the only one that is allowed
            continue


def test_types_that_are_whole_are_read() -> None:
    types = Btf(GOOD)
    record = np.dtype([("int", "<i4"), ("a", "S4")])
    assert types.struct_dtype("s") == types.dtype(6) == record
    assert types.dtype(7) == np.dtype(("<i4", (2,)))
    assert types.variables["a"].type_id == 8
    assert len(list(every_answer(types))) == 7
    with pytest.raises(NoLayoutError, match="kind 2"):
        types.dtype(5)
    with pytest.raises(KeyError, match="no struct t"):
        types.struct_dtype("t")


@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6),
    st.integers(0, len(GOOD)),
)
def test_damaged_types_are_a_value_error_whatever_is_asked(
    changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(GOOD)
    for at, byte in changes:
        damaged[at] = byte
    for raw in (bytes(damaged), bytes(damaged[:length])):
        try:
            types = Btf(raw)
            list(every_answer(types))
            _ = types.variables
            types.struct_dtype("s")
        except (ValueError, KeyError):
            continue


@given(st.binary(max_size=300))
def test_arbitrary_types_are_a_value_error(types: bytes) -> None:
    try:
        read = Btf(btf(types))
        list(every_answer(read))
        _ = read.variables
    except ValueError:
        pass


@pytest.mark.parametrize(
    ("types", "asked"),
    [
        (of_kind(8, 1), 1),
        (of_kind(8, 2) + of_kind(9, 1), 1),
        (of_kind(4, 8, (1, 1, 0), members=1), 1),
        (of_kind(3, 0, (1, 1, 4)), 1),
        (of_kind(1, 3, (24,)), 1),
        (of_kind(1, 4, (32,)), 2),
        (b"".join(of_kind(3, 0, (n + 1, 1, 1)) for n in range(1, 5000)), 1),
    ],
    ids=["itself", "each-other", "struct", "array", "3-bytes", "beyond", "deep"],
)
def test_types_that_make_no_sense_are_damaged(types: bytes, asked: int) -> None:
    with pytest.raises(DamagedBtfError):
        Btf(btf(types)).dtype(asked)


# The seal of an object


@pytest.mark.parametrize("path", OBJECTS, ids=[path.name for path in OBJECTS])
def test_what_the_build_made_is_sealed(path: Path) -> None:
    data = path.read_bytes()
    elf = seal.opened(data)
    assert len(elf) == len(data) - SEAL_BYTES
    assert seal.sealed(elf) == seal.sealed(data) == data
    assert seal.opened(elf) == elf


@given(st.integers(0), st.integers(0, 7))
def test_a_bit_that_changed_breaks_the_seal(at: int, bit: int) -> None:
    data = bytearray(OBJECTS[0].read_bytes())
    data[at % (len(data) - SEAL_BYTES)] ^= 1 << bit
    with pytest.raises(seal.DamagedError, match="checksum"):
        seal.opened(bytes(data))


@given(st.integers(0))
def test_an_object_that_was_cut_is_damaged(length: int) -> None:
    data = OBJECTS[0].read_bytes()
    with pytest.raises(seal.DamagedError):
        seal.opened(data[: length % (len(data) - SEAL_BYTES)])


# bcc's compiler


def run_bcc(directory: Path, body: str, timeout_s: float) -> object:
    """The answer of the compiler's process if the constructor of BPF runs BODY."""
    (directory / "bcc").mkdir()
    (directory / "bcc/__init__.py").write_text(f"import signal\ndef BPF(text, cflags):\n {body}\n")
    job = {"text": "", "flags": [], "functions": [], "paths": [str(directory)]}
    return bcc._run(job, "compiling", timeout_s)


def test_a_compiler_that_hangs_is_killed(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"compiling: it was not done in 0.5 s, and was killed"):
        run_bcc(tmp_path, "signal.pause()", 0.5)


def test_a_compiler_that_ends_in_time_answers(tmp_path: Path) -> None:
    assert run_bcc(tmp_path, "pass", 20) == {}
