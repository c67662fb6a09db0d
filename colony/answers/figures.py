"""From sums of a query to its answer: quantiles in place of slots, two windows side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coral.colony.answers.named import TIME, Times
from coral.colony.answers.query import ACCOUNT, Slots, Statement
from coral.colony.tables.quantiles import counts_of, quantiles

QUANTILES: Final = (0.5, 0.95, 0.99)
_BEFORE: Final = "_before"
_AT: Final = "place in its window"


def finished(sums: pa.Table, statement: Statement, times: Sequence[Times]) -> pa.Table:
    """SUMS, the rows of STATEMENT, with quantiles and a list of counts in place of the slots'
    columns. The list's field says its bounds: `bounds` are the upper ends of all slots but those
    without one, in `unit`. The time's field says how long its parts are: `step_ns`."""
    slots = {column for found in statement.slots.values() for column in found.columns}
    kept = [name for name in sums.column_names if name not in slots and name not in ACCOUNT]
    table = sums.select(kept)
    if TIME in kept:
        field = pa.field(TIME, pa.int64(), metadata={"step_ns": str(statement.step_ns)})
        table = table.set_column(kept.index(TIME), field, table.column(TIME))
    for each in times:
        for field, column in _of_times(sums, each, statement.slots[each.histogram]):
            table = table.append_column(field, column)
    return table


def _of_times(sums: pa.Table, times: Times, slots: Slots) -> Iterator[tuple[pa.Field, pa.Array]]:
    histogram = slots.histogram
    counts, names = counts_of(histogram, sums)
    least, most = (_numbers(sums, name) for name in (times.least, times.most))
    values = quantiles(histogram, counts, QUANTILES, names=names, least=least, most=most)
    empty = counts.sum(axis=1) == 0
    for place, q in enumerate(QUANTILES):
        name = f"{times.prefix}p{q * 100:g}_{times.unit}"
        yield pa.field(name, pa.float64()), pa.array(values[:, place], mask=empty)
    _, upper = histogram.edges(names)
    bounds = ",".join(f"{each:.0f}" for each in upper if np.isfinite(each))
    metadata = {"bounds": bounds, "unit": times.unit}
    field = pa.field(f"{times.prefix}histogram", pa.list_(pa.int64()), metadata=metadata)
    offsets = pa.array(np.arange(sums.num_rows + 1, dtype=np.int32) * counts.shape[1])
    yield field, pa.ListArray.from_arrays(offsets, pa.array(counts.reshape(-1)))


def _numbers(sums: pa.Table, name: str) -> NDArray[np.float64] | None:
    """A column of figures; None where the query has none. Where there is no value there are no
    counts either."""
    return numbers(sums, name) if name in sums.column_names else None


@dataclass(frozen=True)
class SideBySide:
    """The rows of two windows: figures of the earlier end with `_before`, and what one of them does
    not have is NULL. `now` and `before` are the places of a row in each, -1 where it has none."""

    table: pa.Table
    now: NDArray[np.int64]
    before: NDArray[np.int64]


def side_by_side(now: pa.Table, before: pa.Table, by: Sequence[str]) -> SideBySide:
    """The rows of both with the same BY in one. Lists are left out."""
    values = [
        name
        for name in now.column_names
        if name not in by and not pa.types.is_list(now.schema.field(name).type)
    ]
    names = [f"{name}{_BEFORE}" for name in values]
    flat = now.select([*by, *values]).append_column(_AT, _places(now))
    flat_before = before.select([*by, *values]).append_column(_AT, _places(before))
    flat_before = flat_before.rename_columns([*by, *names, _AT + _BEFORE])
    joined = flat.join(flat_before, keys=list(by), join_type="full outer")
    ordered = [name for pair in zip(values, names, strict=True) for name in pair]
    at = (joined.column(name).fill_null(-1).to_numpy() for name in (_AT, _AT + _BEFORE))
    return SideBySide(joined.select([*by, *ordered]), *at)


def _places(table: pa.Table) -> pa.Array:
    return pa.array(np.arange(table.num_rows, dtype=np.int64))


def numbers(table: pa.Table, name: str) -> NDArray[Any]:
    """A column of figures, 0 where there is none."""
    values = np.asarray(table.column(name).to_numpy(), np.float64)
    return np.nan_to_num(values)
