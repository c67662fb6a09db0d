"""Maps read in bulk into numpy: in batches if the kernel has them, key by key if not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from ctypes import byref, c_uint32
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf.libbpf import BpfError, call, possible_cpus

_PERCPU_TYPES: Final = {5, 6, 10, 21}  # BPF_MAP_TYPE_{,LRU_}PERCPU_HASH, PERCPU_ARRAY, CGROUP
# Whose memory is allocated with the map: BPF_MAP_TYPE_ARRAY, PERF_EVENT_ARRAY, PERCPU_ARRAY,
# ARRAY_OF_MAPS, RINGBUF; and BPF_MAP_TYPE_{,PERCPU_,LRU_,LRU_PERCPU_}HASH, with a flag not.
_WHOLE_TYPES: Final = {2, 4, 6, 12, 27}
_HASH_TYPES: Final = {1, 5, 9, 10}
_F_NO_PREALLOC: Final = 1
_FDINFO_BYTES: Final = 4096
_BATCH_KEYS: Final = 4096
_UNSUPPORTED: Final = {errno.EINVAL, errno.ENOTSUP, 524}  # 524: the kernel's own ENOTSUPP


class _NoBatchesError(Exception):
    """The kernel cannot read this map in batches."""


class HashMap:
    """A hash or array map of a loaded object.

    `key_dtype` and `value_dtype` come from the object's BTF. Values of a per-CPU map have one more
    axis, whose length is the number of possible CPUs; each CPU's value is padded to 8 bytes.
    """

    def __init__(
        self,
        name: str,
        fd: int,
        map_type: int,
        key_dtype: np.dtype[Any],
        value_dtype: np.dtype[Any],
        *,
        batches: bool = True,
    ) -> None:
        self.name = name
        self.fd = fd
        self.key_dtype = key_dtype
        self.value_dtype = value_dtype
        self.per_cpu = map_type in _PERCPU_TYPES
        self.batches = batches
        self._memory = MapMemory()
        self._slot = value_dtype
        self._cpus = 1
        if self.per_cpu:
            self._cpus = possible_cpus()
            padded_bytes = -(-value_dtype.itemsize // 8) * 8
            self._slot = np.dtype(
                {"names": ["v"], "formats": [value_dtype], "offsets": [0], "itemsize": padded_bytes}
            )

    @property
    def memory_bytes(self) -> int:
        """What the kernel charges for the map, including the elements allocated so far."""
        return self._memory.read(self.fd)

    def read(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Every element: keys of shape (n,), values of shape (n,), or (n, CPUs) for a per-CPU map.

        Elements added or removed during the read may be missing; every other one appears once.
        """
        return self._read("bpf_map_lookup_batch", self._read_each)

    def read_batches(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Like `read`, some thousand elements at a time if the kernel can do that: for maps that
        are too large to be in memory twice."""
        if self.batches:
            try:
                for keys, slots in self._read_batches("bpf_map_lookup_batch"):
                    yield keys, self._values(slots)
                return
            except _NoBatchesError:
                self.batches = False
        yield self._read_each()

    def read_and_delete(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Like `read`, and removes what it returns. What a running program adds to an element
        between reading and removal is lost: do not use it where every count matters."""
        return self._read("bpf_map_lookup_and_delete_batch", self._read_and_delete_each)

    def read_keys(self) -> NDArray[Any]:
        """The key of every element, of shape (n,): like `read`, in half the time."""
        if self.batches:
            try:
                parts = [keys for keys, _ in self._read_batches("bpf_map_lookup_batch")]
                return np.concatenate(parts)
            except _NoBatchesError:
                self.batches = False
        keys = self._keys()
        return np.concatenate(keys) if keys else np.empty(0, self.key_dtype)

    def _read(
        self, function: str, fallback: Callable[[], tuple[NDArray[Any], NDArray[Any]]]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        if self.batches:
            try:
                keys, slots = zip(*self._read_batches(function), strict=True)
                return np.concatenate(keys), self._values(np.concatenate(slots))
            except _NoBatchesError:
                self.batches = False
        return fallback()

    def _read_batches(self, function: str) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Keys and values, at least once. Raises `_NoBatchesError` if the kernel has no batches."""
        cursor = np.zeros(max(8, self.key_dtype.itemsize), np.uint8)
        batch_keys, first = _BATCH_KEYS, True
        while True:
            keys, values = self._buffers(batch_keys)
            count = c_uint32(batch_keys)
            error = -call(
                function,
                self.fd,
                None if first else cursor.ctypes.data,
                cursor.ctypes.data,
                keys.ctypes.data,
                values.ctypes.data,
                byref(count),
                None,
            )
            if error == errno.ENOSPC:  # one bucket holds more than the buffer
                batch_keys *= 2
                continue
            if error in _UNSUPPORTED and first:
                raise _NoBatchesError
            if error not in (0, errno.ENOENT):
                raise BpfError(f"reading map {self.name}", error)
            yield keys[: count.value], values[: count.value]
            first = False
            if error == errno.ENOENT:
                return

    def _buffers(self, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        # An empty array of values costs no memory until the kernel writes into it.
        return np.empty(count, self.key_dtype), np.empty((count, self._cpus), self._slot)

    def _values(self, slots: NDArray[Any]) -> NDArray[Any]:
        return slots["v"] if self.per_cpu else slots[:, 0]

    def _read_each(self) -> tuple[NDArray[Any], NDArray[Any]]:
        keys_read, values_read = [], []
        for key in self._keys():
            _, value = self._buffers(1)
            error = -call("bpf_map_lookup_elem", self.fd, key.ctypes.data, value.ctypes.data)
            if error == errno.ENOENT:  # removed meanwhile
                continue
            if error:
                raise BpfError(f"reading map {self.name}", error)
            keys_read.append(key)
            values_read.append(value)
        if not keys_read:
            keys, values = self._buffers(0)
            return keys, self._values(values)
        return np.concatenate(keys_read), self._values(np.concatenate(values_read))

    def _read_and_delete_each(self) -> tuple[NDArray[Any], NDArray[Any]]:
        keys, values = self._read_each()
        self.delete(keys)
        return keys, values

    def _keys(self) -> list[NDArray[Any]]:
        # Collected first, because an iteration restarts if its current key is removed.
        keys: list[NDArray[Any]] = []
        seen: set[bytes] = set()
        current, revisited = None, 0
        while revisited <= len(seen):
            following = np.empty(1, self.key_dtype)
            pointer = None if current is None else current.ctypes.data
            error = -call("bpf_map_get_next_key", self.fd, pointer, following.ctypes.data)
            if error == errno.ENOENT:
                break
            if error:
                raise BpfError(f"reading map {self.name}", error)
            if following.tobytes() in seen:
                revisited += 1
            else:
                seen.add(following.tobytes())
                keys.append(following)
            current = following
        return keys

    def read_one(self, key: object) -> NDArray[Any] | None:
        """The value of one key, of shape (), or (CPUs,) for a per-CPU map; None if absent."""
        packed = np.array([key], self.key_dtype)
        _, value = self._buffers(1)
        error = -call("bpf_map_lookup_elem", self.fd, packed.ctypes.data, value.ctypes.data)
        if error == errno.ENOENT:
            return None
        if error:
            raise BpfError(f"reading map {self.name}", error)
        found: NDArray[Any] = self._values(value)[0]
        return found

    def write(self, key: object, value: object) -> None:
        """Sets one element of a map that is not per CPU. Raises `BpfError`: E2BIG if it is full."""
        packed_key = np.array([key], self.key_dtype)
        packed_value = np.array([value], self.value_dtype)
        error = -call(
            "bpf_map_update_elem", self.fd, packed_key.ctypes.data, packed_value.ctypes.data, 0
        )
        if error:
            raise BpfError(f"writing map {self.name}", error)

    def write_many(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Sets elements of a map that is not per CPU: KEYS and VALUES of shape (n,). Raises
        `BpfError`."""
        packed_keys = np.ascontiguousarray(keys, self.key_dtype)
        packed_values = np.ascontiguousarray(values, self.value_dtype)
        if self.batches and len(packed_keys):
            error = -call(
                "bpf_map_update_batch",
                self.fd,
                packed_keys.ctypes.data,
                packed_values.ctypes.data,
                byref(c_uint32(len(packed_keys))),
                None,
            )
            if not error:
                return
            if error not in _UNSUPPORTED:
                raise BpfError(f"writing map {self.name}", error)
        for key, value in zip(packed_keys, packed_values, strict=True):
            self.write(key, value)

    def delete(self, keys: NDArray[Any] | Sequence[object]) -> None:
        """Removes elements; absent keys are ignored."""
        packed = np.ascontiguousarray(keys, self.key_dtype)
        for key in packed.reshape(-1, 1):
            error = -call("bpf_map_delete_elem", self.fd, key.ctypes.data)
            if error not in (0, errno.ENOENT):
                raise BpfError(f"deleting from map {self.name}", error)


class MapMemory:
    """What the kernel charges for one map: read again each time where that can change, otherwise
    once."""

    def __init__(self) -> None:
        self._constant: int | None = None

    def read(self, fd: int) -> int:
        """The number of bytes; FD is the map's descriptor. Raises OSError."""
        if self._constant is not None:
            return self._constant
        told = fdinfo(fd)
        charged = told.get("memlock", 0)
        map_type, flags = told.get("map_type", 0), told.get("map_flags", 0)
        if map_type in _WHOLE_TYPES or (map_type in _HASH_TYPES and not flags & _F_NO_PREALLOC):
            self._constant = charged
        return charged


def fdinfo(fd: int) -> dict[str, int]:
    """The numbers that the kernel reports of a map or link, by name. Raises OSError."""
    opened = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = os.read(opened, _FDINFO_BYTES).decode()  # less than a page: it comes at once
    finally:
        os.close(opened)
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        value = value.strip()
        if value.isdigit():
            found[name] = int(value)
        elif value.startswith("0x"):
            found[name] = int(value, 16)
    return found


def sum_over_cpus(values: NDArray[Any], field: str) -> NDArray[Any]:
    """The sum over CPUs of one field of per-CPU values: (n, CPUs, ...) becomes (n, ...)."""
    total: NDArray[Any] = values[field].sum(axis=1)
    return total
