"""Stacks of profiles by an id that says what their frames are, and their frames, which are stored
once for many rows.

The id of a stack is a hash of its frames: function, module, build id and flags of each, and the
address where there is no function. It is the same on every machine and in every version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from coral.colony.tables.layout import STACKS_SCHEMA
from coral.colony.tables.lookup import find
from coral.colony.tables.texts import Texts

_MOST_KNOWN: Final = 1 << 20  # of 8 bytes each
_MOST_HASHES: Final = 1 << 17
_NS_PER_DAY: Final = 86_400 * 10**9
_TEXTS: Final = ("frame_function", "frame_module", "frame_build_id")


class Hashes:
    """Texts as stable numbers of 64 bits."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, texts: Texts, ids: NDArray[np.int32]) -> NDArray[np.uint64]:
        """Those of the texts of IDS, of shape (n,). Each text is hashed once."""
        found = np.zeros(len(texts), np.uint64)
        used = np.unique(ids)
        found[used] = [self._of(texts[number]) for number in used.tolist()]
        of_each: NDArray[np.uint64] = found[ids]
        return of_each

    def _of(self, text: str) -> int:
        known = self._known.get(text)
        if known is None:
            digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
            if len(self._known) >= _MOST_HASHES:
                self._known.clear()
            known = self._known[text] = int.from_bytes(digest, "little")
        return known


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_STEP: Final = np.uint64(0x9E3779B97F4A7C15)


def chained(hashes: NDArray[np.uint64], values: NDArray[Any]) -> NDArray[np.uint64]:
    """HASHES of what came before, and VALUES after it, both of shape (n,)."""
    return mixed(hashes * _STEP + values.astype(np.uint64, copy=False) + _STEP)


class Frames:
    """The stacks and frames of several batches, one after the other."""

    def __init__(
        self, parts: Sequence[tuple[Mapping[str, NDArray[Any]], NDArray[np.int32]]]
    ) -> None:
        """PARTS: the columns of each batch, which `check_stacks` has passed, and the ids of its
        strings."""
        self.lengths = _joined([values["stack_length"] for values, _ in parts]).astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        sizes = [len(values["frame_function"]) for values, _ in parts]
        bases = np.cumsum(sizes) - sizes
        of_stacks = [len(values["stack_length"]) for values, _ in parts]
        self.bases = np.cumsum(of_stacks) - of_stacks
        self.flat = _joined(
            [
                values["stack_frames"].astype(np.int64) + base
                for (values, _), base in zip(parts, bases.tolist(), strict=True)
            ]
        )
        self.texts = {
            name: _joined(
                [ids[_filled(values, name, n)] for (values, ids), n in _each(parts, sizes)]
            )
            for name in _TEXTS
        }
        self.numbers = {
            name: _joined([_filled(values, name, n) for (values, _), n in _each(parts, sizes)])
            for name in ("frame_address", "frame_flags")
        }

    def stack_ids(self, texts: Texts, hashes: Hashes) -> NDArray[np.uint64]:
        """The ids of all stacks, of shape (stacks,)."""
        of_frame = np.zeros(len(self.texts["frame_function"]), np.uint64)
        for name in _TEXTS:
            of_frame = chained(of_frame, hashes.of(texts, self.texts[name]))
        nameless = self.texts["frame_function"] == 0
        address = np.where(nameless, self.numbers["frame_address"], 0)
        of_frame = chained(chained(of_frame, self.numbers["frame_flags"]), address)
        # Frame by frame over all stacks, the longest first: those that go on are the first few.
        order = np.argsort(-self.lengths, kind="stable")
        lengths, starts = self.lengths[order], self.starts[order]
        going_on = len(order) - np.searchsorted(
            lengths[::-1], np.arange(lengths.max(initial=0)), "right"
        )
        ids = np.zeros(len(order), np.uint64)
        for place, few in enumerate(going_on.tolist()):
            frames = self.flat[starts[:few] + place]
            ids[:few] = chained(ids[:few], of_frame[frames])
        of_stack = np.empty_like(ids)
        of_stack[order] = ids
        return chained(of_stack, self.lengths)

    def table(
        self, stacks: NDArray[np.intp], ids: NDArray[np.uint64], time_ns: int, texts: Texts
    ) -> pa.Table:
        """The STACKS of these numbers, with their IDS, both of shape (n,): rows of
        `STACKS_SCHEMA`. Texts are dictionaries."""
        lengths = self.lengths[stacks]
        ends = np.cumsum(lengths)
        offsets = np.concatenate([np.zeros(1, np.int64), ends])
        index = np.repeat(self.starts[stacks] - (ends - lengths), lengths) + np.arange(offsets[-1])
        frames = self.flat[index]
        arrow = [
            *(texts.array(self.texts[name][frames]) for name in _TEXTS),
            pa.array(self.numbers["frame_address"][frames].astype(np.uint64)),
            pa.array(self.numbers["frame_flags"][frames].astype(np.uint32)),
        ]
        at = pa.array(offsets.astype(np.int32))
        return pa.table(
            [
                pa.array(ids),
                pa.array(np.full(len(ids), time_ns)),
                *(pa.ListArray.from_arrays(at, values) for values in arrow),
            ],
            names=STACKS_SCHEMA.names,
        )


class KnownStacks:
    """The ids of stacks whose frames are stored: as many as there is room for, of one day. What is
    forgotten is stored again, so that frames can be deleted by age, a day after the rows."""

    def __init__(self) -> None:
        self._ids = np.zeros(0, np.uint64)  # sorted
        self._day = 0

    def __len__(self) -> int:
        return len(self._ids)

    def new(self, ids: NDArray[np.uint64], time_ns: int) -> NDArray[np.bool_]:
        """Which of IDS are not known, at a row of TIME_NS."""
        if time_ns // _NS_PER_DAY > self._day:
            self._day = time_ns // _NS_PER_DAY
            self._ids = self._ids[:0]
        return ~find(self._ids, ids)[1]

    def add(self, ids: NDArray[np.uint64]) -> None:
        """They are stored."""
        ids = np.unique(ids)
        at, known = find(self._ids, ids)
        self._ids = np.insert(self._ids, at[~known], ids[~known])
        if len(self._ids) > _MOST_KNOWN:
            self._ids = ids[:_MOST_KNOWN]


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.uint32)


def _filled(values: Mapping[str, NDArray[Any]], name: str, size: int) -> NDArray[Any]:
    """A column of frames; zeros where it was not sent."""
    column = values[name]
    return column if len(column) else np.zeros(size, column.dtype)


def _each(parts: Sequence[Any], sizes: Sequence[int]) -> zip[tuple[Any, int]]:
    return zip(parts, sizes, strict=True)
