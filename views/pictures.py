"""Histograms as pictures: a bar for each slot, or a strip with a character for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from coral.client import Buckets
from coral.views.sheet import Column, Sheet
from coral.views.text import bar, format_ns

QUANTILES: Final = (0.5, 0.95, 0.99)
_BAR_WIDTH: Final = 30
_HEIGHTS: Final = "▁▂▃▄▅▆▇█"
_EMPTY: Final = "·"
_UNITS: Final = (("s", 10**9), ("ms", 10**6), ("µs", 1000))


def histogram_sheet(title: str, counted: str, buckets: Buckets, unit_ns: int = 1) -> Sheet:
    """BUCKETS of times in UNIT_NS, with a line for each slot from the first to the last that is
    filled, and quantiles in the heading. TITLE names the times, COUNTED what was counted."""
    figures = ", ".join(f"p{q * 100:g} {_time(buckets.quantile(q) * unit_ns)}" for q in QUANTILES)
    sheet = Sheet((Column(title), Column(counted), Column(figures, right=False)))
    most = max(buckets.counts, default=0)
    for slot in filled([buckets]):
        lower, upper = slot_edges(buckets.bounds, slot, unit_ns)
        count = buckets.counts[slot]
        name = f"{lower} - {upper}" if upper else f"over {lower}"
        sheet.add(name, f"{count:,}", (bar(count / most, _BAR_WIDTH), "cyan"))
    return sheet


def filled(several: Iterable[Buckets]) -> range:
    """The slots from the first to the last that any of SEVERAL has values in."""
    slots = [slot for one in several for slot, count in enumerate(one.counts) if count]
    return range(min(slots), max(slots) + 1) if slots else range(0)


def slot_edges(bounds: Sequence[int], slot: int, unit_ns: int = 1) -> tuple[str, str]:
    """Between which times the values of SLOT lie, as texts; the upper one is empty for the slot
    above all BOUNDS, which are in UNIT_NS."""
    lower = _round_time(bounds[slot - 1] * unit_ns) if slot else "0"
    return lower, _round_time(bounds[slot] * unit_ns) if slot < len(bounds) else ""


def strip(counts: Sequence[int], slots: range) -> str:
    """A character for each of SLOTS, as high as its count is beside the greatest. A slot that has
    any is never shown as one that has none."""
    most = max(counts, default=0)
    return "".join(_height(counts[slot] if slot < len(counts) else 0, most) for slot in slots)


def _height(count: int, most: int) -> str:
    if not count:
        return _EMPTY
    return _HEIGHTS[-(-count * len(_HEIGHTS) // most) - 1]


def _time(ns: float) -> str:
    return format_ns(ns) if ns else ""


def _round_time(ns: int) -> str:
    """A bound, which is a round number."""
    unit, size = next((each for each in _UNITS if ns >= each[1]), _UNITS[-1])
    return f"{ns / size:g}{unit}"
