"""What the store may use, and how long it keeps what. Figures alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from coral.colony.clock import now_ns

MINUTE_NS: Final = 60 * 10**9
HOUR_NS: Final = 60 * MINUTE_NS
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_DAY_S: Final = 86400.0


class Tier(StrEnum):
    """How raw rows are. The order is that in which they give way to the cap on bytes."""

    RAW = "raw"
    MINUTE = "1m"
    HOUR = "1h"


LOSSES: Final = "losses"
_AS_LONG_AS_ANYTHING: Final = frozenset({LOSSES, "cpu_stacks"})


def tier_of(table: str) -> Tier:
    """The tier of TABLE, by its name: `syscall_stats_1m` holds minutes. What rows of every tier
    refer to is kept as long as the last of them."""
    if table in _AS_LONG_AS_ANYTHING:
        return Tier.HOUR
    suffix = table.rpartition("_")[2]
    return Tier(suffix) if suffix in (Tier.MINUTE, Tier.HOUR) else Tier.RAW


def rolled_up(table: str, width_ns: int) -> str:
    """The table with the intervals of WIDTH_NS, a minute or an hour, of the raw TABLE."""
    return f"{table}_{Tier.MINUTE if width_ns == MINUTE_NS else Tier.HOUR}"


def _keep_s() -> Mapping[Tier, float]:
    return {Tier.RAW: _DAY_S / 4, Tier.MINUTE: 7 * _DAY_S, Tier.HOUR: 365 * _DAY_S}


def _seal_after_s() -> Mapping[Tier, float]:
    return {Tier.RAW: _DAY_S / 48, Tier.MINUTE: _DAY_S / 4, Tier.HOUR: _DAY_S}


@dataclass(frozen=True, slots=True)
class Settings:
    """`most_bytes` caps everything in the directory; the hot file itself never shrinks, so only
    sealed segments give way. `memory_bytes` is DuckDB's limit, for the writer, the sealing and all
    readers together."""

    keep_s: Mapping[Tier, float] = field(default_factory=_keep_s)
    most_bytes: int = 64 * _GIB
    memory_bytes: int = 256 * _MIB
    commit_s: float = 1.0
    """How long rows wait for a transaction, at most."""
    commit_bytes: int = 16 * _MIB
    """So many bytes of deliveries do not wait so long."""
    queue_bytes: int = 32 * _MIB
    """Beyond this, `Store.room` waits."""
    seal_rows: int = 1_000_000
    seal_bytes: int = 256 * _MIB
    """A generation of so many rows, or of so many bytes in memory, is sealed."""
    seal_after_s: Mapping[Tier, float] = field(default_factory=_seal_after_s)
    """One that is so old is sealed, whatever its size."""
    lateness_s: float = 20.0
    """How long after its end a minute is rolled up. What comes later makes rows of its own."""
    linger_s: float = 60.0
    """How long the file of a segment stays after the segment is gone, for queries elsewhere."""
    readers: int = 4
    """How many read at a time; the others wait."""
    retry_s: float = 0.5
    most_retry_s: float = 5.0
    """After a failed transaction, the pause before the next; it doubles up to the second."""
    known_ended_s: float = 2 * _DAY_S
    """How long the standing of an ended session is at hand. It is in the table `ledger` longer."""
    known_lost_s: float = 14 * _DAY_S
    """The same, of a session that went with its agent: an agent that was only cut off has it."""
    clock_ns: Callable[[], int] = now_ns
