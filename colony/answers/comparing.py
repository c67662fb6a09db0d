"""Two windows side by side: what is new, what is gone, what became slower, what fails more.

Both windows are as long. A verdict needs enough values on both sides: below that, a quantile says
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coral.colony.answers.figures import numbers, side_by_side
from coral.colony.answers.named import Named

LEAST_VALUES: Final = 20
SLOWER: Final = 1.25
"""A quantile that is so many times as great is slower: less may be where in a slot values lie."""
_TOLD_BY: Final = {"p50": LEAST_VALUES, "p95": LEAST_VALUES, "p99": 10 * LEAST_VALUES}
MORE_ERRORS: Final = 0.01
"""So much more of all that failed is worse."""

NEW, GONE, FAILING, SLOW, FAST = "new", "gone", "failing", "slower", "faster"
_WEIGHT: Final = {FAILING: 4, SLOW: 3, NEW: 2, GONE: 1, FAST: 1}


def compared(named: Named, now: pa.Table, before: pa.Table, by: Sequence[str]) -> pa.Table:
    """The rows of both windows, with a column `verdict` behind BY. Those that became worse come
    first, and of these the ones with most."""
    count, errors = named.counted
    if not now.num_rows and not before.num_rows:
        return now.append_column("verdict", pa.array([], pa.string()))
    joined = side_by_side(_like(now, before), _like(before, now), by)
    amount, amount_before = numbers(joined, count), numbers(joined, f"{count}_before")
    verdicts = np.full(joined.num_rows, "", dtype=object)
    enough = (amount >= LEAST_VALUES) & (amount_before >= LEAST_VALUES)
    ratio = _ratio(joined, named, np.minimum(amount, amount_before))
    verdicts[enough & (ratio <= 1 / SLOWER)] = FAST
    verdicts[enough & (ratio >= SLOWER)] = SLOW
    if errors:
        share = _share(numbers(joined, errors), amount)
        share_before = _share(numbers(joined, f"{errors}_before"), amount_before)
        verdicts[enough & (share >= share_before + MORE_ERRORS)] = FAILING
    verdicts[(amount > 0) & (amount_before == 0)] = NEW
    verdicts[(amount == 0) & (amount_before > 0)] = GONE
    weight = np.array([_WEIGHT.get(each, 0) for each in verdicts.tolist()])
    order = np.lexsort((-np.maximum(amount, amount_before), -weight))
    joined = joined.add_column(len(by), "verdict", pa.array(verdicts.tolist(), pa.string()))
    return joined.take(pa.array(order))


def _like(table: pa.Table, other: pa.Table) -> pa.Table:
    """TABLE; of an empty one the columns are those of OTHER."""
    return table if table.num_columns >= other.num_columns else other.slice(0, 0)


def _ratio(joined: pa.Table, named: Named, values: NDArray[Any]) -> NDArray[Any]:
    """By how much quantiles of the first histogram grew: the one that changed most of those that
    so many VALUES tell anything of; 1 where none did."""
    found = np.ones(joined.num_rows)
    for times in named.times[:1]:
        for q, least in _TOLD_BY.items():
            name = f"{times.prefix}{q}_{times.unit}"
            now, before = numbers(joined, name), numbers(joined, f"{name}_before")
            known = (now > 0) & (before > 0) & (values >= least)
            ratio = np.divide(now, before, out=np.ones_like(now), where=known)
            found = np.where(np.abs(np.log(ratio)) > np.abs(np.log(found)), ratio, found)
    return found


def _share(part: NDArray[Any], whole: NDArray[Any]) -> NDArray[Any]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
