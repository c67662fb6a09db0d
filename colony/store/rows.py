"""What the store needs to know about rows: how deliveries become tables, and tables rollups. The
store itself knows no kind of collector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import pyarrow as pa

from coral.colony.delivery import Delivery
from coral.colony.store.settings import LOSSES

LOSSES_SCHEMA: Final = pa.schema(
    [
        ("time_ns", pa.int64()),
        ("time_from_ns", pa.int64()),
        ("time_to_ns", pa.int64()),
        *((name, pa.string()) for name in ("agent", "session", "service", "kind", "stage")),
        ("in_kernel", pa.bool_()),
        ("count", pa.uint64()),
    ]
)
"""The rows that the store makes itself, one for a session, a stage and a transaction. `time_ns` is
`time_to_ns`, for those that look for rows of a window."""


class Intake(Protocol):
    """Gathers the rows of deliveries."""

    def add(self, delivery: Delivery) -> None:
        """Takes the rows of DELIVERY, all or none. Whatever it raises, the rows count as lost."""

    def take(self) -> Mapping[str, pa.Table]:
        """The rows since the last call, by table."""

    def confirm(self, stored: Mapping[str, pa.Table]) -> None:
        """What was taken is durable: rows that others refer to need not come again."""


class Rollup(Protocol):
    """Adds rows up by intervals of one width. Its rows add up in turn, so one interval may come in
    several of them."""

    def add(self, table: str, rows: pa.Table) -> None:
        """Takes ROWS of TABLE; those of tables that are not rolled up are left alone."""

    def take(self, until_ns: int) -> Mapping[str, pa.Table]:
        """Everything added of intervals that begin before UNTIL_NS, by the rollup's table."""


class Rows(Protocol):
    """What rows are made of."""

    def intake(self) -> Intake:
        """A new, empty one."""

    def rollup(self, width_ns: int) -> Rollup:
        """A new, empty one; for MINUTE_NS of raw rows, for HOUR_NS of rows of minutes."""

    def order(self, table: str) -> Sequence[str]:
        """The columns by which rows of a sealed segment are sorted."""

    def schema(self, table: str) -> pa.Schema | None:
        """The columns of TABLE, also where there is no row yet; None if there is no such table."""

    def rolled_up(self) -> Sequence[str]:
        """The names of the raw tables that have rollups."""


@dataclass(frozen=True, slots=True)
class WithLosses:
    """The rows of OTHERS, and the store's own."""

    others: Rows

    def intake(self) -> Intake:
        """Of the others."""
        return self.others.intake()

    def rollup(self, width_ns: int) -> Rollup:
        """Of the others."""
        return self.others.rollup(width_ns)

    def order(self, table: str) -> Sequence[str]:
        """See `Rows`."""
        return ("service", "agent", "time_ns") if table == LOSSES else self.others.order(table)

    def schema(self, table: str) -> pa.Schema | None:
        """See `Rows`."""
        return LOSSES_SCHEMA if table == LOSSES else self.others.schema(table)

    def rolled_up(self) -> Sequence[str]:
        """Of the others."""
        return self.others.rolled_up()
