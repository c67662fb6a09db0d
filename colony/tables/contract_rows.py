"""What a store has to know about rows, by the contract: it names no kind, and neither does this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pyarrow as pa

from coral.colony.tables.intake import Intake
from coral.colony.tables.layout import LEVELS, STACK, STACKS, TABLES, TIME, base_of, schema_of
from coral.colony.tables.rollup import Rollup

_BY_WIDTH: Final = {level.width_ns: level for level in LEVELS}


class ContractRows:
    """How deliveries become tables, and tables rollups."""

    def intake(self) -> Intake:
        """A new one, empty."""
        return Intake()

    def rollup(self, width_ns: int) -> Rollup:
        """A new one, empty. Raises KeyError for a width that is no level's."""
        return Rollup(_BY_WIDTH[width_ns])

    def order(self, table: str) -> Sequence[str]:
        """The columns by which the rows of a segment of TABLE are sorted. Raises KeyError."""
        if table == STACKS:
            return (STACK, TIME)
        base, _ = base_of(table)
        columns = set(schema_of(table).names)
        return tuple(name for name in TABLES[base].sort_by if name in columns)

    def schema(self, table: str) -> pa.Schema | None:
        """The columns that TABLE always has; None if there is no such table."""
        return schema_of(table) if table == STACKS or base_of(table)[0] in TABLES else None

    def rolled_up(self) -> Sequence[str]:
        """The tables of raw rows that have rollups."""
        return tuple(name for name, table in TABLES.items() if table.is_rolled_up)
