"""Which columns of a table are one histogram, and between which values each counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_SLOT: Final = re.compile(r"_(?:e(\d{1,2})|le_(\d{1,20}|inf))$")


@dataclass(frozen=True)
class Histogram:
    """A histogram that has a column for each slot, in the order of the values they count.

    `columns` are those that every table has; `of` finds those that came later. `total`, `least` and
    `most` are the columns with the sum of all values, the smallest and the greatest, or "" where
    there are none.
    """

    name: str
    unit: str  # "ns", "us"
    columns: tuple[str, ...]
    total: str = ""
    least: str = ""
    most: str = ""

    @property
    def is_log2(self) -> bool:
        """Whether its slots are powers of two, the last of which counts as one too."""
        return self.columns[-1].startswith(f"{self.name}_e")

    def of(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of NAMES, columns of a table, that belong to it, by the values they count."""
        size = len(self.name)
        found = [
            (_upper(name[size:]), name)
            for name in names
            if name.startswith(self.name) and _SLOT.fullmatch(name[size:])
        ]
        return tuple(name for _, name in sorted(found))

    def edges(self, names: Iterable[str] | None = None) -> tuple[tuple[float, ...], ...]:
        """The lower and the upper ends of the slots NAMES, in the histogram's unit. The first
        begins at 0. The last of bounds has no upper end: inf."""
        columns = self.columns if names is None else self.of(names)
        upper = tuple(_upper(name[len(self.name) :]) for name in columns)
        return (0.0, *upper[:-1]), upper


def _upper(slot: str) -> float:
    """The upper end of the slot that is called `..._e12` or `..._le_500`."""
    found = _SLOT.fullmatch(slot)
    if not found:
        raise ValueError(f"{slot} is no slot of a histogram")
    exponent, bound = found.groups()
    if exponent:
        return float(2 ** (int(exponent) + 1))
    return math.inf if bound == "inf" else float(bound)
