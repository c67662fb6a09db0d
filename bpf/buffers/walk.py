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

from coral.bpf.libbpf import BpfError, call, call_pointer, last_errno

_READ_BYTES: Final = 1 << 18


class _LinkInfo(ctypes.Structure):
    """union bpf_iter_link_info, of which only the map is used."""

    _fields_ = (("map_fd", c_uint32), ("rest", c_uint32 * 7))


class _AttachOptions(ctypes.Structure):
    """struct bpf_iter_attach_opts of libbpf."""

    _fields_ = (
        ("size", c_size_t),
        ("link_info", ctypes.POINTER(_LinkInfo)),
        ("link_info_bytes", c_uint32),
    )


class Walk:
    """The iterator of one loaded program, through the elements of a map if MAP_FD is given."""

    def __init__(self, program: int, map_fd: int | None, record: np.dtype[Any]) -> None:
        self._record = record
        options = None
        if map_fd is not None:
            info = _LinkInfo(map_fd=map_fd)
            options = byref(
                _AttachOptions(
                    ctypes.sizeof(_AttachOptions), ctypes.pointer(info), ctypes.sizeof(info)
                )
            )
        self._link = call_pointer("bpf_program__attach_iter", program, options)
        if not self._link:
            raise BpfError("attaching a walk", last_errno())

    def read(self) -> NDArray[Any]:
        """Walks once: the records that the program writes, of shape (n,). Raises `BpfError`."""
        fd = call("bpf_iter_create", call("bpf_link__fd", self._link))
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
        if self._link:
            call("bpf_link__destroy", self._link)
            self._link = 0


def _parts(fd: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(fd, _READ_BYTES)
        except BlockingIOError:  # a million objects without a record: the walk goes on from there
            continue
        if not part:
            return
        yield part
