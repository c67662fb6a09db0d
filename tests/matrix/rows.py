"""The matrix: which kernel tests run on which kernel, and which features they do without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

HOST: Final = "host"


@dataclass(frozen=True)
class Row:
    """One run of pytest. `rung` describes the effect of the other members."""

    kernel: str
    rung: str = "best"
    loader: str = "core"
    without: str = ""
    """Features of bpf/probing/features.py to treat as missing, separated by commas."""
    hide_btf: bool = False
    """Nothing is under /sys/kernel/btf, not even for libbpf."""
    memlock_kib: int | None = None
    tests: tuple[str, ...] = ("tests/kernel",)
    """Arguments of pytest."""
    optional: bool = False
    """A missing kernel is no failure: its suite may have left the mirrors."""


# Repetitive tests take long under emulation: `make test` runs them on the host's kernel.
_QUICK: Final = ("tests/kernel", "-m", "not long and not pace and not soak")

MATRIX: Final = (
    Row(HOST, tests=_QUICK),
    Row("6.1", tests=_QUICK),
    Row("6.1", "BTF hidden", loader="bcc", hide_btf=True, tests=_QUICK),
    Row("6.12", tests=_QUICK),
    # Before 5.11 the kernel charges maps to RLIMIT_MEMLOCK and has no task storage for tracing.
    Row("5.10", "memlock 64 KiB", memlock_kib=64, tests=_QUICK, optional=True),
)
KERNELS: Final = tuple(dict.fromkeys(row.kernel for row in MATRIX))


def rows_of(kernel: str) -> list[Row]:
    """The rows of one kernel; a kernel that is not in the matrix gets the best rung."""
    return [row for row in MATRIX if row.kernel == kernel] or [replace(Row(HOST), kernel=kernel)]
