"""Rows without what identifies the other ends of connections, for subscribers that may not see it.

The contract says which fields those are (`MEANING_PEER`), so no kind of collector is named here.
Loop-free, and vectorised: a column is overwritten, not a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.agent.streams.rows import with_used_strings
from coral.collectors.contract import EventRows, Summaries
from coral.mesh.v1 import options_pb2 as options
from coral.wire.kinds import fields_meaning, is_string_index

REDACTED: Final = "redacted"
_KEPT: Final = frozenset({"", "other"})
"""Texts in place of an address that identify nobody: none, and what a cap has added up."""


def masked(rows: EventRows | Summaries) -> EventRows | Summaries:
    """ROWS with 0, or the text "redacted", in every field that identifies a peer; the same object
    where they have none. No string that only such a field pointed to is left in the batch."""
    values: Any = rows.records if isinstance(rows, EventRows) else rows.columns
    there_are = values.dtype.names or () if isinstance(rows, EventRows) else values
    fields = [
        field
        for field in fields_meaning(rows.message.DESCRIPTOR, options.MEANING_PEER)
        if field.name in there_are
    ]
    if not fields or not len(rows):
        return rows
    strings = (*rows.strings, REDACTED)
    keeps = np.array([text in _KEPT for text in rows.strings] or [False], bool)
    changed: dict[str, NDArray[Any]] = {}
    for field in fields:
        old = values[field.name]
        if is_string_index(field):
            changed[field.name] = np.where(keeps[old], old, len(rows.strings)).astype(old.dtype)
        else:
            changed[field.name] = np.zeros_like(old)
    if isinstance(rows, Summaries):
        columns = {**rows.columns, **changed}
        return with_used_strings(replace(rows, columns=columns, strings=strings))
    # As bytes, because a copy of the fields leaves out what lies between them.
    records = rows.records.view(f"V{rows.records.itemsize}").copy().view(rows.records.dtype)
    for name, column in changed.items():
        records[name] = column
    return with_used_strings(replace(rows, records=records, strings=strings))
