"""Names, paths and cgroups as programs compare them: bpf/include/targets.bpf.h and
bpf/programs/processes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.cgroups import hierarchy, path_in_hierarchy

_PATH_BYTES: Final = 256  # as in processes.bpf.c, as the next two
_HASH_OFFSET: Final = 0xCBF29CE484222325
_HASH_PRIME: Final = 0x100000001B3


def words(text: str, length: int) -> NDArray[np.uint64]:
    """TEXT padded with zeros to LENGTH bytes, in words."""
    return np.frombuffer(text.encode()[:length].ljust(length, b"\0"), np.uint64)


def path_hash(directory: Path) -> int:
    """The path of a cgroup from the root of its hierarchy; 0 if it is too
    long for them."""
    path = path_in_hierarchy(directory)
    if not path or len(path.encode()) >= _PATH_BYTES:
        return 0
    found = _HASH_OFFSET
    for word in words(path, _PATH_BYTES).tolist():
        found = (found ^ word) * _HASH_PRIME & (1 << 64) - 1
    return found ^ place(directory)


def place(directory: Path) -> int:
    """What tells the memory controller's hierarchy from the unified one, in keys of cgroups."""
    return 1 << 63 if hierarchy(directory) == "memory" else 0
