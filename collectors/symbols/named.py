"""What the names of addresses are, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Named:
    """The names of n addresses, as numbers of `Symbolizer.strings` (u32[n]): of the function, of
    its module (the last part of the file's path, `[vdso]`, `[anonymous]`, `[kernel]`, `[ext4]`),
    and of the module's build id in hexadecimal digits, empty without.

    `addresses` (u64[n]) are what was looked up, a return address less 1: the virtual address in
    the file, so that a debugger or another machine finds it there; in memory without a file, the
    offset in the mapping or, with a name from a perf map, in the function; in the kernel, the
    offset from the first byte of its code or of the module. `is_unnamed` (bool[n]) tells addresses
    that no symbol contains; their function is `module+0xaddress`, or `names.UNKNOWN`. `is_told`
    (bool[n]) tells functions that a runtime has told of in a perf map.
    """

    functions: NDArray[np.uint32]
    modules: NDArray[np.uint32]
    addresses: NDArray[np.uint64]
    build_ids: NDArray[np.uint32]
    is_unnamed: NDArray[np.bool_]
    is_told: NDArray[np.bool_]

    @classmethod
    def nothing(cls, count: int) -> Named:
        """COUNT addresses without names."""
        zeros = np.zeros(count, np.uint32)
        return cls(
            zeros,
            zeros.copy(),
            np.zeros(count, np.uint64),
            zeros.copy(),
            np.ones(count, np.bool_),
            np.zeros(count, np.bool_),
        )
