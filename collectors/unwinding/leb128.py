"""LEB128 numbers and the lengths of call frame instructions, of a whole buffer at once."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]

_MOST_BYTES: Final = 9  # 63 bits; longer ones occur in damaged files alone
# Bytes behind the buffer that may be read: callers add as many zeros.
PADDING: Final = 64
CONTINUES: Final = 0x80  # the bit of a byte that is not a number's last


def ends(data: Bytes) -> NDArray[np.int32]:
    """Where a LEB128 number that begins at each byte of DATA ends, (n,); n if it does not end."""
    size = len(data)
    last = np.where(data < CONTINUES, np.arange(1, size + 1, dtype=np.int32), np.int32(size))
    return np.minimum.accumulate(last[::-1])[::-1]


def unsigned(data: Bytes, at: Places) -> NDArray[np.int64]:
    """The ULEB128 numbers of DATA that begin at AT, (k,). Of longer ones than 63 bits the rest is
    ignored."""
    return _decode(data, at)[0]


def signed(data: Bytes, at: Places) -> NDArray[np.int64]:
    """The SLEB128 numbers of DATA that begin at AT, (k,)."""
    value, bits, last = _decode(data, at)
    negative = (last & 0x40) != 0
    return np.where(negative, value - np.left_shift(np.int64(1), np.minimum(bits, 62)), value)


def _decode(data: Bytes, at: Places) -> tuple[NDArray[np.int64], NDArray[np.int64], Bytes]:
    last = data[at]
    value = (last & 0x7F).astype(np.int64)
    bits = np.full(len(at), 7, np.int64)
    more = np.flatnonzero(last >= CONTINUES)
    for nth in range(1, _MOST_BYTES):
        if not len(more):
            break
        # A number at the very end may run past the padding: its last byte counts again.
        byte = data[np.minimum(at[more] + nth, len(data) - 1)]
        value[more] |= (byte & 0x7F).astype(np.int64) << np.int64(7 * nth)
        bits[more] += 7
        last[more] = byte
        more = more[byte >= CONTINUES]
    return value, bits, last


def after(data: Bytes, at: Places) -> Places:
    """Where the LEB128 numbers of DATA that begin at AT, (k,), end: AT plus their bytes."""
    found = at + 1
    more = np.flatnonzero(data[at] >= CONTINUES)
    for _ in range(_MOST_BYTES):
        if not len(more):
            break
        more = more[found[more] < len(data)]
        more_bytes = data[found[more]] >= CONTINUES
        found[more] += 1
        more = more[more_bytes]
    return found
