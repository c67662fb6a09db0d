"""Two windows side by side: what is new, what is gone, what became slower, what fails more.

A verdict needs a difference that matters, and one that chance does not explain: below that, a
quantile or a share of a few values says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coral.colony.answers.figures import SideBySide, numbers, side_by_side
from coral.colony.answers.named import Named, Times

LEAST_VALUES: Final = 20
SLOWER: Final = 1.25
"""A quantile that is so many times as great is slower; less may be where in a slot values lie."""
MORE_ERRORS: Final = 0.01
"""So much more of all that failed is worse."""

NEW, GONE, FAILING, SLOW, FAST = "new", "gone", "failing", "slower", "faster"
_WEIGHT: Final = {FAILING: 4, SLOW: 3, NEW: 2, GONE: 1, FAST: 1}
_TOLD_BY: Final = {"p50": LEAST_VALUES, "p95": LEAST_VALUES, "p99": 10 * LEAST_VALUES}
# One of a thousand comparisons of equals goes beyond: the normal distribution's 3.3 sigma, and the
# constant of the two-sample test of Kolmogorov and Smirnov, sqrt(-ln(0.001 / 2) / 2).
_SIGMA: Final = 3.3
_KOLMOGOROV: Final = 1.95


def compared(
    named: Named,
    now: pa.Table,
    before: pa.Table,
    by: Sequence[str],
    *,
    now_is_cut: bool = False,
    before_is_cut: bool = False,
) -> pa.Table:
    """The rows of both windows, with a column `verdict` behind BY. Those that became worse come
    first, and of these the ones with most. What is missing in a window that is cut may be what was
    left out, so nothing is new or gone then."""
    count, errors = named.counted
    sides = side_by_side(now, before, by)
    joined = sides.table
    amount, amount_before = numbers(joined, count), numbers(joined, f"{count}_before")
    verdicts = np.full(joined.num_rows, "", dtype=object)
    enough = (amount >= LEAST_VALUES) & (amount_before >= LEAST_VALUES)
    for times in named.times[:1]:
        moved = enough & _differs(sides, now, before, times)
        ratio = _ratio(joined, times, np.minimum(amount, amount_before))
        verdicts[moved & (ratio <= 1 / SLOWER)] = FAST
        verdicts[moved & (ratio >= SLOWER)] = SLOW
    if errors:
        failed, failed_before = numbers(joined, errors), numbers(joined, f"{errors}_before")
        worse = _fails_more(failed, amount, failed_before, amount_before)
        verdicts[enough & worse] = FAILING
    if not before_is_cut:
        verdicts[(amount > 0) & (amount_before == 0)] = NEW
    if not now_is_cut:
        verdicts[(amount == 0) & (amount_before > 0)] = GONE
    weight = np.array([_WEIGHT.get(each, 0) for each in verdicts.tolist()], np.int64)
    order = np.lexsort((-np.maximum(amount, amount_before), -weight))
    joined = joined.add_column(len(by), "verdict", pa.array(verdicts.tolist(), pa.string()))
    return joined.take(pa.array(order))


def _fails_more(
    failed: NDArray[Any], of: NDArray[Any], failed_before: NDArray[Any], of_before: NDArray[Any]
) -> NDArray[np.bool_]:
    """Whether the share of what failed grew, by a test of two proportions."""
    share, share_before = _share(failed, of), _share(failed_before, of_before)
    pooled = _share(failed + failed_before, of + of_before)
    spread = np.sqrt(
        pooled * (1 - pooled).clip(0) * (1 / np.maximum(of, 1) + 1 / np.maximum(of_before, 1))
    )
    grown = share - share_before
    found: NDArray[np.bool_] = (grown >= MORE_ERRORS) & (grown > _SIGMA * spread)
    return found


def _differs(sides: SideBySide, now: pa.Table, before: pa.Table, times: Times) -> NDArray[np.bool_]:
    """Whether two histograms differ by more than chance, by the greatest distance between their
    cumulative shares."""
    shares, totals = [], []
    for table, at in ((now, sides.now), (before, sides.before)):
        column = table.column(f"{times.prefix}histogram").combine_chunks()
        counts = column.flatten().to_numpy().reshape(table.num_rows, -1) if len(column) else None
        if counts is None or not counts.shape[1]:
            return np.zeros(len(at), bool)
        picked = np.where((at >= 0)[:, None], counts[at], 0)
        cumulative = picked.cumsum(axis=1)
        total = cumulative[:, -1]
        shares.append(cumulative / np.maximum(total, 1)[:, None])
        totals.append(np.maximum(total, 1))
    if shares[0].shape != shares[1].shape:  # of other slots: nobody can say
        return np.zeros(len(sides.now), bool)
    distance = np.abs(shares[0] - shares[1]).max(axis=1)
    found: NDArray[np.bool_] = distance > _KOLMOGOROV * np.sqrt(1 / totals[0] + 1 / totals[1])
    return found


def _ratio(joined: pa.Table, times: Times, values: NDArray[Any]) -> NDArray[Any]:
    """By how much quantiles grew: the one that changed most of those that so many VALUES tell
    anything of; 1 where none did."""
    found = np.ones(joined.num_rows)
    for q, least in _TOLD_BY.items():
        name = f"{times.prefix}{q}_{times.unit}"
        now, before = numbers(joined, name), numbers(joined, f"{name}_before")
        known = (now > 0) & (before > 0) & (values >= least)
        ratio = np.divide(now, before, out=np.ones_like(now), where=known)
        found = np.where(np.abs(np.log(ratio)) > np.abs(np.log(found)), ratio, found)
    return found


def _share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[Any]:
    found: NDArray[Any] = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return found
