"""The kernel's figures of loaded programs."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_uint32
from typing import Final, NamedTuple

from coral.bpf.libbpf import BpfError, call

# struct bpf_prog_info up to `verified_insns` (Linux 5.16), and padding. Older kernels fill less of
# it; the rest stays 0.
_INFO_BYTES: Final = 224
_RUN_TIME_NS_AT: Final = 192 // 8  # Linux 5.1
_RUN_COUNT_AT: Final = 200 // 8
_RECURSION_MISSES_AT: Final = 208 // 8  # Linux 5.12
_VERIFIED_INSTRUCTIONS_AT: Final = 216 // 8
_32_BITS: Final = (1 << 32) - 1
_Info: Final = ctypes.c_uint64 * (_INFO_BYTES // 8)


class ProgramStats(NamedTuple):
    """The kernel's figures of one loaded program; times only count while statistics are on. What
    the kernel does not know yet is 0."""

    run_time_ns: int
    run_count: int
    recursion_misses: int
    verified_instructions: int


def read_program_stats(program: int) -> ProgramStats:
    """The figures of the program with the descriptor PROGRAM. Raises `BpfError`."""
    info = _Info()
    error = -call("bpf_obj_get_info_by_fd", program, info, byref(c_uint32(_INFO_BYTES)))
    if error:
        raise BpfError("reading the figures of a program", error)
    return ProgramStats(
        info[_RUN_TIME_NS_AT],
        info[_RUN_COUNT_AT],
        info[_RECURSION_MISSES_AT],
        info[_VERIFIED_INSTRUCTIONS_AT] & _32_BITS,
    )
