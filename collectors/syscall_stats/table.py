"""System calls by number and by name, for the processor that the agent runs on."""

from __future__ import annotations

import csv
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

NR_COMPAT: Final = 4096  # as in syscall_stats.bpf.c
NR_UNKNOWN: Final = 1024
_TABLE: Final = Path(__file__).with_name("syscalls.tsv")


# The processor whose system calls a 32-bit program makes there.
_COMPAT: Final = {"x86_64": "i386", "aarch64": "arm"}


@cache
def numbers(machine: str = platform.machine()) -> Mapping[str, int]:
    """Numbers by name; empty for a processor that is not in the table."""
    with _TABLE.open() as lines:
        rows = csv.DictReader((line for line in lines if line[0] != "#"), delimiter="\t")
        return {row["name"]: int(row[machine]) for row in rows if row.get(machine, "-") != "-"}


@cache
def compat_numbers() -> Mapping[str, int]:
    """The numbers of 32-bit programs on this processor, by name."""
    return numbers(_COMPAT.get(platform.machine(), ""))


def is_name(name: str) -> bool:
    """Whether there is such a call, for programs of either width."""
    return name in numbers() or name in compat_numbers()


def numbers_of(name: str) -> list[int]:
    """The numbers of a call as the eBPF program gives them: of 64-bit and of 32-bit programs."""
    found = [numbers()[name]] if name in numbers() else []
    return found + ([NR_COMPAT + compat_numbers()[name]] if name in compat_numbers() else [])


@cache
def _names() -> Mapping[int, str]:
    native = {number: name for name, number in numbers().items()}
    return native | {NR_COMPAT + number: name for name, number in compat_numbers().items()}


def name_of(number: int) -> str:
    """The name for a number as the eBPF program gives it: `syscall_N` if the table is older than
    the kernel, `compat_N` for that of a 32-bit program, `unknown` for a number that no kernel
    has."""
    if number in (NR_UNKNOWN, NR_UNKNOWN + NR_COMPAT):
        return "unknown"
    if number in _names():
        return _names()[number]
    if number >= NR_COMPAT:
        return f"compat_{number - NR_COMPAT}"
    return f"syscall_{number}"
