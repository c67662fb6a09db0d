"""What an agent may not send: whatever it is, one batch must not harm the store. All raise
ContractError, which names the field."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.client import ContractError

_NS_PER_DAY: Final = 86_400 * 10**9
MOST_AHEAD_NS: Final = _NS_PER_DAY
MOST_BEHIND_NS: Final = 366 * _NS_PER_DAY
MOST_GROWTH: Final = 64
"""How many times as large as its columns a batch can become, where most of them are zeros."""
MOST_FRAMES: Final = 1024
"""Of one stack."""


def check_size(values: Mapping[str, NDArray[Any]], count: int, row_bytes: int) -> None:
    """What was sent is not far less than the COUNT rows of ROW_BYTES that become of it. Columns of
    zeros need not be sent: those that were are views, read-only."""
    sent_bytes = sum(it.nbytes for it in values.values() if not it.flags.writeable)
    if sent_bytes * MOST_GROWTH < count * row_bytes:
        raise ContractError(
            f"count: {count} rows in {sent_bytes} bytes of columns, which would become "
            f"{count * row_bytes}"
        )


def check_indices(name: str, values: NDArray[Any], size: int, things: str = "strings") -> None:
    """VALUES, unsigned, all point into a list of SIZE."""
    most = int(values.max(initial=-1)) if values.dtype.kind == "i" else _most(values)
    if most >= size:
        raise ContractError(f"{name}: index {most}, and there are {size} {things}")


def _most(values: NDArray[Any]) -> int:
    return int(values.max()) if len(values) else -1


def check_numbers(name: str, values: NDArray[Any]) -> None:
    """Of floating point: all are numbers."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ContractError(f"{name}: a value that is no number, or infinite")


def check_times(name: str, least_ns: int, most_ns: int, now_ns: int) -> None:
    """Unix times from LEAST_NS to MOST_NS are such as a colony keeps: not more than a day ahead of
    NOW_NS, nor more than a year behind."""
    for time_ns in (least_ns, most_ns):
        if not now_ns - MOST_BEHIND_NS <= time_ns <= now_ns + MOST_AHEAD_NS:
            raise ContractError(
                f"{name}: {_date(time_ns)}, and here it is {_date(now_ns)}: the agent's clock is "
                "wrong"
            )


def check_single(name: str, values: NDArray[Any]) -> None:
    """A value that a batch has once at most."""
    if len(values) > 1:
        raise ContractError(f"{name}: {len(values)} values for a batch")


def check_stacks(values: dict[str, NDArray[Any]] | Any, strings: int) -> None:  # noqa: ANN401
    """The tables of stacks and frames of CpuProfileColumns point into one another."""
    lengths, flat = values["stack_length"], values["stack_frames"]
    if _most(lengths) > MOST_FRAMES:
        raise ContractError(
            f"stack_length: a stack of {_most(lengths)} frames, and at most {MOST_FRAMES} are read"
        )
    if int(lengths.sum(dtype=np.uint64)) != len(flat):
        raise ContractError(
            f"stack_length: {int(lengths.sum(dtype=np.uint64))} frames, and stack_frames has "
            f"{len(flat)}"
        )
    check_indices("stack", values["stack"], len(lengths), "stacks")
    frames = len(values["frame_function"])
    check_indices("stack_frames", flat, frames, "frames")
    for name in ("frame_module", "frame_address", "frame_build_id", "frame_flags"):
        if len(values[name]) not in (0, frames):
            raise ContractError(f"{name}: {len(values[name])} values for {frames} frames")
    for name in ("frame_function", "frame_module", "frame_build_id"):
        check_indices(name, values[name], strings)


def _date(time_ns: int) -> str:
    try:
        return f"{datetime.fromtimestamp(time_ns // 10**9, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"{time_ns} ns"
