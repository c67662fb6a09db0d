"""Reads the elements of a hash map through a program that user space runs itself, a batch of keys
at a time, on kernels that refuse iterators over maps."""

from __future__ import annotations

import ctypes
import mmap
from ctypes import byref, c_int, c_size_t, c_uint32, c_void_p
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coral.bpf.buffers.maps import HashMap
from coral.bpf.libbpf import BpfError, call


class _RunOptions(ctypes.Structure):
    """struct bpf_test_run_opts of libbpf, with the members of all versions."""

    _fields_ = (
        ("size", c_size_t),
        ("data_in", c_void_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_void_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("return_value", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


def run_program(program_fd: int) -> None:
    """Runs a `syscall` program once, in this thread. Raises `BpfError`."""
    options = _RunOptions(ctypes.sizeof(_RunOptions))
    error = -call("bpf_prog_test_run_opts", program_fd, byref(options))
    if error:
        raise BpfError("running a program", error)


class ElementReader:
    """Reads the elements of the map KEYS as records that a program makes of them.

    RECORDS_FD is a mappable array map of RECORDS_COUNT records, each of which begins with the key
    of an element, of 64 bits and never 0. The program replaces the records up to the first key of 0
    by those of the keys, and sets a key to 0 if it has no record. Raises `BpfError`.
    """

    def __init__(
        self,
        program_fd: int,
        keys: HashMap,
        records_fd: int,
        records_count: int,
        record: np.dtype[Any],
    ) -> None:
        self._program_fd, self._keys = program_fd, keys
        try:
            self._memory = mmap.mmap(records_fd, records_count * record.itemsize)
        except OSError as error:
            raise BpfError("mapping a map", error.errno or 0) from error
        self._record = record

    def read(self) -> NDArray[Any]:
        """The records, of shape (n,). Raises `BpfError`."""
        room = np.frombuffer(self._memory, self._record)
        key = (self._record.names or ())[0]
        keys = self._keys.read_keys()
        read = np.empty(len(keys), self._record)
        as_bytes = f"V{self._record.itemsize}"  # numpy copies structures field by field
        for begin in range(0, len(keys), len(room)):
            part = keys[begin : begin + len(room)]
            room[key][: len(part)] = part
            room[key][len(part) :][:1] = 0
            run_program(self._program_fd)
            read.view(as_bytes)[begin : begin + len(part)] = room.view(as_bytes)[: len(part)]
        gone = read[key] == 0
        return read[~gone] if gone.any() else read

    def close(self) -> None:
        """Unmaps the records. Safe to call twice."""
        self._memory.close()
