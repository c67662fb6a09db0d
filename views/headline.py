"""A few figures in a line above a table, each with its style."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text


def flowing(parts: Iterable[tuple[str, str]], width: int) -> Text:
    """Texts with their styles, in lines of at most WIDTH cells that are broken between texts."""
    text, used = Text(), 0
    for part, style in parts:
        if used and used + len(part) + 3 > width:
            text.append(",\n")
            used = 0
        elif used:
            text.append(", ")
            used += 2
        text.append(part, style)
        used += len(part)
    return text


def in_line(parts: Iterable[tuple[str, str]]) -> str:
    """The same for a pipe, without styles."""
    return ", ".join(text for text, _ in parts)
