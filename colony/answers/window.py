"""Windows in time, and the rows to use for them: whole hours and minutes where these are exact, raw
rows at the ragged ends. Pure arithmetic.

All times are Unix time in nanoseconds; a window has the rows with `from_ns` <= time_ns < `to_ns`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

SECOND_NS: Final = 1_000_000_000
MINUTE_NS: Final = 60 * SECOND_NS
HOUR_NS: Final = 60 * MINUTE_NS

RAW: Final = "raw"
WIDTHS_NS: Final[Mapping[str, int]] = {RAW: 1, "1m": MINUTE_NS, "1h": HOUR_NS}
"""The tiers, the finest first, each with how long the time is that one of its rows stands for."""
_WHOLE: Final = {"1m": "minutes", "1h": "hours"}


@dataclass(frozen=True, slots=True)
class Window:
    """A part of time."""

    from_ns: int
    to_ns: int

    @property
    def seconds(self) -> float:
        """How long it is."""
        return (self.to_ns - self.from_ns) / SECOND_NS

    def earlier(self, by_ns: int) -> Window:
        """The window that began and ended BY_NS before this one."""
        return Window(self.from_ns - by_ns, self.to_ns - by_ns)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a tier has: rows from `from_ns` on, and until just before `to_ns` all of them."""

    from_ns: int
    to_ns: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a window, and the tier whose rows are used for it."""

    tier: str
    window: Window


@dataclass(frozen=True, slots=True)
class Plan:
    """The pieces of `window`, in order and without gaps. `notes` say, in sentences, where the
    window is not the one that was asked for."""

    window: Window
    pieces: Sequence[Piece]
    notes: Sequence[str] = ()


STEPS_NS: Final = (
    *(each * SECOND_NS for each in (1, 5, 10, 30)),
    *(each * MINUTE_NS for each in (1, 5, 10, 30)),
    *(each * HOUR_NS for each in (1, 3, 6, 12, 24, 7 * 24)),
)
_MOST_STEPS: Final = 60


def step_of(window: Window) -> int:
    """Into how long parts WINDOW is divided, so that there are at most about sixty."""
    span_ns = window.to_ns - window.from_ns
    return next((it for it in STEPS_NS if it * _MOST_STEPS >= span_ns), STEPS_NS[-1])


def planned(wanted: Window, kept: Mapping[str, Kept]) -> Plan:
    """How the rows of WANTED are read, from the tiers of a table that KEPT has.

    Where the end of the window lies in a time whose raw rows are no longer kept, the window grows
    to whole minutes, or to whole hours.
    """
    tiers = [tier for tier in WIDTHS_NS if tier in kept]
    from_ns, to_ns, grown = wanted.from_ns, wanted.to_ns, ""
    for finer, coarser in pairwise(tiers):
        width_ns, oldest_ns = WIDTHS_NS[coarser], kept[finer].from_ns
        if _floor(oldest_ns, width_ns) <= kept[coarser].from_ns:
            continue  # the coarser tier has nothing older
        before = from_ns, to_ns
        if from_ns < oldest_ns:
            from_ns = _floor(from_ns, width_ns)
        if to_ns < oldest_ns:
            to_ns = _ceil(to_ns, width_ns)
        if (from_ns, to_ns) != before:
            grown = _WHOLE[coarser]
    notes = (
        [f"the window is in whole {grown}: no finer rows of that time are kept"] if grown else []
    )
    window = Window(from_ns, to_ns)
    return Plan(window, tuple(_covered(window, tiers[::-1], kept)), tuple(notes))


def _covered(window: Window, tiers: Sequence[str], kept: Mapping[str, Kept]) -> Iterator[Piece]:
    """WINDOW in pieces: as much as possible in the first of TIERS, and its ends in the others."""
    if window.from_ns >= window.to_ns or not tiers:
        return
    tier, *finer = tiers
    width_ns = WIDTHS_NS[tier]
    from_ns = _ceil(max(window.from_ns, kept[tier].from_ns if finer else 0), width_ns)
    to_ns = min(_floor(window.to_ns, width_ns), kept[tier].to_ns) if finer else window.to_ns
    if from_ns >= to_ns:
        yield from _covered(window, finer, kept)
        return
    yield from _covered(Window(window.from_ns, from_ns), finer, kept)
    yield Piece(tier, Window(from_ns, to_ns))
    yield from _covered(Window(to_ns, window.to_ns), finer, kept)


def _floor(time_ns: int, width_ns: int) -> int:
    return time_ns - time_ns % width_ns


def _ceil(time_ns: int, width_ns: int) -> int:
    return -(-time_ns // width_ns) * width_ns
