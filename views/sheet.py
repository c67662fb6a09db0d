"""A table that is drawn for a terminal of some width, or in plain lines for a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.table import Table
from rich.text import Text

# A text, or one that is made to fit so many characters.
Content = str | Callable[[int], str]
_GAP: Final = 2
_LEAST: Final = 16  # of what is made to fit
_NO_LIMIT: Final = 1 << 16


@dataclass(frozen=True)
class Column:
    """`spare` says which columns go first where there is no room: all of the greatest; 0 never
    goes. With `fits`, its cells are made to fit what the others leave."""

    title: str
    right: bool = True
    spare: int = 0
    fits: bool = False


@dataclass
class Sheet:
    """Rows of cells, each with its style."""

    columns: Sequence[Column]
    rows: list[list[tuple[Content, str]]] = field(default_factory=list)

    def add(self, *cells: Content | tuple[Content, str]) -> None:
        """A row; a cell is a text, or one with a style."""
        self.rows.append([cell if isinstance(cell, tuple) else (cell, "") for cell in cells])

    def table(self, width: int) -> Table:
        """For a terminal of that width."""
        shown, widths = self._layout(width)
        table = Table(
            box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", expand=False
        )
        for at in shown:
            justify = "right" if self.columns[at].right else "left"
            table.add_column(
                Text(self.columns[at].title),
                justify=justify,  # type: ignore[arg-type]
                no_wrap=True,
                width=widths[at],
            )
        for row in self.rows:
            table.add_row(*(Text(_text(row[at][0], widths[at]), row[at][1]) for at in shown))
        return table

    def lines(self) -> Iterator[str]:
        """All of it, as wide as it is."""
        widths = self._natural()
        yield self._line([column.title for column in self.columns], widths)
        for row in self.rows:
            yield self._line([_text(content, _NO_LIMIT) for content, _ in row], widths)

    def _line(self, texts: Sequence[str], widths: Sequence[int]) -> str:
        cells = (
            text.rjust(width) if column.right else text.ljust(width)
            for column, text, width in zip(self.columns, texts, widths, strict=True)
        )
        return (" " * _GAP).join(cells).rstrip()

    def _natural(self) -> list[int]:
        return [
            max(len(column.title), *(len(_text(row[at][0], _NO_LIMIT)) for row in self.rows), 0)
            for at, column in enumerate(self.columns)
        ]

    def _layout(self, width: int) -> tuple[list[int], list[int]]:
        """Which columns are shown, and how wide each column is."""
        widths = self._natural()
        shown = list(range(len(self.columns)))
        fitting = [at for at in shown if self.columns[at].fits]

        def missing() -> int:
            return sum(widths[at] + _GAP for at in shown) - _GAP - width

        while missing() > 0:
            most = max(self.columns[at].spare for at in shown)
            if not most:
                break
            shown = [at for at in shown if self.columns[at].spare != most]
        for at in fitting:
            widths[at] = max(widths[at] - max(missing(), 0), min(_LEAST, widths[at]))
        return shown, widths


def _text(content: Content, width: int) -> str:
    return content if isinstance(content, str) else content(width)
