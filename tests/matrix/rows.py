"""The matrix: which kernel tests run on which kernel, and without which features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

HOST: Final = "host"


@dataclass(frozen=True)
class Row:
    """One run of pytest. The rung describes in words what the other fields cause."""

    kernel: str
    rung: str = "best"
    loader: str = "core"
    without: str = ""
    """Features that count as missing: names of bpf/probing/features.py, separated by commas."""
    hide_btf: bool = False
    """Hides /sys/kernel/btf, from libbpf too."""
    memlock_kib: int | None = None
    tests: tuple[str, ...] = ("tests/kernel",)
    """Arguments for pytest."""
    optional: bool = False
    """Whether it may be missing: its suite may have left the mirrors."""


# Tests that only repeat others take long under emulation; one kernel is enough for them.
_QUICK: Final = ("tests/kernel", "-m", "not long")

MATRIX: Final = (
    Row(HOST),
    Row("6.1", tests=_QUICK),
    Row("6.1", "BTF hidden", loader="bcc", hide_btf=True, tests=_QUICK),
    Row("6.12"),
    # Before 5.11, maps count against RLIMIT_MEMLOCK, and tracing programs have no task storage.
    Row("5.10", "memlock 64 KiB", memlock_kib=64, tests=_QUICK, optional=True),
)
KERNELS: Final = tuple(dict.fromkeys(row.kernel for row in MATRIX))


def rows_of(kernel: str) -> list[Row]:
    """The rows of one kernel. A kernel that the matrix does not name gets the best rung."""
    return [row for row in MATRIX if row.kernel == kernel] or [replace(Row(HOST), kernel=kernel)]
