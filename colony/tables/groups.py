"""Rows added up by key: what a rollup has of one table and has not handed over yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.colony.tables.layout import Role
from coral.colony.tables.lookup import find

_FEW: Final = 1024
_MOST_SMALL: Final = 2**32 - 1
_MOST: Final = 2**63 - 1

_NOTHING: Final = np.zeros(0, np.uint64)


class Groups:
    """Groups of rows, each in a slot, from 0: `keys`, of the types given by name, and figures. A
    group is known by a hash of 64 bits of its keys."""

    def __init__(self, types: Mapping[str, type[np.integer[Any]]]) -> None:
        self.size = 0
        self.keys: dict[str, NDArray[Any]] = {
            name: np.zeros(_FEW, dtype) for name, dtype in types.items()
        }
        self._types = types
        self._figures: dict[str, _Figure] = {}
        # The hashes of the groups, sorted, and the slot of each.
        self._hashes = _NOTHING
        self._slots = np.zeros(0, np.int64)

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""
        figures = sum(it.values.nbytes for it in self._figures.values())
        keys = sum(values.nbytes for values in self.keys.values())
        return figures + keys + self._hashes.nbytes + self._slots.nbytes

    @property
    def figures(self) -> Mapping[str, NDArray[Any]]:
        """The figures of all groups, of shape (size,), by name; only those that are not all 0."""
        return {name: it.of(self.size) for name, it in self._figures.items()}

    def add(
        self,
        hashes: NDArray[np.uint64],
        keys: Mapping[str, NDArray[Any]],
        figures: Mapping[str, tuple[Role, NDArray[np.int64]]],
    ) -> None:
        """Adds n rows: their hashes, keys and figures, of shape (n,). Equal hashes have equal
        keys."""
        order = np.argsort(hashes)
        ordered = hashes[order]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        slots = self._slots_of(ordered[starts], keys, order[starts])
        for name, (role, values) in figures.items():
            if not values.any():
                continue
            figure = self._figures.get(name)
            if figure is None:
                figure = self._figures[name] = _Figure(role)
            figure.add(slots, figure.joined(values[order], starts), self.size)

    def crowded(
        self, hashes: NDArray[np.uint64], key: str, values: NDArray[Any], most: int
    ) -> NDArray[np.bool_] | None:
        """Of n rows to come, with HASHES and VALUES of KEY, ids from 0: those of new groups, where
        there would be more than MOST groups of their value. None where there are none."""
        if self.size + len(hashes) <= most:
            return None
        size = int(max(values.max(), self.keys[key][: self.size].max(initial=0))) + 1
        there = np.bincount(self.keys[key][: self.size], minlength=size)
        over = there + np.bincount(values, minlength=size) > most
        if not over.any():
            return None
        is_new = over[values]
        is_new[is_new] = ~find(self._hashes, hashes[is_new])[1]
        _, first = np.unique(hashes[is_new], return_index=True)
        coming = np.bincount(values[is_new][first], minlength=size)
        found: NDArray[np.bool_] = is_new & (there + coming > most)[values]
        return found if found.any() else None

    def without(self, mask: NDArray[np.bool_]) -> Groups:
        """The groups that are not in MASK, of shape (size,)."""
        kept = np.flatnonzero(~mask)
        left = Groups(self._types)
        if not len(kept):
            return left
        left.size = len(kept)
        left.keys = {name: values[kept] for name, values in self.keys.items()}
        for name, it in self._figures.items():
            left._figures[name] = it.take(kept, self.size)
        places = np.full(self.size, -1)
        places[kept] = np.arange(len(kept))
        slots = places[self._slots]
        left._hashes, left._slots = self._hashes[slots >= 0], slots[slots >= 0]
        return left

    def _slots_of(
        self,
        hashes: NDArray[np.uint64],
        keys: Mapping[str, NDArray[Any]],
        rows: NDArray[np.intp],
    ) -> NDArray[np.int64]:
        """The slots of the groups with HASHES, of shape (k,), sorted and distinct. Groups that are
        new get one, and the keys of their ROWS."""
        at, known = find(self._hashes, hashes)
        slots = np.empty(len(hashes), np.int64)
        slots[known] = self._slots[at[known]]
        is_new = ~known
        if added := int(np.count_nonzero(is_new)):
            begin, self.size = self.size, self.size + added
            slots[is_new] = np.arange(begin, self.size)
            for name, values in self.keys.items():
                grown = self.keys[name] = _grown(values, self.size)
                grown[begin : self.size] = keys[name][rows[is_new]]
            self._hashes = np.insert(self._hashes, at[is_new], hashes[is_new])
            self._slots = np.insert(self._slots, at[is_new], slots[is_new])
        return slots


class _Figure:
    """One figure of all groups: a sum, the greatest, or the least that is not 0. Small ones take
    four bytes each."""

    def __init__(self, role: Role) -> None:
        self._role = role
        self.values: NDArray[Any] = np.zeros(0, np.uint32)

    def of(self, size: int) -> NDArray[Any]:
        """Those of the first SIZE groups."""
        self.values = _grown(self.values, size)
        return self.values[:size]

    def joined(self, values: NDArray[np.int64], starts: NDArray[np.intp]) -> NDArray[np.int64]:
        """VALUES of rows, of shape (n,), of which groups begin at STARTS: of shape (groups,)."""
        if len(starts) == len(values):
            return values
        if self._role is Role.LEAST:
            # 0 is no value: as an unsigned number, one less is the greatest.
            least = np.minimum.reduceat(values.view(np.uint64) - np.uint64(1), starts)
            return (least + np.uint64(1)).view(np.int64)
        join = np.add if self._role is Role.SUM else np.maximum
        made: NDArray[np.int64] = join.reduceat(values, starts)
        return made

    def add(self, slots: NDArray[np.int64], values: NDArray[np.int64], size: int) -> None:
        """VALUES of the groups in SLOTS, both of shape (k,), none twice; there are SIZE slots."""
        self.values = _grown(self.values, size)
        before = self.values[slots].astype(np.int64)
        made = _JOIN[self._role](before, values)
        least, most = int(made.min()), int(made.max())
        if least < 0:  # an agent that sends such counts is none of ours
            made, most = np.where(made < 0, _MOST, made), _MOST
        if most > _MOST_SMALL and self.values.dtype != np.int64:
            self.values = self.values.astype(np.int64)
        self.values[slots] = made

    def take(self, kept: NDArray[np.intp], size: int) -> _Figure:
        """That of the groups in the slots KEPT, of SIZE."""
        taken = _Figure(self._role)
        taken.values = self.of(size)[kept]
        return taken


def _least(before: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where((before == 0) | ((values > 0) & (values < before)), values, before)


_JOIN: Final[Mapping[Role, Callable[..., NDArray[np.int64]]]] = {
    Role.SUM: np.add,
    Role.MOST: np.maximum,
    Role.LEAST: _least,
}


def _grown(values: NDArray[Any], size: int) -> NDArray[Any]:
    """VALUES with room for SIZE, zeros at the end."""
    if len(values) >= size:
        return values
    room = max(_FEW, size + size // 4)
    return np.concatenate([values, np.zeros(room - len(values), values.dtype)])
