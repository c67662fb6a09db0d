"""The one door for text of foreign origin: names of processes, services, peers and files, on their
way to a terminal, a log line or a metric's label."""

from __future__ import annotations

import unicodedata
from typing import Final

# Control, format (such as marks that turn the direction of writing), surrogate, private and
# unassigned characters, and separators of lines and paragraphs.
_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def safe(text: str) -> str:
    """TEXT with `?` for every character that a terminal, a log or its reader would act on: escapes,
    controls, line breaks, marks that turn the direction of writing, bytes that are not UTF-8. The
    kernel's names end at the first NUL."""
    text = text.partition("\0")[0]
    if text.isascii() and text.isprintable():
        return text
    return "".join("?" if unicodedata.category(char) in _UNSAFE else char for char in text)


def safe_lines(text: str) -> str:
    """The same for a text of several lines, such as a traceback."""
    return "\n".join(map(safe, text.split("\n")))


def is_printable(text: str) -> bool:
    """Whether TEXT passes `safe` unchanged."""
    return safe(text) == text
