"""Tools to make columns of summaries: the table of strings, the busiest rows, sums by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Strings:
    """The strings of a batch, each once; columns and records hold their indices. Index 0 is the
    empty string, so that a column of empty strings is all zeros, which costs nothing on the wire.
    """

    def __init__(self) -> None:
        self._indices = {"": 0}

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def table(self) -> tuple[str, ...]:
        """All strings so far, by index."""
        return tuple(self._indices)

    def index(self, text: str) -> int:
        """The index of TEXT, which is added if it is new."""
        return self._indices.setdefault(text, len(self._indices))

    def indices(self, values: NDArray[Any], text_of: Callable[[Any], str]) -> NDArray[np.uint32]:
        """The indices of the texts of VALUES, both of shape (n,). TEXT_OF is called once for each
        distinct value."""
        distinct, of_row = np.unique(values, return_inverse=True)
        indices = [self.index(text_of(value)) for value in distinct.tolist()]
        return np.array(indices, np.uint32)[of_row]


def split_top(figures: NDArray[Any], top: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The numbers of rows by FIGURES, of shape (n,), the greatest first: the first TOP, and the
    rest. With TOP 0, all, and none."""
    order = np.argsort(figures, kind="stable")[::-1]
    return (order[:top], order[top:]) if top else (order, order[:0])


def with_row(
    columns: Mapping[str, NDArray[Any]], values: Mapping[str, Any]
) -> dict[str, NDArray[Any]]:
    """COLUMNS of shape (n,) or (n, width) with one more row of VALUES, which are zero where not
    given."""
    longer = {}
    for name, column in columns.items():
        row = np.zeros((1, *column.shape[1:]), column.dtype)
        row[0] = values.get(name, 0)
        longer[name] = np.concatenate([column, row])
    return longer


def group(keys: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Groups of rows with equal KEYS, of shape (n,), in the order of their first rows: the number
    of the first row of each group, (k,), and the group of each row, (n,)."""
    _, first, of_row = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return first[order], place[of_row]


def sum_by_group(values: NDArray[Any], of_row: NDArray[np.intp], groups: int) -> NDArray[Any]:
    """The sums of VALUES, of shape (n, ...), over the rows of each group, of shape (groups, ...).
    OF_ROW is the group of each row; no group may be empty."""
    order = np.argsort(of_row, kind="stable")
    starts = np.searchsorted(of_row[order], np.arange(groups))
    sums: NDArray[Any] = np.add.reduceat(values[order], starts, axis=0)
    return sums
