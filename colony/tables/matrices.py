"""The columns of matrices: what each is called in tables, whatever the shape of a batch's matrix,
so that they can be added up over years.

A batch says what its columns are by further columns of its own, or the contract says it by numbers.
Each class here turns that into names; what it cannot name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from coral.client import ContractError
from coral.colony.tables.histograms import Histogram

Word = Any  # Callable[[int], str]: mypy takes a callable of a dataclass for a method

MOST_COLUMNS: Final = 128
"""Of one matrix, in one batch and in one table."""
_MOST_EXPONENT: Final = 63
_GOOD_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,39}")
OTHER: Final = "other"
NONE: Final = "none"


class Matrix(Protocol):
    """What the columns of a matrix are called."""

    @property
    def expected(self) -> Sequence[str]:
        """The names that every table has."""

    @property
    def histogram(self) -> Histogram | None:
        """The histogram that the columns are, if they are one."""

    @property
    def named_by(self) -> str:
        """The column of a batch that says what the matrix's columns are; empty where the contract
        does."""

    def names(self, width: int, named_by: NDArray[Any], strings: Sequence[str]) -> tuple[str, ...]:
        """The names of the columns of a matrix of WIDTH; several can have the same. Raises
        ContractError."""


@dataclass(frozen=True)
class Log2:
    """A Log2Histogram: `latency_e12` counts values from 2^12 up to 2^13; the first also those
    below, the last also those above."""

    prefix: str
    named_by: str
    exponents: Sequence[int]
    unit: str
    total: str = ""
    most: str = ""

    @property
    def expected(self) -> Sequence[str]:
        """The names that every table has."""
        return [f"{self.prefix}_e{exponent}" for exponent in self.exponents]

    @property
    def histogram(self) -> Histogram:
        """How the columns are read."""
        return Histogram(
            self.prefix, self.unit, tuple(self.expected), total=self.total, most=self.most
        )

    def names(self, width: int, named_by: NDArray[Any], _strings: Sequence[str]) -> tuple[str, ...]:
        """See Matrix."""
        first = int(named_by[0]) if len(named_by) else 0
        if len(named_by) > 1 or first + width - 1 > _MOST_EXPONENT:
            raise ContractError(
                f"{self.named_by}: a histogram of {width} slots from 2^{first} up goes beyond "
                f"2^{_MOST_EXPONENT}"
            )
        return tuple(f"{self.prefix}_e{first + slot}" for slot in range(width))


@dataclass(frozen=True)
class Bounds:
    """Counts by upper bounds: `rtt_us_le_500` counts what lies between the bound before and 500,
    and `rtt_us_le_inf` what lies above all."""

    prefix: str
    named_by: str
    bounds: Sequence[int]
    unit: str
    total: str = ""
    least: str = ""
    most: str = ""

    @property
    def expected(self) -> Sequence[str]:
        """The names that every table has."""
        return self._named(self.bounds)

    @property
    def histogram(self) -> Histogram:
        """How the columns are read."""
        return Histogram(
            self.prefix,
            self.unit,
            tuple(self.expected),
            total=self.total,
            least=self.least,
            most=self.most,
        )

    def names(self, width: int, named_by: NDArray[Any], _strings: Sequence[str]) -> tuple[str, ...]:
        """See Matrix."""
        if width != len(named_by) + 1 or width > MOST_COLUMNS:
            raise ContractError(
                f"{self.named_by}: {len(named_by)} bounds for {width} counts of {self.prefix}; at "
                f"most {MOST_COLUMNS} are possible, and one less bound than counts"
            )
        bounds = named_by.tolist()
        if any(lower >= upper for lower, upper in pairwise(bounds)):
            raise ContractError(f"{self.named_by}: the bounds do not ascend")
        return tuple(self._named(bounds))

    def _named(self, bounds: Iterable[int]) -> Sequence[str]:
        return [f"{self.prefix}_le_{bound}" for bound in (*bounds, "inf")]


@dataclass(frozen=True)
class Named:
    """Counts by names that the batch has among its strings: `errors_not_found`. A name that is no
    good name of a column, or one too many, counts as `other`; no name counts as `none`."""

    prefix: str
    named_by: str
    known: Sequence[str]

    @property
    def expected(self) -> Sequence[str]:
        """The names that every table has."""
        return [f"{self.prefix}_{name}" for name in dict.fromkeys((*self.known, OTHER))]

    @property
    def histogram(self) -> None:
        """None."""
        return

    def names(self, width: int, named_by: NDArray[Any], strings: Sequence[str]) -> tuple[str, ...]:
        """See Matrix."""
        if width > len(named_by) or width > MOST_COLUMNS:
            raise ContractError(
                f"{self.named_by}: {len(named_by)} names for {width} columns of {self.prefix}; at "
                f"most {MOST_COLUMNS} are possible"
            )
        texts = [strings[index].lower() or NONE for index in named_by[:width].tolist()]
        return tuple(
            f"{self.prefix}_{text if _GOOD_NAME.fullmatch(text) else OTHER}" for text in texts
        )


@dataclass(frozen=True)
class Numbered:
    """Counts by the numbers of an enumeration: `outcomes_complete`."""

    prefix: str
    word: Word
    count: int

    named_by: str = ""

    @property
    def expected(self) -> Sequence[str]:
        """The names that every table has."""
        return self._named(self.count)

    @property
    def histogram(self) -> None:
        """None."""
        return

    def names(
        self, width: int, _named_by: NDArray[Any], _strings: Sequence[str]
    ) -> tuple[str, ...]:
        """See Matrix."""
        if width > MOST_COLUMNS:
            raise ContractError(f"{self.prefix}: {width} columns, and at most {MOST_COLUMNS} are")
        return tuple(self._named(width))

    def _named(self, width: int) -> Sequence[str]:
        return [f"{self.prefix}_{self.word(number) or 'unspecified'}" for number in range(width)]


class Fields:
    """The fields of a message of counters, in the order of their numbers, by their own names."""

    named_by = ""
    histogram: Histogram | None = None

    def __init__(self, message: Any) -> None:  # noqa: ANN401  either of protobuf's descriptors
        fields = sorted(message.fields, key=lambda it: it.number)
        self._name = message.name
        self.expected: Sequence[str] = [field.name for field in fields]

    def names(
        self, width: int, _named_by: NDArray[Any], _strings: Sequence[str]
    ) -> tuple[str, ...]:
        """See Matrix. Fields that are newer than this program are left out, under the name ""."""
        if width > MOST_COLUMNS:
            raise ContractError(f"{self._name}: {width} counters, and at most {MOST_COLUMNS} are")
        known = tuple(self.expected[:width])
        return known + ("",) * (width - len(known))


class Shapes:
    """The names of the columns of one matrix, batch after batch: each shape is worked out once."""

    _MOST: Final = 1024

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        self._known: dict[tuple[object, ...], tuple[str, ...]] = {}

    def names(
        self, width: int, columns: Mapping[str, NDArray[Any]], strings: Sequence[str]
    ) -> tuple[str, ...]:
        """The names for a batch with these COLUMNS and STRINGS; an index among the columns that
        name others is within the strings. Raises ContractError."""
        if not width:
            return ()
        matrix = self._matrix
        named_by = columns[matrix.named_by] if matrix.named_by else _NOTHING
        texts: tuple[str, ...] = ()
        if isinstance(matrix, Named):
            texts = tuple(strings[index] for index in named_by[:MOST_COLUMNS].tolist())
        key = (width, named_by.tobytes() if not texts else len(named_by), texts)
        found = self._known.get(key)
        if found is None:
            found = matrix.names(width, named_by, strings)
            if len(self._known) >= self._MOST:
                self._known.clear()
            self._known[key] = found
        return found


_NOTHING: Final = np.zeros(0, np.uint32)
