"""A tap of `cpu_profile` in tables: what used the CPU, by function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from coral.client import Batch
from coral.views.cpu_profile.functions import Use
from coral.views.cpu_profile.names import file_name, fitted, visible
from coral.views.cpu_profile.profile import Profile
from coral.views.cpu_profile.reading import records, take
from coral.views.cpu_profile.session import NOTHING_RAN, amount_words, missing
from coral.views.intervals import Intervals
from coral.views.sheet import Column, Sheet
from coral.views.text import bar, clauses, format_share

_MOST_LINES: Final = 40  # in a pipe
_MOST_AT_END: Final = 25
_BAR_WIDTH: Final = 16
_TOTAL: Final = "░"

_COLUMNS: Final = (
    Column("SELF"),
    Column("TOTAL"),
    Column("SAMPLES", spare=5),
    Column("", right=False, spare=2, drawn=True),
    Column("FUNCTION", right=False, fits=True, room=24, comfort=32),
    Column("MODULE", right=False, fits=True, room=8, spare=3),
)


class ProfileStory:
    """The last interval, and the whole session."""

    def __init__(self) -> None:
        self.profile = Profile()
        self._intervals = Intervals()
        self._latest = Profile()

    @property
    def intervals(self) -> Intervals:
        """How long the session has watched."""
        return self._intervals

    def add(self, batch: Batch) -> None:
        """Takes in samples."""
        if self._intervals.add(batch.message):
            self._latest = Profile()
        take(batch, self._latest, self.profile)

    def interval_table(self, width: int, most_lines: int) -> RenderableType:
        """All samples so far, for a terminal: an interval has too few to say much."""
        if not self.profile:
            seconds = self._intervals.seconds
            return Text(f"no sample yet, after {seconds:.0f}s", "dim")
        heads = [Text(line, "dim") for line in self._heads(self.profile, width)]
        most = max(most_lines - len(heads) - 1, 1)
        return Group(*heads, functions_sheet(self.profile, most).table(width))

    def interval_lines(self) -> Iterator[str]:
        """The last interval, for a pipe."""
        yield amount_words(self._latest, self._intervals.latest_s)
        yield from functions_sheet(self._latest, _MOST_LINES).lines()

    def end_table(self, width: int) -> RenderableType:
        """The whole session, for a terminal."""
        heads = [Text(line) for line in self._heads(self.profile, width)]
        if not self.profile:
            return Group(*heads)
        return Group(*heads, Text(), functions_sheet(self.profile, _MOST_AT_END).table(width))

    def end_lines(self) -> Iterator[str]:
        """The whole session, for a pipe."""
        yield from self._sentences(self.profile)
        if self.profile:
            yield ""
            yield from functions_sheet(self.profile, _MOST_LINES).lines()

    def event_lines(self, batch: Batch, width: int | None = None) -> Iterable[str]:  # noqa: ARG002  as in the protocol
        """There are no single events."""
        return ()

    def records(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """Each row as plain data."""
        yield from records(batch)

    def _heads(self, profile: Profile, width: int) -> Iterator[str]:
        for sentence in self._sentences(profile):
            yield from clauses(sentence, width)

    def _sentences(self, profile: Profile) -> Iterator[str]:
        if profile:
            yield amount_words(profile, self._intervals.seconds)
        else:
            yield NOTHING_RAN
        yield from missing(profile)


def functions_sheet(profile: Profile, most: int) -> Sheet:
    """The functions that used most; the last of the MOST lines adds up the others."""
    sheet = Sheet(_COLUMNS)
    found = profile.uses.ordered()
    shown = found if len(found) <= most else found[: max(most - 1, 0)]
    greatest = max((use.total for use in shown), default=0)
    for use in shown:
        sheet.add(*_cells(use, profile.samples, greatest))
    if rest := found[len(shown) :]:
        own = sum(use.own for use in rest)
        text = f"and {len(rest):,} more"
        sheet.add(format_share(own / profile.samples), "", f"{own:,}", "", text, "")
    return sheet


def _cells(use: Use, samples: int, greatest: int) -> Iterator[Any]:
    function = use.function
    style = "dim" if function.unnamed else "blue" if function.kernel else ""
    guess = "~ " if use.guessed else ""
    mark = " [k]" if function.kernel else ""
    yield format_share(use.own / samples)
    yield format_share(use.total / samples)
    yield f"{use.own:,}"
    yield _bar(use, greatest), "cyan"
    yield (
        (lambda width: guess + fitted(function.name, width - len(guess) - len(mark)) + mark),
        style,
    )
    yield visible(file_name(function.module)), "dim"


def _bar(use: Use, greatest: int) -> str:
    """What the function used itself, and in a lighter shade what it called, beside the GREATEST
    total."""
    own = bar(use.own / greatest, _BAR_WIDTH)
    return own + _TOTAL * (round(use.total / greatest * _BAR_WIDTH) - len(own))
