"""What an answer is read from, as this package needs it; `coral.colony.store` has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import duckdb

T = TypeVar("T")


class Missing(Protocol):
    """Rows that were stored, and that somebody else has deleted or overwritten."""

    @property
    def table(self) -> str:
        """Whose."""

    @property
    def rows(self) -> int:
        """How many."""

    @property
    def from_ns(self) -> int:
        """The time of the first."""

    @property
    def to_ns(self) -> int:
        """The time of the last."""


class Sources(Protocol):
    """The tables as one snapshot has them: hot rows and sealed segments as one."""

    def columns(self, table: str) -> Sequence[str]:
        """The columns that any row of TABLE has."""

    def rows(self, table: str, from_ns: int, to_ns: int) -> str:
        """SQL that selects all rows of TABLE in this window, and perhaps others."""

    def hot(self, table: str) -> str:
        """SQL that selects the rows that are in no segment yet."""

    def files(self, table: str, from_ns: int, to_ns: int) -> Sequence[Path]:
        """The segments with all other rows of TABLE in this window. They can be read for a minute
        even if they are deleted meanwhile."""

    def kept_from_ns(self, table: str) -> int | None:
        """When the oldest row of TABLE is from; None where it has none."""

    def watermark_ns(self, width_ns: int) -> int:
        """Up to when rollups of this width have everything that raw rows have."""

    @property
    def tables(self) -> Sequence[str]:
        """The names of all tables that have rows, and of the store's own."""

    @property
    def missing(self) -> Sequence[Missing]:
        """What was asked for so far and is not there any more."""

    committed_ns: int
    """When the snapshot was committed."""


class Reads(Protocol):
    """Where snapshots come from."""

    async def snapshot(
        self, work: Callable[[duckdb.DuckDBPyConnection, Sources], T], *, deadline_s: float
    ) -> T:
        """Runs WORK in a thread, in one read transaction. Raises TimeoutError at the deadline."""
