"""Definitions of maps, as an object declares them, and maps made of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from ctypes import byref, c_size_t, c_uint32, c_uint64
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np

from coral.bpf.buffers.maps import HashMap
from coral.bpf.libbpf import LoadError, call, call_pointer, capture_log, possible_cpus

# Kinds of maps, as in enum bpf_map_type.
ARRAY: Final = 2
PERF_EVENT_ARRAY: Final = 4
RINGBUF: Final = 27

_NAME_BYTES: Final = 15


class _MapOptions(ctypes.Structure):
    """struct bpf_map_create_opts of libbpf."""

    _fields_ = (
        ("size", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
        ("map_extra", c_uint64),
        ("numa_node", c_uint32),
        ("map_ifindex", c_uint32),
    )


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """What the kernel needs to know of a map. Types are ids of the object's BTF, 0 for none.
    `inner` is the prototype of the maps in a map of maps."""

    name: str
    kind: int
    key_bytes: int
    value_bytes: int
    entries: int  # of a ring buffer: bytes
    flags: int
    key_type: int = 0
    value_type: int = 0
    inner: MapDefinition | None = None

    @classmethod
    def of(cls, name: str, bpf_map: int) -> MapDefinition:
        """The definition of a libbpf map that is not loaded."""
        kind, entries = call("bpf_map__type", bpf_map), call("bpf_map__max_entries", bpf_map)
        if kind == PERF_EVENT_ARRAY and not entries:
            entries = possible_cpus()
        if kind == RINGBUF:
            entries = max(entries, mmap.PAGESIZE)
        inner = call_pointer("bpf_map__inner_map", bpf_map)
        return cls(
            name,
            kind,
            call("bpf_map__key_size", bpf_map),
            call("bpf_map__value_size", bpf_map),
            entries,
            call("bpf_map__map_flags", bpf_map),
            call("bpf_map__btf_key_type_id", bpf_map),
            call("bpf_map__btf_value_type_id", bpf_map),
            cls.of(name, inner) if inner else None,
        )

    def create(self, inner_fd: int = 0) -> int:
        """The descriptor of a new map; INNER_FD is that of a map like `inner`. Raises
        `LoadError`."""
        options = _MapOptions(
            size=ctypes.sizeof(_MapOptions), map_flags=self.flags, inner_map_fd=inner_fd
        )
        with capture_log() as said:
            fd = call(
                "bpf_map_create",
                self.kind,
                self.name[:_NAME_BYTES].encode(),
                self.key_bytes,
                self.value_bytes,
                self.entries,
                byref(options),
            )
        if fd < 0:
            raise LoadError(f"making map {self.name}", -fd, said())
        return fd

    def changed(self, entries: int | None = None, flags: int | None = None) -> MapDefinition:
        """The same with other ENTRIES and FLAGS; of a map of maps, with such a prototype."""
        if self.inner:
            return replace(self, inner=self.inner.changed(entries, flags))
        return replace(
            self,
            entries=self.entries if entries is None else entries,
            flags=self.flags if flags is None else flags,
        )


class InnerMap(HashMap):
    """A map for a slot of a map of maps. It owns its descriptor; installed, the map lives on in
    its slot after `close`."""

    def __init__(
        self,
        definition: MapDefinition,
        dtype: Callable[[int], np.dtype[Any]],
        *,
        batches: bool,
    ) -> None:
        self.kind, self.entries = definition.kind, definition.entries  # of a ring buffer: bytes
        dtypes = [
            dtype(type_) if type_ else np.dtype("V0")  # a ring buffer has no keys
            for type_ in (definition.key_type, definition.value_type)
        ]
        fd = definition.create()  # which fails last, so that nobody has to close it
        super().__init__(definition.name, fd, definition.kind, *dtypes, batches=batches)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def memory_bytes(self) -> int:
        """See `HashMap.memory_bytes`. Kernels before 6.4 leave out the memory of ring buffers."""
        of_ring = self.entries if self.kind == RINGBUF else 0
        return max(super().memory_bytes, of_ring)

    def close(self) -> None:
        """Closes the descriptor. Safe to call twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
