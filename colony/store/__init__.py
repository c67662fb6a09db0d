"""What the colony keeps: a hot DuckDB file, sealed Parquet segments, and the books of sessions.

See docs/colony.md. Only `rows.py` says what the store needs to know of rows.
"""

from coral.colony.store.errors import (
    StoreError,
    StoreInUseError,
    StoreUnavailableError,
)
from coral.colony.store.figures import Figures, State, families
from coral.colony.store.rows import Intake, Rollup, Rows
from coral.colony.store.settings import HOUR_NS, MINUTE_NS, Settings, Tier
from coral.colony.store.sources import Sources
from coral.colony.store.store import Store

__all__ = [
    "HOUR_NS",
    "MINUTE_NS",
    "Figures",
    "Intake",
    "Rollup",
    "Rows",
    "Settings",
    "Sources",
    "State",
    "Store",
    "StoreError",
    "StoreInUseError",
    "StoreUnavailableError",
    "Tier",
    "families",
]
