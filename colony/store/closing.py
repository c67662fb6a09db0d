"""What a segment says of the moment when its generation was closed, so that a hot file that has to
begin anew goes on from there: nothing that is sealed is taken or rolled up again.

Of raw rows that is how their sessions stood, of rollups up to when they were made. What was in the
hot file alone is lost with it, and no session claims that it is stored.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import pyarrow as pa

from coral.colony.store.book import LEDGER_SCHEMA, Book, Entry, Key, entries_of, ledger_lines
from coral.colony.store.catalog import Segment
from coral.colony.store.settings import HOUR_NS, MINUTE_NS, Tier, tier_of

_WIDTHS: Final = {Tier.MINUTE: MINUTE_NS, Tier.HOUR: HOUR_NS}


def closing_of(table: str, book: Book, until_ns: Mapping[int, int]) -> str:
    """How everything stands now, as of the last transaction; by width, rows of intervals that begin
    before UNTIL_NS have been rolled up."""
    width_ns = _width_ns(table)
    if width_ns:
        return json.dumps({"until_ns": until_ns[width_ns]})
    lines = ledger_lines(book.durable_in(table)).to_pylist()
    packed = base64.b85encode(zlib.compress(json.dumps(lines).encode())).decode()
    return json.dumps({"sessions": packed})


@dataclass
class Found:
    """What segments say together: the newest of each session and of each rollup counts."""

    entries: dict[Key, Entry] = field(default_factory=dict)
    until_ns: dict[str, int] = field(default_factory=dict)
    """By rollup's table."""

    def add(self, segment: Segment, closing: str) -> None:
        """Raises ValueError, KeyError."""
        said = json.loads(closing)
        if "until_ns" in said:
            before = self.until_ns.get(segment.table, 0)
            self.until_ns[segment.table] = max(before, said["until_ns"])
            return
        lines = json.loads(zlib.decompress(base64.b85decode(said["sessions"])))
        for entry in entries_of(pa.Table.from_pylist(lines, LEDGER_SCHEMA)):
            key = entry.session.key
            if key not in self.entries or self.entries[key].last_seq <= entry.last_seq:
                self.entries[key] = replace(entry, id=0)

    @property
    def numbered(self) -> Sequence[Entry]:
        """The sessions, each with an id."""
        return [replace(it, id=n) for n, it in enumerate(self.entries.values(), 1)]

    def watermark_ns(self, width_ns: int) -> int:
        """The latest of the rollups' of WIDTH_NS."""
        return max(
            (at for table, at in self.until_ns.items() if _width_ns(table) == width_ns), default=0
        )


def found_in(segments: Iterable[tuple[Segment, str]]) -> Found:
    """What SEGMENTS say, each with its closing."""
    found = Found()
    for segment, closing in segments:
        if closing:
            found.add(segment, closing)
    return found


def _width_ns(table: str) -> int:
    tier = tier_of(table)
    return _WIDTHS.get(tier, 0) if table.endswith(f"_{tier}") else 0
