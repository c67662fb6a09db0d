"""What a story has drawn: as text, as lines, as a table by its cells."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console, RenderableType


def drawn(renderable: RenderableType, width: int = 120, *, colour: bool = False) -> str:
    """The text on a terminal of some width."""
    console = Console(
        width=width,
        color_system="standard" if colour else None,
        force_terminal=colour,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def drawn_lines(renderable: RenderableType, width: int) -> list[str]:
    """The lines on a terminal of some width."""
    return [line.rstrip() for line in drawn(renderable, width).splitlines()]


def table(lines: Iterable[str]) -> dict[str, dict[str, str]]:
    """A plain table: rows by their first column, cells by their titles."""
    header, *rows = (re.split(" {2,}", line.strip()) for line in lines)
    assert {len(row) for row in rows} <= {len(header)}
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}
