"""A table that is drawn for a terminal of some width, or as plain lines for a pipe.

Where there is no room, columns give way by their importance, names are shortened, and prose is
wrapped between words or goes below its row: no line is longer than the terminal. Every text is
made safe here, wherever it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from coral.views.text import format_amount, shorten, wrapped
from coral.wire.text import safe

# A text, or a function that makes a text of at most the given number of cells.
Content = str | Callable[[int], str]
MOST_LINES: Final = 50  # in a pipe, where a terminal's height is no limit
_GAP: Final = 2
_INDENT: Final = 2  # of what stands below a row
_MINOR: Final = 6  # columns that are at least so spare are of little importance
_NARROWEST: Final = 6  # cells are shortened to this where no other column can give way
_NO_LIMIT: Final = 1 << 16
_NOTHING: Final = "-"  # an empty cell in a pipe, so that every row has the same fields


@dataclass(frozen=True)
class Column:
    """How one column behaves.

    `spare`: which columns give way first where there is no room: all of the greatest number; 0
    never gives way. `below`: what has given way stands below the row. `fits`: cells are shortened
    to the room that the other columns leave. `wraps`: cells are prose, which may be several lines;
    at most one column, the last. `room`: every spare column gives way before a column that fits or
    wraps gets less; prose that gets less goes below its row. `comfort`: the same, but only columns
    of little importance give way for it. `optional`: hidden on a terminal where all its cells
    are empty. `drawn`: for a terminal alone. `least`: in a pipe the column is at least that wide,
    so that tables that follow one another stand in line.
    """

    title: str
    right: bool = True
    spare: int = 0
    fits: bool = False
    wraps: bool = False
    room: int = 24
    comfort: int = 0
    below: bool = False
    optional: bool = False
    drawn: bool = False
    least: int = 0


@dataclass(frozen=True)
class _Layout:
    """Which columns stand side by side, how wide they are, and which stand below their row."""

    shown: Sequence[int]
    widths: Sequence[int]
    below: Sequence[int] = ()


@dataclass
class Sheet:
    """Rows of cells, each with its style."""

    columns: Sequence[Column]
    rows: list[list[tuple[Content, str]]] = field(default_factory=list)

    def add(self, *cells: Content | tuple[Content, str]) -> None:
        """Adds a row; a cell is a text, or one with a style."""
        self.rows.append([cell if isinstance(cell, tuple) else (cell, "") for cell in cells])

    def table(self, width: int) -> Group:
        """For a terminal of WIDTH columns."""
        return Group(*self._texts(self._layout(width), width))

    def lines(self) -> Iterator[str]:
        """For a pipe: every column, as wide as its cells, and no colour."""
        widths = [
            max(width, column.least)
            for column, width in zip(self.columns, self._natural(), strict=True)
        ]
        shown = [at for at, column in enumerate(self.columns) if not column.drawn]
        yield self._line([column.title for column in self.columns], shown, widths).plain
        for row in self.rows:
            texts = ["; ".join(lines) or _NOTHING for lines in self._cells(row, _NO_LIMIT)]
            yield self._line(texts, shown, widths).plain

    def _texts(self, layout: _Layout, width: int) -> Iterator[Text]:
        titles = [column.title for column in self.columns]
        yield _cropped(self._line(titles, layout.shown, layout.widths, "bold"), width)
        for row in self.rows:
            for line in self._row(row, layout):
                yield _cropped(line, width)
            for text, style in self._notes(row, layout, width - _INDENT):
                yield _cropped(Text(" " * _INDENT + text, style), width)

    def _row(self, row: Sequence[tuple[Content, str]], layout: _Layout) -> Iterator[Text]:
        """The lines of a row: more than one where prose is wrapped."""
        cells = self._cells(row, *layout.widths)
        styles = [style for _, style in row]
        height = max(len(cells[at]) for at in layout.shown)
        for number in range(height):
            texts = [lines[number] if number < len(lines) else "" for lines in cells]
            yield self._line(texts, layout.shown, layout.widths, *styles)

    def _cells(self, row: Sequence[tuple[Content, str]], *widths: int) -> list[list[str]]:
        """The lines of each cell, in columns of WIDTHS or of one width for all."""
        if len(widths) == 1:
            widths = widths * len(row)
        return [
            _prose(content, width) if column.wraps else [_text(content, width)]
            for column, width, (content, _) in zip(self.columns, widths, row, strict=True)
        ]

    def _notes(
        self, row: Sequence[tuple[Content, str]], layout: _Layout, width: int
    ) -> Iterator[tuple[str, str]]:
        """What stands below a row: figures by their titles, then prose."""
        figures = [
            f"{self.columns[at].title.lower()} {text}"
            for at in layout.below
            if not self.columns[at].wraps and (text := _text(row[at][0]))
        ]
        for line in wrapped(figures, width, ", "):
            yield line, ""
        for at in layout.below:
            if self.columns[at].wraps:
                yield from ((line, row[at][1]) for line in _prose(row[at][0], width) if line)

    def _line(
        self, texts: Sequence[str], shown: Sequence[int], widths: Sequence[int], *styles: str
    ) -> Text:
        """One line; a single style is that of every cell."""
        line = Text(no_wrap=True, overflow="ignore")
        for at in shown:
            padding = " " * (widths[at] - cell_len(texts[at]))
            style = (styles[at] if len(styles) > 1 else styles[0]) if styles else ""
            if self.columns[at].right:
                line.append(padding)
            line.append(texts[at], style)
            if not self.columns[at].right:
                line.append(padding)
            line.append(" " * _GAP)
        line.rstrip()
        return line

    def _natural(self) -> list[int]:
        """How wide each column would be."""
        widths = [cell_len(column.title) for column in self.columns]
        for row in self.rows:
            for at, lines in enumerate(self._cells(row, _NO_LIMIT)):
                widths[at] = max(widths[at], *map(cell_len, lines))
        return widths

    def _layout(self, width: int) -> _Layout:
        """How the columns stand on a terminal."""
        widths = self._natural()
        shown = [
            at
            for at, column in enumerate(self.columns)
            if not column.optional or any(_text(row[at][0]) for row in self.rows)
        ]
        below = [at for at in shown if self._goes_below(at, shown, widths, width)]
        shown = [at for at in shown if at not in below]
        for wanted, least in ((self._comfort(widths), _MINOR), (self._room(widths), 1)):
            while _total(shown, wanted) > width:
                most = max(self.columns[at].spare for at in shown)
                if most < least:
                    break
                gone = [at for at in shown if self.columns[at].spare == most]
                below += [at for at in gone if self.columns[at].below]
                shown = [at for at in shown if at not in gone]
        self._shrink(shown, widths, width)
        return _Layout(shown, widths, sorted(below))

    def _goes_below(self, at: int, shown: Sequence[int], widths: Sequence[int], width: int) -> bool:
        """Whether this is prose, and the columns that never give way leave too little for it."""
        if not self.columns[at].wraps:
            return False
        kept = [other for other in shown if other == at or not self.columns[other].spare]
        return _total(kept, self._room(widths)) > width

    def _room(self, widths: Sequence[int]) -> list[int]:
        """How wide each column has to be before any other gives way for it."""
        return [
            min(width, column.room) if column.fits or column.wraps else width
            for column, width in zip(self.columns, widths, strict=True)
        ]

    def _comfort(self, widths: Sequence[int]) -> list[int]:
        """The same for those that give way easily."""
        return [
            min(width, max(column.comfort, column.room)) if column.fits or column.wraps else width
            for column, width in zip(self.columns, widths, strict=True)
        ]

    def _shrink(self, shown: Sequence[int], widths: list[int], width: int) -> None:
        """Takes from the columns that can be shortened, always from the widest: first what they
        have beyond the room they want, then more."""
        soft = [at for at in shown if self.columns[at].fits or self.columns[at].wraps]
        narrowest = [_NARROWEST] * len(widths)
        for least in (self._comfort(widths), self._room(widths), narrowest):
            while over := [at for at in soft if widths[at] > least[at]]:
                excess = _total(shown, widths) - width
                if excess <= 0:
                    return
                widest = max(over, key=lambda at: widths[at])
                widths[widest] -= 1


def bytes_cell(amount: float) -> tuple[str, str]:
    """An amount of bytes with its style."""
    return (f"{format_amount(amount)}B", "") if amount else ("0", "dim")


def _total(shown: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[at] + _GAP for at in shown) - _GAP


def _cropped(line: Text, width: int) -> Text:
    """A line that is too long even so, on a terminal of a few columns."""
    line.truncate(width, overflow="ellipsis")
    return line


def _text(content: Content, width: int = _NO_LIMIT) -> str:
    """CONTENT in one line of at most WIDTH cells, safe for a terminal."""
    return shorten(safe(content if isinstance(content, str) else content(width)), width)


def _prose(content: Content, width: int) -> list[str]:
    """CONTENT, which may have line breaks of its own, in lines of at most WIDTH cells."""
    text = content if isinstance(content, str) else content(width)
    lines = [line for part in text.split("\n") for line in wrapped(safe(part).split(" "), width)]
    return lines or [""]
