"""The colony's tables: their columns, what fills them, and their rollups."""

from coral.colony.tables.contract_rows import ContractRows
from coral.colony.tables.histograms import Histogram
from coral.colony.tables.intake import Intake
from coral.colony.tables.layout import (
    HOUR,
    LEVELS,
    MINUTE,
    STACKS,
    TABLES,
    Level,
    Role,
    TableLayout,
    base_of,
    schema_of,
)
from coral.colony.tables.quantiles import counts_of, quantiles
from coral.colony.tables.rollup import Rollup

__all__ = [
    "HOUR",
    "LEVELS",
    "MINUTE",
    "STACKS",
    "TABLES",
    "ContractRows",
    "Histogram",
    "Intake",
    "Level",
    "Role",
    "Rollup",
    "TableLayout",
    "base_of",
    "counts_of",
    "quantiles",
    "schema_of",
]
