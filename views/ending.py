"""What a tap shows at its end: totals in sentences, then sheets; on a terminal or in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from coral.views.sheet import Sheet
from coral.views.text import clauses


def end_table(totals: Iterable[str], sheets: Iterable[Sheet], width: int) -> RenderableType:
    """TOTALS, each broken between its clauses, and SHEETS, for a terminal of WIDTH cells."""
    parts: list[RenderableType] = [Text(line) for text in totals for line in clauses(text, width)]
    for sheet in sheets:
        parts += [Text(), sheet.table(width)]
    return Group(*parts)


def end_lines(totals: Iterable[str], sheets: Iterable[Sheet]) -> Iterator[str]:
    """The same for a pipe."""
    yield from totals
    for sheet in sheets:
        yield ""
        yield from sheet.lines()
