"""Numbers in long texts of one line an entry, read without a Python object for each line."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_MOST_DIGITS: Final = 16
_BAD: Final = 0xFF
_DIGITS: Final = np.full(256, _BAD, np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
_DIGITS[np.frombuffer(b"ABCDEF", np.uint8)] = np.arange(10, 16)
_FEED: Final = ord("\n")


def lines(text: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the lines of TEXT (u8[n]) begin, and where the line feeds are that end them (i64[m]);
    what follows the last one is no line."""
    ends = np.flatnonzero(text == _FEED)
    starts = np.zeros(len(ends), np.int64)
    starts[1:] = ends[:-1] + 1
    return starts, ends


def next_byte(
    text: NDArray[np.uint8], wanted: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Where the byte WANTED is first in TEXT from STARTS on, and otherwise ENDS (i64[m])."""
    places = np.append(np.flatnonzero(text == ord(wanted)), len(text))
    found = places[np.searchsorted(places, starts)]
    return np.asarray(np.minimum(found, ends))


def hex_numbers(
    text: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The numbers that TEXT has from STARTS to ENDS in hexadecimal digits, and whether each is one
    (u64[m] and bool[m]): 1 to 16 digits, of either case, with or without 0x."""
    if not len(starts):
        return np.zeros(0, np.uint64), np.zeros(0, np.bool_)
    last = len(text) - 1
    prefixed = (ends - starts > 2) & (text[np.minimum(starts + 1, last)] == ord("x"))  # noqa: PLR2004
    starts = np.where(prefixed, starts + 2, starts)
    width = ends - starts
    good = (width > 0) & (width <= _MOST_DIGITS)
    numbers = np.zeros(len(starts), np.uint64)
    for n in range(int(min(width.max(), _MOST_DIGITS))):
        inside = n < width
        digit = _DIGITS[text[np.minimum(starts + n, last)]]
        good &= ~inside | (digit != _BAD)
        numbers = np.where(inside, numbers << np.uint64(4) | digit, numbers)
    return numbers, good


def slices(
    text: NDArray[np.uint8], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[bytes, NDArray[np.uint32]]:
    """The pieces of TEXT from STARTS to ENDS, ascending and apart, put together, and where each one
    begins there (u32[m+1]; the last is where they all end)."""
    edges = np.zeros(len(text) + 1, np.int8)
    edges[starts] += 1
    np.subtract.at(edges, ends, 1)
    inside = np.cumsum(edges[:-1], dtype=np.int8).view(np.bool_)  # each is 0 or 1
    del edges  # which is as long as the text
    at = np.zeros(len(starts) + 1, np.uint32)
    np.cumsum(ends - starts, out=at[1:], dtype=np.uint32)
    return text[inside].tobytes(), at
