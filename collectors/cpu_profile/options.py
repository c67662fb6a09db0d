"""The options of `cpu_profile`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from coral.collectors.kernel_collector import KernelOptions
from coral.collectors.options import Parser, choice, duration, integer, option, size

CLOCK, CYCLES = "cpu-clock", "cycles"
_LEAST_BYTES: Final = 512
_MOST_BYTES: Final = 28 << 10  # STACK_STEPS of cpu_profile.bpf.c


def _stack_size() -> Parser:
    """A number of bytes to copy, or 0."""
    accepts = "0, or a size from 512 to 28KiB"

    def parse(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,9})(KiB|K)?", text.strip())
        count = int(match[1]) * (1024 if match[2] else 1) if match else -1
        if count and not _LEAST_BYTES <= count <= _MOST_BYTES:
            raise ValueError(accepts)
        return count & ~7

    return Parser(accepts, parse)


@dataclass(frozen=True)
class CpuProfileOptions(KernelOptions):
    """The options of `cpu_profile`."""

    interval: float = option(duration(0.1, 60), "5s", "how often to send summaries")
    mode: str = option(
        choice("summaries"), "summaries", "`summaries`: stacks with their counts for each interval"
    )
    ring: int = option(size(64 << 10, 256 << 20), "8MiB", "the size of the ring buffer for samples")
    event: str = option(
        choice(CLOCK, CYCLES),
        CLOCK,
        "what to take samples by: `cpu-clock`, the time that threads are on a CPU; `cycles`, the "
        "cycles of CPUs that have counters for them, which virtual ones seldom have",
    )
    frequency: int = option(
        integer(1, 999),
        "99",
        "how many samples to take a second of each CPU that a watched thread runs on, with "
        "event=cycles at its highest clock; 19 for a collector of the configuration file",
    )
    stack_bytes: int = option(
        _stack_size(),
        "28KiB",
        "how much of the user stack to copy at most, to find the callers by the unwind information "
        "of binaries; 0: by frame pointers alone, in the kernel",
    )
