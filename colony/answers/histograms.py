"""Histograms of a table, whose columns name their slots, and quantiles of many of them at a time.

A column `duration_le_2500000` counts values from the bound before it up to that bound, and
`duration_le_inf` all that are larger. A column `latency_e12` counts those in [2^12, 2^13), and the
first of its kind all that are smaller too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Slots:
    """The columns of one histogram, and between which values each counts. `upper` is infinite for
    the slot without an end."""

    columns: Sequence[str]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]


def slots_of(name: str, columns: Iterable[str]) -> Slots:
    """Those of COLUMNS that are the histogram NAME's, such as "duration"."""
    bounded = re.compile(rf"{re.escape(name)}_le_(\d+|inf)")
    log2 = re.compile(rf"{re.escape(name)}_e(\d+)")
    found: dict[float, str] = {}
    for column in columns:
        if match := bounded.fullmatch(column):
            found[float(match[1])] = column
        elif match := log2.fullmatch(column):
            found[2.0 ** (int(match[1]) + 1)] = column
    upper = np.array(sorted(found), np.float64)
    is_log2 = any(map(log2.fullmatch, found.values()))
    lower = upper / 2 if is_log2 else np.concatenate([[0.0], upper])[: len(upper)]
    lower[:1] = 0.0
    return Slots([found[each] for each in upper.tolist()], lower, upper)


def quantiles(
    counts: NDArray[Any],
    slots: Slots,
    q: float,
    least: NDArray[Any] | None = None,
    most: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """The value that a share Q (0 to 1) of the values of each histogram do not exceed, as an array
    of shape (n,) for COUNTS of shape (n, slots): interpolated linearly inside its slot, and between
    LEAST and MOST where they are given. NaN where there are no values.

    As `coral.wire.histogram.Buckets.quantile` has it for one.
    """
    if not counts.size:
        return np.full(len(counts), np.nan)
    counts = counts.astype(np.float64)
    cumulative = counts.cumsum(axis=1)
    total = cumulative[:, -1]
    wanted = q * total
    reached = (cumulative >= wanted[:, None]) & (counts > 0)
    slot = reached.argmax(axis=1)
    rows = np.arange(len(counts))
    inside = counts[rows, slot]
    below = cumulative[rows, slot] - inside
    lower, upper = slots.lower[slot], slots.upper[slot]
    if most is not None:
        upper = np.minimum(upper, most)
    upper = np.where(np.isinf(upper), lower, upper)
    if least is not None:
        lower = np.maximum(lower, least)
    upper = np.maximum(upper, lower)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = lower + (upper - lower) * (wanted - below) / inside
    return np.where(total > 0, found, np.nan)
