"""Minutes and hours: rows added up as they arrive, in numpy.

A row belongs to the window that its `time_ns` lies in: `time_ns // width * width`. All figures can
be added up, so that several rows of one window and key are one as good as joined: a row that comes
after its window was handed over is handed over as a further row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coral.colony.tables.groups import Groups
from coral.colony.tables.layout import (
    AGENT,
    INTERVAL,
    PLACE,
    ROW_COUNT,
    SESSION,
    TABLES,
    TIME,
    Form,
    Level,
    Role,
    TableLayout,
    base_of,
)
from coral.colony.tables.lookup import hashed
from coral.colony.tables.texts import Texts

MOST_GROUPS: Final = 100_000
"""Rows of one agent and one table that are not handed over yet. What comes beyond is added up
without its texts, addresses and stacks, and beyond twice as many without anything but its session:
the sums stay exact, and a service that makes up routes does not fill the memory."""
_OPEN_ENDED: Final = frozenset({Form.TEXT, Form.ADDRESS, Form.STACK})
_MOST_IDLE_TEXTS: Final = 100_000


class Rollup:
    """The rollup of all tables to one level. For one thread at a time; it does not know what is
    stored. To keep a store exact:

    * In each transaction, `add` what is stored in it, then store what `take` returns for a
      watermark, which never goes back and is stored too. Then the store has, of each window that
      ends at or before the watermark, all rows that it has raw, and nothing of later windows.
    * After a restart, `add` all that is stored from the watermark on, rounded down to the start of
      a window: `time_ns >= watermark // width * width`.

    The rows of one level are the input of the next.
    """

    def __init__(self, level: Level) -> None:
        self.level = level
        self._tables: dict[str, _Rolled] = {}
        self._texts = Texts()
        self._trim_at = _MOST_IDLE_TEXTS

    @property
    def size_bytes(self) -> int:
        """What the groups take in memory."""
        return sum(it.groups.size_bytes for it in self._tables.values())

    @property
    def groups(self) -> int:
        """How many rows would be handed over, if all windows were over."""
        return sum(it.groups.size for it in self._tables.values())

    def add(self, table: str, rows: pa.Table) -> None:
        """Adds up rows of TABLE: raw ones, or a finer rollup's. Those of other tables than
        summaries' are left alone. NULL is 0 or ""."""
        layout = TABLES.get(base_of(table)[0])
        if layout is None or not layout.is_rolled_up or not rows.num_rows:
            return
        rolled = self._tables.get(layout.name)
        if rolled is None:
            rolled = self._tables[layout.name] = _Rolled(layout, self.level.width_ns)
        rolled.add(_Read(rows, self._texts))
        if len(self._texts) > self._trim_at:
            self._trim()
            self._trim_at = len(self._texts) + max(_MOST_IDLE_TEXTS, len(self._texts) // 2)

    def take(self, until_ns: int) -> Mapping[str, pa.Table]:
        """What was added up of the windows that end at or before UNTIL_NS, for each table that has
        any, by the rollup's name: rows of its `rollup_schema`, and of columns that came later.
        Texts are dictionaries. It is forgotten here."""
        taken = {}
        for name, rolled in self._tables.items():
            rows = rolled.take(until_ns, self._texts)
            if rows is not None:
                taken[self.level.name(name)] = rows
        if taken:
            self._trim()
        return taken

    def _trim(self) -> None:
        """Forgets texts that no group has any more, when they are many."""
        tables = self._tables.values()
        used = np.zeros(len(self._texts), bool)
        for it in tables:
            it.mark(used)
        if np.count_nonzero(used) + _MOST_IDLE_TEXTS > len(self._texts):
            return
        old, self._texts = self._texts, Texts()
        numbers = np.zeros(len(old), np.int32)
        kept = np.flatnonzero(used)
        numbers[kept] = self._texts.ids(map(old.__getitem__, kept.tolist()))
        for it in tables:
            it.renumber(numbers)


class _Read:
    """The columns of a table of Arrow, from wherever it comes, as arrays."""

    def __init__(self, rows: pa.Table, texts: Texts) -> None:
        self._rows = rows.unify_dictionaries().combine_chunks()
        self._texts = texts
        self.names = rows.column_names

    def __len__(self) -> int:
        count: int = self._rows.num_rows
        return count

    def texts(self, name: str) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        """A column of texts: their ids and their hashes, of shape (n,)."""
        texts, of_row = self._dictionary(name)
        ids = self._texts.ids(texts)
        # Python's hashes of texts are random in each process, so that nobody can make equal ones.
        hashes = np.array([hash(text) for text in texts], np.int64).view(np.uint64)
        return ids[of_row], hashes[of_row]

    def is_one_of(self, name: str, words: Sequence[str]) -> NDArray[np.bool_]:
        """Whether a column of texts has one of WORDS, of shape (n,)."""
        texts, of_row = self._dictionary(name)
        return np.array([text in words for text in texts])[of_row]

    def _dictionary(self, name: str) -> tuple[Sequence[str], NDArray[np.intp]]:
        """The texts of a column, and which of them each row has. The last is "", for NULL."""
        if name not in self.names:
            return [""], np.zeros(len(self), np.intp)
        column = self._rows.column(name).chunk(0)
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        texts = [*(text or "" for text in column.dictionary.to_pylist()), ""]
        indices = column.indices.fill_null(len(texts) - 1)
        return texts, indices.to_numpy().astype(np.intp)

    def numbers(self, name: str) -> NDArray[np.int64]:
        """A column of numbers or truths, of shape (n,)."""
        if name not in self.names:
            return np.zeros(len(self), np.int64)
        column = self._rows.column(name).chunk(0)
        if column.null_count:
            column = column.fill_null(False if pa.types.is_boolean(column.type) else 0)
        values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
        if values.dtype == np.uint64:
            return values.view(np.int64)
        return values.astype(np.int64, copy=False)


def _hashes(parts: Mapping[str, NDArray[Any]]) -> NDArray[np.uint64]:
    """Of rows by their PARTS, all of shape (n,) and 64 bits."""
    hashes = np.zeros(len(parts[TIME]), np.uint64)
    for values in parts.values():
        hashes = hashed(hashes, values)
    return hashes


class _Rolled:
    """One table's groups, of all windows that are not handed over."""

    def __init__(self, layout: TableLayout, width_ns: int) -> None:
        self._layout, self._width_ns = layout, width_ns
        own = [it.name for it in layout.key_columns if it.is_text]
        self._texts = (*PLACE, *own)
        self._numbers = tuple(it.name for it in layout.key_columns if not it.is_text)
        self._others = {*layout.schema.names, *layout.rollup_schema.names}
        every = {*self._texts, *self._numbers} - {AGENT, SESSION}
        open_ended = {it.name for it in layout.key_columns if it.form in _OPEN_ENDED}
        # What is given up of an agent's rows where there are too many groups of them, and where
        # there are too many still.
        self._given_up = (MOST_GROUPS, tuple(open_ended)), (2 * MOST_GROUPS, tuple(every))
        types: dict[str, type[np.integer[Any]]] = {TIME: np.int64}
        types |= dict.fromkeys(self._texts, np.int32) | dict.fromkeys(self._numbers, np.int64)
        self.groups = Groups(types)

    def add(self, rows: _Read) -> None:
        """Adds up ROWS."""
        times = rows.numbers(TIME)
        keys: dict[str, NDArray[Any]] = {TIME: times - times % self._width_ns}
        parts = dict(keys)  # of the hashes
        for name in self._texts:
            keys[name], parts[name] = rows.texts(name)
        for name in self._numbers:
            values = rows.numbers(name)
            if where := self._layout.key_where.get(name):
                values = values * rows.is_one_of(*where)
            keys[name] = parts[name] = values
        hashes = _hashes(parts)
        for most, names in self._given_up:
            crowded = self.groups.crowded(hashes, AGENT, keys[AGENT], most)
            if crowded is None:
                break
            for name in names:  # the empty text has the id and the hash 0
                keys[name] = np.where(crowded, 0, keys[name])
                parts[name] = np.where(crowded, 0, parts[name])
            hashes = _hashes(parts)
        self.groups.add(hashes, keys, self._figures(rows))

    def _figures(self, rows: _Read) -> Mapping[str, tuple[Role, NDArray[np.int64]]]:
        """What is added up, by name. A column of which the layout does not know is a matrix's."""
        roles = self._layout.figures
        figures = {
            name: (roles.get(name, Role.SUM), rows.numbers(name))
            for name in rows.names
            if name in roles or name not in self._others
        }
        is_raw = ROW_COUNT not in rows.names
        count = np.ones(len(rows), np.int64) if is_raw else rows.numbers(ROW_COUNT)
        return {ROW_COUNT: (Role.SUM, count), **figures}

    def take(self, until_ns: int, texts: Texts) -> pa.Table | None:
        """The rows of the windows that end at or before UNTIL_NS; None if there are none."""
        groups = self.groups
        over = groups.keys[TIME][: groups.size] <= until_ns - self._width_ns
        if not over.any():
            return None
        self.groups = groups.without(over)
        return self._table(groups, np.flatnonzero(over), texts)

    def _table(self, groups: Groups, taken: NDArray[np.intp], texts: Texts) -> pa.Table:
        keys = {name: values[taken] for name, values in groups.keys.items()}
        made = {TIME: pa.array(keys[TIME]), INTERVAL: pa.array(np.full(len(taken), self._width_ns))}
        made |= {name: texts.array(keys[name]) for name in PLACE}
        for it in self._layout.key_columns:
            values = keys[it.name]
            if it.is_text:
                made[it.name] = texts.array(values)
            elif it.type == pa.uint64():
                made[it.name] = pa.array(values.view(np.uint64))
            else:
                made[it.name] = pa.array(values.astype(it.type.to_pandas_dtype()))
        figures = groups.figures
        nothing = pa.array(np.zeros(len(taken), np.int64))
        for name in dict.fromkeys((ROW_COUNT, *self._layout.figures, *figures)):
            found = figures.get(name)
            made[name] = nothing if found is None else pa.array(found[taken].astype(np.int64))
        return pa.table(made)

    def mark(self, used: NDArray[np.bool_]) -> None:
        """Sets USED, of all texts, for those of the groups."""
        for name in self._texts:
            used[self.groups.keys[name][: self.groups.size]] = True

    def renumber(self, numbers: NDArray[np.int32]) -> None:
        """Texts have new ids: NUMBERS, by the old ones."""
        for name in self._texts:
            self.groups.keys[name] = numbers[self.groups.keys[name]]
