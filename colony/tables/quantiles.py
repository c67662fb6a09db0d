"""Quantiles of many histograms at once: one for each service, or each route, or each minute.

They are those that `Histogram` and `Buckets` of `wire.histogram` read from one, to the last digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coral.colony.tables.histograms import Histogram


def counts_of(histogram: Histogram, rows: pa.Table) -> tuple[NDArray[np.int64], Sequence[str]]:
    """The counts of a histogram in each of n ROWS, of shape (n, slots), and the columns that have
    them: those of ROWS that are the histogram's. NULL is 0."""
    names = histogram.of(rows.column_names)
    counts = np.zeros((rows.num_rows, len(names)), np.int64)
    for slot, name in enumerate(names):
        column = rows.column(name)
        if column.null_count:
            column = column.fill_null(0)
        counts[:, slot] = column.cast(pa.int64()).to_numpy()  # sums of SQL are wider
    return counts, names


def quantiles(
    histogram: Histogram,
    counts: NDArray[Any],
    q: float | Sequence[float],
    *,
    names: Sequence[str] | None = None,
    least: NDArray[Any] | None = None,
    most: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """The values that shares Q (0 to 1) of all values of each histogram do not exceed, in the
    histogram's unit: of shape (n,) for a number, (n, k) for k of them. Interpolated linearly inside
    a slot; 0 where there are no values.

    COUNTS is of shape (n, slots), by the columns NAMES, or else by those that every table has.
    LEAST and MOST, of shape (n,), are the smallest and the greatest values, where they are known.
    Without MOST, values above all bounds count as the last bound.
    """
    shares = np.atleast_1d(np.asarray(q, np.float64))
    lower, upper = (np.array(edge) for edge in histogram.edges(names))
    cumulative = counts.cumsum(axis=1)
    total = cumulative[:, -1]
    row = np.arange(len(counts))
    found = np.zeros((len(counts), len(shares)))
    for place, share in enumerate(shares.tolist()):
        wanted = share * total
        slot = np.argmax((cumulative >= wanted[:, None]) & (counts > 0), axis=1)
        count = counts[row, slot]
        below = cumulative[row, slot] - count
        part = (wanted - below) / np.maximum(count, 1)
        low, high = lower[slot], upper[slot]
        if histogram.is_log2:
            value = low + (high - low) * part
            value = value if most is None else np.minimum(value, most)
        else:
            low, high = _within(low, high, least, most)
            value = low + (high - low) * part
        found[:, place] = np.where(total > 0, value, 0.0)
    return found if np.ndim(q) else found[:, 0]


def _within(
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    least: NDArray[Any] | None,
    most: NDArray[Any] | None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The ends of slots, between the LEAST and the MOST value."""
    above = np.isinf(high)
    if most is None:
        high = np.where(above, low, high)
    else:
        high = np.where(above, most, np.minimum(high, most))
    if least is not None:
        low = np.maximum(low, least)
    return low, np.maximum(low, high)
