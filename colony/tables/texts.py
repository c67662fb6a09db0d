"""Text columns as numbers: every text once, rows hold its id."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

MOST_CHARACTERS: Final = 4096
"""Of one text; the rest is cut off."""
_FEW: Final = 4096


class Texts:
    """Texts by id, from 0, which is the empty one."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {"": 0}
        self._list = [""]

    def __len__(self) -> int:
        return len(self._list)

    def __getitem__(self, number: int) -> str:
        return self._list[number]

    def id(self, text: str) -> int:
        """The id of TEXT, which is added if it is new."""
        found = self._ids.get(text)
        return self._add(text) if found is None else found

    def ids(self, texts: Iterable[str]) -> NDArray[np.int32]:
        """The same of several."""
        known = self._ids
        found = [known[text] if text in known else self._add(text) for text in texts]
        return np.array(found, np.int32)

    def _add(self, text: str) -> int:
        text = text[:MOST_CHARACTERS]
        number = self._ids.setdefault(text, len(self._list))
        if number == len(self._list):
            self._list.append(text)
        return number

    def of_numbers(self, numbers: NDArray[Any], word: Callable[[int], str]) -> NDArray[np.int32]:
        """The ids of the words of NUMBERS, of shape (n,), unsigned. WORD is called once for each
        distinct number."""
        if not len(numbers):
            return np.zeros(0, np.int32)
        if int(numbers.max()) < _FEW:
            found = np.flatnonzero(np.bincount(numbers.astype(np.intp)))
            ids = np.zeros(int(found[-1]) + 1, np.int32)
            ids[found] = self.ids(map(word, found.tolist()))
            of_row: NDArray[np.int32] = ids[numbers]
            return of_row
        distinct, at = np.unique(numbers, return_inverse=True)
        return self.ids(map(word, distinct.tolist()))[at]

    def array(self, ids: NDArray[Any]) -> pa.DictionaryArray:
        """The texts of IDS, of shape (n,), as Arrow's: with a dictionary of only those."""
        used = np.zeros(len(self._list), bool)
        used[ids] = True
        places = np.cumsum(used, dtype=np.int32)
        places -= 1
        texts = self._list
        dictionary = [texts[number] for number in np.flatnonzero(used).tolist()]
        return pa.DictionaryArray.from_arrays(
            pa.array(places[ids]), pa.array(dictionary, pa.string())
        )


def joined(ids: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The ids of several lists one after the other, and where each begins."""
    sizes = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return flat, np.cumsum(sizes) - sizes
