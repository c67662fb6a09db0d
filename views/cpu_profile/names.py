"""Names of functions as people read them. They come from binaries that anyone may have written."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Final

from coral.views.text import shorten
from coral.wire.text import is_printable

_ELLIPSIS: Final = "…"
_OPERATOR: Final = re.compile(r"operator *(<=>|->\*?|<<=?|>>=?|<=?|>=?|\(\))")
_KEPT: Final = "(anonymous namespace)"


@lru_cache(65_536)
def visible(text: str) -> str:
    r"""TEXT with an escape, such as `\x1b` or `\u202e`, for every character that would not be seen
    or that a reader would act on: controls, line breaks, marks that turn the direction of writing.
    Names that differ stay different, but for one that has such an escape in it already."""
    if is_printable(text):
        return text
    return "".join(char if is_printable(char) else escaped(char) for char in text)


def escaped(char: str) -> str:
    r"""A character by its number: `\x3b`, `\u202e`, `\U0001f600`."""
    number = ord(char)
    if number < 0x100:  # noqa: PLR2004
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"  # noqa: PLR2004


def file_name(module: str) -> str:
    """The last part of a module's path; `[kernel]` and its like as they are."""
    return PurePosixPath(module).name if "/" in module else module


def fitted(name: str, width: int) -> str:
    """A function's name in at most WIDTH cells: first without its arguments, then without what
    stands in angle brackets, then cut in the middle, so that its own part at the end stays."""
    text = visible(name)
    for shorter in (lambda it: it, _without_arguments, _without_templates):
        text = shorter(text)
        if (short := shorten(text, width)) == text:
            return short
    return shorten(text, width, width // 2)


def _without_arguments(name: str) -> str:
    at = name.find("(", 1)
    while at > 0 and (name.startswith(_KEPT, at) or name[:at].endswith("operator")):
        at = name.find("(", at + 1)
    return name[:at] if at > 0 else name


def _without_templates(name: str) -> str:
    """NAME with `<…>` for each outermost pair of angle brackets, but for those of operators and of
    names that begin with one, such as `<alloc::vec::Vec<T> as Trait>::method`."""
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match[0])
        return "\0" * len(held[-1])

    plain = _OPERATOR.sub(hold, name)
    if plain.startswith("<"):
        return name
    parts, depth = [], 0
    for char in plain:
        if char == "<":
            if not depth:
                parts.append(f"<{_ELLIPSIS}>")
            depth += 1
        elif char == ">" and depth:
            depth -= 1
        elif not depth:
            parts.append(char)
    text = "".join(parts)
    for each in held:
        text = text.replace("\0" * len(each), each, 1)
    return text
