"""Deliveries in, tables out: rows of a thousand agents gathered in bulk, without Python for a row.

`add` checks a delivery and keeps its arrays as they are; `take` joins those of all deliveries into
one pyarrow.Table for each table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coral.client import Batch, ContractError
from coral.colony import clock
from coral.colony.delivery import Delivery
from coral.colony.tables import checks
from coral.colony.tables.joined import JoinedRows, Part, signed
from coral.colony.tables.layout import STACK, STACKS, TABLES, Form, TableLayout
from coral.colony.tables.matrices import MOST_COLUMNS, OTHER, Named, Shapes
from coral.colony.tables.places import Place
from coral.colony.tables.stacks import Frames, Hashes, KnownStacks
from coral.colony.tables.texts import Texts
from coral.wire.resources import of_resource

_MOST_ADMITTED: Final = 1024  # names of columns of matrices that are remembered to be good


class Intake:
    """Gathers deliveries. For one thread at a time.

    NOW_NS gives the time, by which that of agents is judged.
    """

    def __init__(self, now_ns: Callable[[], int] = clock.now_ns) -> None:
        self._now_ns = now_ns
        self._tables = {name: _Table(layout) for name, layout in TABLES.items()}
        self._texts = Texts()
        self._places: dict[Place, int] = {}
        self._known = KnownStacks()
        self._hashes = Hashes()

    @property
    def rows(self) -> int:
        """How many rows have been gathered since the last take."""
        return sum(part.count for table in self._tables.values() for part in table.parts)

    def add(self, delivery: Delivery) -> None:
        """Gathers the rows of a delivery. Raises ContractError, which names the field, where an
        agent sent what it may not; then it has gathered nothing of it."""
        batch = delivery.batch
        if batch is None or not batch.count:
            return
        table = self._tables.get(batch.rows)
        if table is None:
            raise ContractError(f"rows: {batch.rows or 'none'} of {batch.kind} have no table")
        if table.layout.kind != delivery.session.kind:
            raise ContractError(f"rows: {batch.rows} in a session of {delivery.session.kind}")
        values = _values(batch, table.layout)
        if not table.layout.time_source:
            checks.check_size(values, batch.count, table.row_bytes)
        strings = list(batch.message.strings)
        names = table.check(values, strings)
        name = table.layout.resource_source
        checks.check_indices(name, batch.row_resources, len(batch.resources), "resources")
        time_ns, interval_ns = self._times(delivery, batch, table.layout, values)
        common = {**delivery.session.attributes, **batch.attributes}
        of_each = (of_resource(common, it.attributes) for it in batch.message.resources)
        places = [Place.of(delivery.session, it) for it in (common, *of_each)]
        known = self._places
        table.add(
            Part(
                values,
                batch.count,
                time_ns,
                interval_ns,
                batch.sample_every,
                self._texts.ids(strings),
                np.array([known.setdefault(it, len(known)) for it in places], np.int32),
                batch.row_resources,
                names,
            )
        )

    def take(self) -> Mapping[str, pa.Table]:
        """All rows since the last take, for each table that has any; and in `cpu_stacks` the frames
        of stacks that are not known to be stored. Columns of texts are dictionaries."""
        taken = {}
        places = list(self._places)
        for name, table in self._tables.items():
            if not table.parts:
                continue
            parts, stacks, frames = table.parts, None, None
            if table.has_stacks:
                stacks, frames = self._stacks(parts)
            taken[name] = table.take(self._texts, places, stacks)
            if frames is not None:
                taken[STACKS] = frames
        self._texts, self._places = Texts(), {}
        return taken

    def confirm(self, stored: Mapping[str, pa.Table]) -> None:
        """These tables, which were taken, are durable: the frames in them need not come again."""
        if STACKS in stored:
            self._known.add(stored[STACKS][STACK].to_numpy())

    def _times(
        self, delivery: Delivery, batch: Batch, layout: TableLayout, values: Mapping[str, Any]
    ) -> tuple[int, int]:
        """The end of the interval, and its length; 0 where that is not known."""
        start_ns, end_ns = batch.message.interval_start_ns, batch.message.interval_end_ns
        now_ns = self._now_ns()
        time_ns = end_ns or delivery.time_ns
        checks.check_times("interval_end_ns", time_ns, time_ns, now_ns)
        if source := layout.time_source:
            times = values[source]
            checks.check_times(source, int(times.min()), int(times.max()), now_ns)
            return time_ns, 0
        if not start_ns:
            return time_ns, 0
        checks.check_times("interval_start_ns", start_ns, start_ns, now_ns)
        if start_ns > time_ns:
            raise ContractError(f"interval_start_ns: {start_ns}, and the interval ends at {end_ns}")
        return time_ns, time_ns - start_ns

    def _stacks(self, parts: Sequence[Part]) -> tuple[NDArray[np.uint64], pa.Table | None]:
        """The stack ids of all rows, and the frames of those that are new."""
        frames = Frames([(part.values, part.strings) for part in parts])
        ids = frames.stack_ids(self._texts, self._hashes)
        of_row = np.concatenate([part.values["stack"] for part in parts]).astype(np.int64)
        of_row += np.repeat(frames.bases, [part.count for part in parts])
        time_ns = max(part.time_ns for part in parts)
        distinct, first = np.unique(ids, return_index=True)
        new = self._known.new(distinct, time_ns)
        if not new.any():
            return ids[of_row], None
        return ids[of_row], frames.table(first[new], distinct[new], time_ns, self._texts)


class _Table:
    """The rows of one table that are gathered, and the columns that it has come to have."""

    def __init__(self, layout: TableLayout) -> None:
        self.layout = layout
        self.parts: list[Part] = []
        self.row_bytes = 8 * len(layout.schema.names)
        self.has_stacks = any(it.form is Form.STACK for it in layout.columns)
        self._shapes = {name: Shapes(it) for name, it in layout.matrices.items()}
        self._columns = {
            name: dict.fromkeys(it.expected) for name, it in layout.matrices.items()
        }  # of each matrix, in their order
        self._admitted: set[tuple[str, ...]] = set()

    def check(
        self, values: Mapping[str, NDArray[Any]], strings: Sequence[str]
    ) -> Mapping[str, tuple[str, ...]]:
        """The names of the columns of each matrix. Raises ContractError."""
        for column in self.layout.columns:
            form, source = column.form, column.source
            if form is Form.TEXT:
                checks.check_indices(source, values[source], len(strings))
            elif form in (Form.EACH_ROW, Form.FIRST_ROW):
                checks.check_single(source, values[source])
            elif form is Form.STACK:
                checks.check_stacks(values, len(strings))
            elif form is Form.NUMBER and column.type == pa.float64():
                checks.check_numbers(source, values[source])
        names = {}
        for source, matrix in self.layout.matrices.items():
            if isinstance(matrix, Named):
                checks.check_indices(matrix.named_by, values[matrix.named_by], len(strings))
            width = values[source].shape[1]
            found = self._shapes[source].names(width, values, strings)
            names[source] = self._bounded(source, found)
        return names

    def _bounded(self, source: str, names: tuple[str, ...]) -> tuple[str, ...]:
        """NAMES of the columns of a matrix, so that the table does not get too many."""
        if names in self._admitted:
            return names
        known = self._columns[source]
        new = {name for name in names if name and name not in known}
        if len(known) + len(new) <= MOST_COLUMNS:
            return names
        matrix = self.layout.matrices[source]
        if isinstance(matrix, Named):
            other = f"{matrix.prefix}_{OTHER}"
            return tuple(name if name in known else other for name in names)
        raise ContractError(
            f"{matrix.named_by or source}: {len(new)} new columns for {source}, and the table has "
            f"{len(known)} of at most {MOST_COLUMNS}"
        )

    def add(self, part: Part) -> None:
        """Gathers rows that have passed `check`."""
        for source, names in part.names.items():
            if names not in self._admitted:
                self._columns[source].update((name, None) for name in names if name)
                if len(self._admitted) >= _MOST_ADMITTED:
                    self._admitted.clear()
                self._admitted.add(names)
        self.parts.append(part)

    def take(
        self, texts: Texts, places: Sequence[Place], stacks: NDArray[np.uint64] | None
    ) -> pa.Table:
        """All rows, and none are gathered any more. STACKS are the ids of their stacks."""
        rows = JoinedRows(self.layout, self.parts, texts)
        self.parts = []
        made = rows.common(places)
        for column in self.layout.columns:
            made[column.name] = (
                pa.array(stacks) if column.form is Form.STACK else rows.column(column)
            )
        for it in self.layout.derived:
            made[it.name] = pa.array(signed(it.make(rows).astype(np.int64, copy=False)))
        later: dict[str, pa.Array] = {}
        for source, columns in self._columns.items():
            expected = set(self.layout.matrices[source].expected)
            for name, values in zip(columns, rows.matrix(source, columns), strict=True):
                (made if name in expected else later)[name] = pa.array(values)
        return pa.table(made | later)


def _values(batch: Batch, layout: TableLayout) -> Any:  # noqa: ANN401  columns, or an array
    """The arrays of the batch's rows by name."""
    values: Any = batch.events if layout.time_source else batch.columns
    if not len(values):
        raise ContractError(f"{batch.rows}: rows came as messages, and a colony reads columns")
    return values
