"""Text and tables that commands print."""

from __future__ import annotations

import os

import click
from rich.text import Text

from coral.cli.common import Output
from coral.views.sheet import Sheet
from coral.views.text import clauses
from coral.wire.text import safe


class Page:
    """Text and tables on standard output: fitted to a terminal, or to COLUMNS; in a pipe as wide
    as they are, to be searched and copied."""

    def __init__(self) -> None:
        self._console = Output()
        fitted = self._console.is_terminal or "COLUMNS" in os.environ
        self._width = self._console.width if fitted else None

    def text(self, text: str, style: str = "") -> None:
        """A sentence."""
        lines = list(clauses(safe(text), self._width)) if self._width else []
        for line in lines or (safe(text),):
            self._console.print(Text(line, style), soft_wrap=True)

    def sheet(self, sheet: Sheet) -> None:
        """A table."""
        if self._width is None:
            click.echo("\n".join(sheet.lines()))
        else:
            self._console.print(sheet.table(self._width))


def yes(value: bool) -> tuple[str, str]:
    """A cell that says whether something is there."""
    return ("yes", "green") if value else ("no", "red")
