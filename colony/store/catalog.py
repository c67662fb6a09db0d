"""Where the rows are: generations in the hot file, sealed segments beside it. And which segments
go when there is too much of them. Decisions alone: it neither reads nor writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from coral.colony.store.settings import Settings, Tier, tier_of

_DAY_NS: Final = 86_400 * 10**9

Columns = tuple[tuple[str, str], ...]
"""Names and DuckDB's types."""


@dataclass(slots=True)
class Generation:
    """A table of the hot file. One of each rows' table is open: the newest, until it is full."""

    table: str
    number: int
    opened_ns: int
    rows: int = 0
    size_bytes: int = 0  # as Arrow holds it in memory
    columns: Columns = ()
    accepts: set[Columns] = field(default_factory=set)
    """Columns of rows that go in without a change."""
    closing: str = ""
    """How everything stood when it was closed, as JSON: the last of its rows are of the transaction
    before that. Empty while it is open. Its segment tells a hot file that has to begin anew."""

    @property
    def name(self) -> str:
        """The table's name in the hot file."""
        return f"hot_{self.table}_{self.number}"

    def is_full(self, settings: Settings, now_ns: int) -> bool:
        """Whether nothing is added any more."""
        age_s = (now_ns - self.opened_ns) / 1e9
        return self.rows > 0 and (
            bool(self.closing)
            or self.rows >= settings.seal_rows
            or self.size_bytes >= settings.seal_bytes
            or age_s >= settings.seal_after_s[tier_of(self.table)]
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A Parquet file with the rows of one generation, sorted. `columns` is equal for files that
    have the same columns. `path` is relative to the store's directory."""

    table: str
    generation: int
    path: str
    columns: str
    from_ns: int
    to_ns: int
    rows: int
    size_bytes: int
    sealed_ns: int

    @property
    def tier(self) -> Tier:
        """That of its table."""
        return tier_of(self.table)

    def overlaps(self, from_ns: int | None, until_ns: int | None) -> bool:
        """Whether it may have rows of FROM_NS <= time_ns < UNTIL_NS."""
        return (until_ns is None or self.from_ns < until_ns) and (
            from_ns is None or self.to_ns >= from_ns
        )


@dataclass
class Catalog:
    """What the hot file's tables `generations` and `segments` say, at hand for the writer."""

    generations: list[Generation] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def open_generation(self, table: str) -> Generation | None:
        """The newest one of TABLE; None where it has none."""
        mine = [it for it in self.generations if it.table == table]
        return max(mine, key=lambda it: it.number, default=None)

    def to_seal(self, settings: Settings, now_ns: int) -> Generation | None:
        """The oldest one that is full, or has a newer beside it."""
        newest: dict[str, int] = {}
        for it in self.generations:
            newest[it.table] = max(newest.get(it.table, 0), it.number)
        waiting = [
            it
            for it in self.generations
            if it.rows and (it.number < newest[it.table] or it.is_full(settings, now_ns))
        ]
        return min(waiting, key=lambda it: it.number, default=None)

    def count_by_tier(self) -> Mapping[Tier, int]:
        """Of the segments."""
        found = Counter(it.tier for it in self.segments)
        return {tier: found[tier] for tier in Tier}

    def bytes_by_tier(self) -> Mapping[Tier, int]:
        """Of the segments."""
        sums = dict.fromkeys(Tier, 0)
        for it in self.segments:
            sums[it.tier] += it.size_bytes
        return sums

    def to_retire(self, settings: Settings, now_ns: int, other_bytes: int) -> Sequence[Segment]:
        """What is older than its tier is kept; then as many as the cap demands, the rawest first,
        of those the oldest. OTHER_BYTES count too, and stay."""
        old = [it for it in self.segments if is_old(it, settings, now_ns)]
        kept = [it for it in self.segments if it not in old]
        over = sum(it.size_bytes for it in kept) + other_bytes - settings.most_bytes
        return [*old, *_first_bytes(kept, over)]


def is_old(segment: Segment, settings: Settings, now_ns: int) -> bool:
    """Whether all rows of SEGMENT are older than its tier is kept. An agent whose clock is ahead
    does not make them younger than the file."""
    keep_ns = int(settings.keep_s[segment.tier] * 1e9)
    if segment.tier is Tier.HOUR and not segment.table.endswith(f"_{Tier.HOUR}"):
        keep_ns += _DAY_NS  # what others refer to: stored again once a day
    return min(segment.to_ns, segment.sealed_ns) + keep_ns < now_ns


def segment_path(table: str, generation: int) -> Path:
    """Relative to the store's directory. No number comes twice."""
    return Path("segments", table, f"{generation:010d}.parquet")


def _first_bytes(segments: Iterable[Segment], size_bytes: int) -> Iterable[Segment]:
    """The first to go of SEGMENTS, with SIZE_BYTES or more together."""
    tiers = list(Tier)
    for it in sorted(segments, key=lambda it: (tiers.index(it.tier), it.to_ns, it.generation)):
        if size_bytes <= 0:
            return
        size_bytes -= it.size_bytes
        yield it
