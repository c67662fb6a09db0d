"""Figures and foreign words as people read them, in the same way in every table."""

from __future__ import annotations

import unicodedata
from typing import Final

_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_UNITS: Final = ("", "k", "M", "G", "T", "P", "E")
_STEP: Final = 1000
_COLOURS: Final = {"red": 31, "yellow": 33}
# Control, format (such as what turns the direction of writing), and what is no character at all.
_UNSAFE: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def format_ns(ns: float) -> str:
    """Three digits and a unit: 870ns, 4.21µs, 12.5ms, 1.20s."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{_three_digits(ns / size)}{unit}"
    return f"{ns:.0f}ns"


def format_age(ns: float) -> str:
    """How long ago, in two units at most: 870ms, 12s, 3m20s, 5h02m, 12d04h."""
    seconds = int(ns / 1e9)
    if not seconds:
        return f"{ns / 1e6:.0f}ms" if ns >= 1e6 else "<1ms"  # noqa: PLR2004
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def format_amount(amount: float) -> str:
    """Three digits and a unit of thousands: 0, 870, 4.21k, 12.5M, 1.20G."""
    unit = 0
    # What would be rounded up to four digits takes the next unit.
    while amount >= _STEP - 0.5 and unit < len(_UNITS) - 1:
        amount /= _STEP
        unit += 1
    return f"{_three_digits(amount)}{_UNITS[unit]}" if unit else f"{amount:.0f}"


def format_share(share: float) -> str:
    """A share that is not zero is never shown as zero: <0.1%, 3.1%, 42%."""
    if not share:
        return "0%"
    percent = share * 100
    if percent < 0.1:  # noqa: PLR2004
        return "<0.1%"
    return f"{percent:.1f}%" if percent < 9.95 else f"{percent:.0f}%"  # noqa: PLR2004


def times(count: int) -> str:
    """How many there are of it: x 1,234, with the sign that is made for it."""
    return f"\N{MULTIPLICATION SIGN}{count:,}"


def _three_digits(value: float) -> str:
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0  # noqa: PLR2004
    return f"{value:.{digits}f}"


def bar(share: float, width: int) -> str:
    """A bar of SHARE (0 to 1) of WIDTH cells, to an eighth of a cell."""
    eighths = round(share * width * 8)
    full, part = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[part] if part else "")


def styled(text: str, colour: str, *, bold: bool = False) -> str:
    """TEXT with what makes a terminal show it in COLOUR ("red", "yellow")."""
    return f"\x1b[{_COLOURS[colour]}{';1' if bold else ''}m{text}\x1b[0m"


def safe(text: str) -> str:
    """TEXT that somebody else has chosen, such as a command's name or a name server's answer,
    without what a terminal would obey. The kernel's names end at the first NUL."""
    text = text.partition("\0")[0]
    if text.isascii() and text.isprintable():
        return text
    return "".join("?" if unicodedata.category(char) in _UNSAFE else char for char in text)


def shorten(text: str, width: int, keep_end: int = 0) -> str:
    """TEXT in at most WIDTH characters: what goes is before the last KEEP_END ones."""
    if len(text) <= width:
        return text
    keep_end = min(keep_end, width - 1)
    return text[: width - 1 - keep_end] + "…" + (text[-keep_end:] if keep_end else "")
