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


@cache
def numbers(machine: str = platform.machine()) -> Mapping[str, int]:
    """Numbers by name; empty for a processor that is not in the table."""
    with _TABLE.open() as lines:
        rows = csv.DictReader((line for line in lines if line[0] != "#"), delimiter="\t")
        return {row["name"]: int(row[machine]) for row in rows if row.get(machine, "-") != "-"}


@cache
def _names() -> Mapping[int, str]:
    return {number: name for name, number in numbers().items()}


def name_of(number: int) -> str:
    """The name for a number as the eBPF program gives it: `syscall_N` if the table is older than
    the kernel, `compat_N` for the 32-bit entry, `unknown` for a number that no kernel has."""
    if number in (NR_UNKNOWN, NR_UNKNOWN + NR_COMPAT):
        return "unknown"
    if number >= NR_COMPAT:
        return f"compat_{number - NR_COMPAT}"
    return _names().get(number, f"syscall_{number}")
