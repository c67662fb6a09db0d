"""The matrix: which kernel tests run where, and what is taken away from them there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

HOST: Final = "host"


@dataclass(frozen=True)
class Row:
    """One run of pytest. The rung says in words what the rest brings about."""

    kernel: str
    rung: str = "best"
    loader: str = "core"
    without: str = ""
    """Names of bpf/probing/features.py that are taken as missing, by commas."""
    hide_btf: bool = False
    """Nothing under /sys/kernel/btf: not for libbpf either."""
    memlock_kib: int | None = None
    tests: tuple[str, ...] = ("tests/kernel",)
    """Arguments of pytest."""
    optional: bool = False
    """That its kernel cannot be had is no failure: its suite may have left the mirrors."""


# What only repeats itself is long under emulation: one kernel is enough for it.
_QUICK: Final = ("tests/kernel", "-m", "not long")

MATRIX: Final = (
    Row(HOST),
    Row("6.1", tests=_QUICK),
    Row("6.1", "BTF hidden", loader="bcc", hide_btf=True, tests=_QUICK),
    Row("6.12"),
    # Before 5.11 the kernel charges maps to RLIMIT_MEMLOCK, and has no task storage for tracing.
    Row("5.10", "memlock 64 KiB", memlock_kib=64, tests=_QUICK, optional=True),
)
KERNELS: Final = tuple(dict.fromkeys(row.kernel for row in MATRIX))


def rows_of(kernel: str) -> list[Row]:
    """The rows of one kernel; one that the matrix does not name gets the best rung."""
    return [row for row in MATRIX if row.kernel == kernel] or [replace(Row(HOST), kernel=kernel)]
