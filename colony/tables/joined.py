"""The rows of several deliveries as one table: arrays joined, indices made to point into one table
of texts, matrices of different shapes brought into the same columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coral.colony.tables.layout import (
    INTERVAL,
    PLACE,
    SAMPLE_EVERY,
    TIME,
    Column,
    Form,
    TableLayout,
)
from coral.colony.tables.lookup import hashed
from coral.colony.tables.places import Place
from coral.colony.tables.texts import Texts, joined
from coral.views.addresses import address_text

_MOST_BIGINT: Final = 2**63 - 1
_SCOPE: Final = "scope_id"


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one delivery, checked.

    `values` are its arrays by name. `strings` are the ids of the batch's strings, of shape (k,);
    `places` those of the place that its rows have in common, then of those of its resources;
    `resources`, of shape (count,), says which of them each row is of. `names` are those of the
    columns of each matrix.
    """

    values: Mapping[str, NDArray[Any]]
    count: int
    time_ns: int
    interval_ns: int
    sample_every: int
    strings: NDArray[np.int32]
    places: NDArray[np.int32]
    resources: NDArray[np.uint32]
    names: Mapping[str, tuple[str, ...]]


class JoinedRows(Mapping[str, NDArray[Any]]):
    """The rows of PARTS, at least one, of one table: a mapping of their columns, of shape (n,), by
    their names in the batches. TEXTS are what ids stand for."""

    def __init__(self, layout: TableLayout, parts: Sequence[Part], texts: Texts) -> None:
        self._layout, self._parts, self._texts = layout, parts, texts
        self._once = {it.source for it in layout.columns if it.form is Form.EACH_ROW}
        self._counts = np.array([part.count for part in parts])
        self._size = int(self._counts.sum())
        self._strings, starts = joined([part.strings for part in parts])
        self._starts = np.repeat(starts, self._counts)

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name in self._once:
            return np.repeat(self._single(name), self._counts)
        return np.concatenate([part.values[name] for part in self._parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0].values)

    def __len__(self) -> int:
        return len(self._parts[0].values)

    def common(self, places: Sequence[Place]) -> dict[str, pa.Array]:
        """The columns that all tables have, in their order. PLACES are by id."""
        parts, texts = self._parts, self._texts
        made = {}
        if source := self._layout.time_source:
            made[TIME] = pa.array(self[source].astype(np.int64, copy=False))
        else:
            made[TIME] = self._repeated((it.time_ns for it in parts), np.int64)
            made[INTERVAL] = self._repeated((it.interval_ns for it in parts), np.int64)
        of_row = np.concatenate([part.places[part.resources] for part in parts])
        for name, of_place in zip(PLACE, zip(*places, strict=True), strict=True):
            made[name] = texts.array(texts.ids(of_place)[of_row])
        if self._layout.time_source:
            made[SAMPLE_EVERY] = self._repeated((it.sample_every for it in parts), np.uint32)
        return made

    def column(self, column: Column) -> pa.Array:
        """A column of the kind's own; not one of stacks."""
        made = _BY_FORM[column.form](self, column)
        return made if isinstance(made, pa.Array) else pa.array(made, column.type)

    def matrix(self, source: str, columns: Iterable[str]) -> NDArray[np.int64]:
        """The values of COLUMNS of the matrix SOURCE, of shape (columns, n); 0 where a batch does
        not have one."""
        all_columns = tuple(columns)
        made = np.zeros((len(all_columns), self._size), np.int64)
        begin = 0
        for part in self._parts:
            values, end = part.values[source], begin + part.count
            at = _positions(all_columns, part.names[source])
            if isinstance(at, slice):
                made[at, begin:end] = values.T
            else:
                for position, number in at:
                    made[position, begin:end] += values[:, number].astype(np.int64)
            begin = end
        return signed(made)

    def text(self, column: Column) -> pa.Array:
        """Text to which the batches have indices."""
        return self._texts.array(self._strings[self[column.source] + self._starts])

    def word(self, column: Column) -> pa.Array:
        """Words for numbers."""
        assert column.word  # noqa: S101  a column of that form has one
        return self._texts.array(self._texts.of_numbers(self[column.source], column.word))

    def number(self, column: Column) -> NDArray[Any]:
        """Numbers as they are."""
        values = self[column.source]
        is_count = column.type == _BIGINT and values.dtype.kind == "u"
        return signed(values) if is_count else values

    def truth(self, column: Column) -> NDArray[np.bool_]:
        """Numbers that are 0 or 1."""
        truths: NDArray[np.bool_] = self[column.source] != 0
        return truths

    def address(self, column: Column) -> pa.Array:
        """Addresses of 128 bits. Each distinct one becomes text once."""
        high = column.source
        names = [high, f"{high.removesuffix('_high')}_low"]
        if _has(self._parts[0].values, _SCOPE):
            names.append(_SCOPE)
        parts = [self[name].astype(np.uint64, copy=False) for name in names]
        hashes = np.zeros(self._size, np.uint64)
        for part in parts:
            hashes = hashed(hashes, part)
        _, first, of_row = np.unique(hashes, return_index=True, return_inverse=True)
        each = zip(*(part[first].tolist() for part in parts), strict=True)
        ids = self._texts.ids(address_text(*values) for values in each)
        return self._texts.array(ids[of_row])

    def first_row(self, column: Column) -> NDArray[np.int64]:
        """What a batch has once, in its first row, and 0 in the others: so it adds up."""
        made = np.zeros(self._size, np.uint64)
        made[np.cumsum(self._counts) - self._counts] = self._single(column.source)
        return signed(made)

    def _single(self, name: str) -> NDArray[np.uint64]:
        values = (part.values[name] for part in self._parts)
        return np.array([it[0] if len(it) else 0 for it in values], np.uint64)

    def _repeated(self, values: Iterable[int], dtype: type[np.integer[Any]]) -> pa.Array:
        return pa.array(np.repeat(np.array(list(values), dtype), self._counts))


_BY_FORM: Final[Mapping[Form, Callable[[JoinedRows, Column], Any]]] = {
    Form.TEXT: JoinedRows.text,
    Form.WORD: JoinedRows.word,
    Form.NUMBER: JoinedRows.number,
    Form.TRUTH: JoinedRows.truth,
    Form.ADDRESS: JoinedRows.address,
    Form.EACH_ROW: JoinedRows.number,
    Form.FIRST_ROW: JoinedRows.first_row,
}
_BIGINT: Final = pa.int64()


def signed(values: NDArray[Any]) -> NDArray[np.int64]:
    """Counts of 64 bits as SQL's BIGINT: its greatest value for what is greater."""
    as_signed: NDArray[np.int64] = values.view(np.int64)
    if as_signed.size and int(as_signed.min()) < 0:
        return np.where(as_signed < 0, np.int64(_MOST_BIGINT), as_signed)
    return as_signed


def _has(values: Any, name: str) -> bool:  # noqa: ANN401  columns, or an array with fields
    return name in (values.dtype.names if isinstance(values, np.ndarray) else values)


@lru_cache(4096)
def _positions(
    columns: tuple[str, ...], names: tuple[str, ...]
) -> slice | tuple[tuple[int, int], ...]:
    """Where the columns NAMES of a matrix are among COLUMNS: all of one span, or the position of
    each beside its number in the matrix. One without a name is nowhere."""
    at = {name: position for position, name in enumerate(columns)}
    found = [at.get(name, -1) for name in names]
    if found and -1 not in found and found == list(range(found[0], found[0] + len(found))):
        return slice(found[0], found[0] + len(found))
    return tuple((position, number) for number, position in enumerate(found) if position >= 0)
