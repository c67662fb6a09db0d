"""What is read of the BTF of objects that clang makes."""

from __future__ import annotations

import ctypes
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coral.bpf.loading.btf import Btf, NoLayoutError

SOURCE = """\
enum loss { LOSS_BUFFER_FULL, LOSS_MAP_FULL, LOSS_BUSY = 7, LOSSES };
enum balance { BELOW = -3, ABOVE = 2 };
struct record {
    enum loss loss;
    enum balance balance;
};
struct record record;
struct packed {
    int whole;
    unsigned int low : 5, high : 27;
};
struct packed packed;
struct around {
    struct packed packed[2];
};
struct around around;
struct large {
    char room[1 << 22];
    int last;
};
struct large *large;
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The BTF of SOURCE."""
    directory = tmp_path_factory.mktemp("btf")
    (directory / "types.c").write_text(SOURCE)
    flags = ("-target", "bpf", "-g", "-O2", "-c")
    subprocess.run(["clang", *flags, "types.c", "-o", "types.o"], cwd=directory, check=True)
    return raw_btf(directory / "types.o")


@pytest.fixture(scope="module")
def btf(raw: bytes) -> Btf:
    return Btf(raw)


def raw_btf(path: Path) -> bytes:
    """The BTF of an object, found by libbpf."""
    library = ctypes.CDLL("libbpf.so.1")
    library.btf__parse.restype = library.btf__raw_data.restype = ctypes.c_void_p
    btf = ctypes.c_void_p(library.btf__parse(bytes(path), None))
    size = ctypes.c_uint32()
    raw = library.btf__raw_data(btf, ctypes.byref(size))
    try:
        return ctypes.string_at(raw, size.value)
    finally:
        library.btf__free(btf)


def test_an_enum_has_its_names_and_values(btf: Btf) -> None:
    assert dict(btf.enum("loss")) == {
        "LOSS_BUFFER_FULL": 0,
        "LOSS_MAP_FULL": 1,
        "LOSS_BUSY": 7,
        "LOSSES": 8,
    }
    assert list(btf.enum("balance").items()) == [("BELOW", -3), ("ABOVE", 2)]
    with pytest.raises(KeyError, match="no enum record"):
        btf.enum("record")


@pytest.mark.parametrize("name", ["packed", "around"])
def test_a_bit_field_has_no_layout_instead_of_a_wrong_one(btf: Btf, name: str) -> None:
    with pytest.raises(NoLayoutError, match="'low' of struct 'packed' is a bit field"):
        btf.struct_dtype(name)


def test_a_member_far_behind_is_where_it_is(btf: Btf) -> None:
    large = btf.struct_dtype("large")
    assert large.fields is not None
    assert large.fields["last"][1] == 1 << 22


def test_a_field_of_an_enum_with_negative_values_is_signed(btf: Btf) -> None:
    record = btf.struct_dtype("record")
    assert record == np.dtype([("loss", "<u4"), ("balance", "<i4")])


class _SlowBtf(Btf):
    """Its first layout is not made before a second one was asked for, or some time has passed."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw)
        self.begun, self.asked = threading.Event(), threading.Event()

    def _struct(self, *arguments: Any) -> np.dtype[np.generic]:
        self.begun.set()
        self.asked.wait(0.2)
        return super()._struct(*arguments)


def test_two_threads_ask_for_one_layout_at_once(btf: Btf, raw: bytes) -> None:
    slow = _SlowBtf(raw)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow.struct_dtype, "record")
        assert slow.begun.wait(10)
        assert slow.struct_dtype("record") == btf.struct_dtype("record")
        slow.asked.set()
        assert first.result() == btf.struct_dtype("record")
