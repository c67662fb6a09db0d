"""Iterators: programs that walk through the kernel's own objects each time user space reads. What a
program writes on the way is what the reader gets."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from ctypes import byref, c_size_t, c_uint32
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.libbpf import BpfError, call

_TRACE_ITER: Final = 28  # of enum bpf_attach_type
_READ_BYTES: Final = 1 << 18


class _LinkInfo(ctypes.Structure):
    """union bpf_iter_link_info, of which only the map is used."""

    _fields_ = (("map_fd", c_uint32), ("rest", c_uint32 * 7))


class _LinkOptions(ctypes.Structure):
    """struct bpf_link_create_opts of libbpf, with the members used here."""

    _fields_ = (
        ("size", c_size_t),
        ("flags", c_uint32),
        ("info", ctypes.POINTER(_LinkInfo)),
        ("info_bytes", c_uint32),
    )


class Walk:
    """The iterator of the loaded program PROGRAM_FD, through the elements of a map if MAP_FD is
    given. Raises `BpfError`."""

    def __init__(self, program_fd: int, map_fd: int | None, record: np.dtype[Any]) -> None:
        self._record = record
        options = None
        if map_fd is not None:
            info = _LinkInfo(map_fd=map_fd)
            options = byref(
                _LinkOptions(
                    ctypes.sizeof(_LinkOptions),
                    0,
                    ctypes.pointer(info),
                    ctypes.sizeof(info),
                )
            )
        self._link = call("bpf_link_create", program_fd, 0, _TRACE_ITER, options)
        if self._link < 0:
            raise BpfError("attaching a walk", -self._link)

    def read(self) -> NDArray[Any]:
        """Walks once: the records that the program writes, of shape (n,). Raises `BpfError`."""
        fd = call("bpf_iter_create", self._link)
        if fd < 0:
            raise BpfError("beginning a walk", -fd)
        try:
            return np.frombuffer(bytearray(b"".join(_parts(fd))), self._record)
        except OSError as error:
            raise BpfError("walking", error.errno or 0) from error
        finally:
            os.close(fd)

    def close(self) -> None:
        """Detaches the program. Safe to call twice."""
        link, self._link = self._link, -1
        if link >= 0:
            os.close(link)


def _parts(fd: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(fd, _READ_BYTES)
        except BlockingIOError:  # a million objects without a record: the walk goes on from there
            continue
        if not part:
            return
        yield part
