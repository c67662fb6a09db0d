"""What is read of the BTF of objects that clang makes."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from coral.bpf.loading.btf import Btf

SOURCE = """\
enum loss { LOSS_BUFFER_FULL, LOSS_MAP_FULL, LOSS_BUSY = 7, LOSSES };
enum balance { BELOW = -3, ABOVE = 2 };
struct record {
    enum loss loss;
    enum balance balance;
};
struct record record;
"""


@pytest.fixture(scope="module")
def btf(tmp_path_factory: pytest.TempPathFactory) -> Btf:
    directory = tmp_path_factory.mktemp("btf")
    (directory / "types.c").write_text(SOURCE)
    flags = ("-target", "bpf", "-g", "-O2", "-c")
    subprocess.run(["clang", *flags, "types.c", "-o", "types.o"], cwd=directory, check=True)
    return Btf(raw_btf(directory / "types.o"))


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


def test_a_field_of_an_enum_with_negative_values_is_signed(btf: Btf) -> None:
    record = btf.struct_dtype("record")
    assert record == np.dtype([("loss", "<u4"), ("balance", "<i4")])
