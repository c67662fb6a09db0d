"""The frames of stacks, beside the rows that have their ids."""

from __future__ import annotations

from typing import Final

import duckdb
import numpy as np
import pyarrow as pa

from coral.colony.answers.sources import Sources
from coral.colony.answers.window import HOUR_NS, Window
from coral.colony.tables.layout import STACK, STACKS, STACKS_SCHEMA, TIME

_COLUMNS: Final = tuple(name for name in STACKS_SCHEMA.names if name not in (STACK, TIME))
# The colony stores the frames of a stack anew once a day: so those of any row are at most so old,
# and in the same transaction at the latest, with the time of a row of it.
_BEFORE_NS: Final = 26 * HOUR_NS
_AFTER_NS: Final = HOUR_NS
_WANTED: Final = "stacks_wanted"


def with_frames(
    cursor: duckdb.DuckDBPyConnection, sources: Sources, table: pa.Table, window: Window
) -> pa.Table:
    """TABLE, rows of WINDOW with ids of stacks, with the frames in place of the ids: lists, the
    outermost first; NULL for a stack whose frames are not kept."""
    ids = table.column(STACK).to_numpy()
    unique, which = np.unique(ids, return_inverse=True)
    cursor.register(_WANTED, pa.table({STACK: pa.array(unique, pa.uint64())}))
    try:
        rows = sources.rows(STACKS, window.from_ns - _BEFORE_NS, window.to_ns + _AFTER_NS)
        frames = ", ".join(f"any_value({name}) AS {name}" for name in _COLUMNS)
        sql = f"""
            SELECT {STACK}, {frames} FROM ({rows}) JOIN {_WANTED} USING ({STACK})
            GROUP BY {STACK} ORDER BY {STACK}"""
        found: pa.Table = cursor.sql(sql).to_arrow_table()
    finally:
        cursor.unregister(_WANTED)
    places = {stack: at for at, stack in enumerate(found.column(STACK).to_pylist())}
    at = [places.get(stack) for stack in unique.tolist()]
    index = pa.array(at, pa.int64()).take(pa.array(which.reshape(-1)))
    for name in _COLUMNS:
        table = table.append_column(name, found.column(name).combine_chunks().take(index))
    return table.drop_columns([STACK])
