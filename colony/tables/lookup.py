"""Finding numbers and keys again, by array."""

from __future__ import annotations

import secrets
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_FACTOR: Final = np.uint64(secrets.randbits(64) | 1)


def find(
    among: NDArray[np.uint64], values: NDArray[np.uint64]
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where VALUES, of shape (n,), stand AMONG sorted ones, or would stand; and whether they do."""
    at = np.searchsorted(among, values)
    found = np.zeros(len(values), bool)
    within = at < len(among)
    found[within] = among[at[within]] == values[within]
    return at, found


def hashed(hashes: NDArray[np.uint64], values: NDArray[Any]) -> NDArray[np.uint64]:
    """HASHES of the columns before, with VALUES, of 64 bits, as the next: both of shape (n,). They
    are others in every process, so that nobody can choose values with equal ones."""
    mixed = (hashes ^ values.view(np.uint64)) * _FACTOR
    return mixed ^ (mixed >> np.uint64(32))
