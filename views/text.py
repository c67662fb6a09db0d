"""Figures and foreign text as people read them, the same in every table."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from rich.cells import cell_len, set_cell_size

_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_AMOUNTS: Final = tuple((unit, 1000.0**power) for power, unit in enumerate(" kMGTPEZY"))
_TIMES_NS: Final = (
    *(("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9)),
    *(("min", 60e9), ("h", 3600e9), ("d", 86_400e9), ("y", 31_557_600e9)),
)
_UNCOUNTED: Final = re.compile(" \N{MULTIPLICATION SIGN}[0-9,]+$")
_CLAUSES: Final = re.compile(r"(?<=[,;]) ")
_FOUR_DIGITS: Final = 999.5  # rounds to 1000
_NS_PER_MS: Final = 1_000_000
_NS_PER_S: Final = 1_000_000_000
_COLOURS: Final = {"red": 31, "yellow": 33}


def format_ns(ns: float) -> str:
    """Three digits and a unit: 870ns, 4.21µs, 12.5ms, 1.20s, 16.7min."""
    return _scaled(ns, _TIMES_NS)


def format_amount(amount: float) -> str:
    """Three digits and a unit of thousands: 0, 870, 4.21k, 12.5M, 1.20G."""
    return _scaled(amount, _AMOUNTS)


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """VALUE in the first unit in which it has at most three digits. Below the second unit there
    are no decimals."""
    least = units[0][0]
    unit, size = next(
        (each for each in units if value / each[1] < _FOUR_DIGITS), units[-1]
    )  # a larger unit takes what would round to four digits
    value /= size
    if unit == least:
        return f"{value:.0f}{unit.strip()}"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0  # noqa: PLR2004
    return f"{value:.{digits}f}{unit}"


def format_age(ns: float) -> str:
    """An age in at most two units, rounded down: 870ms, 12s, 3m20s, 5h02m, 12d04h."""
    seconds = int(ns / _NS_PER_S)
    if not seconds:
        return f"{int(ns / _NS_PER_MS)}ms" if ns >= _NS_PER_MS else "<1ms"
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24:02}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m{seconds % 60:02}s" if minutes else f"{seconds}s"


def format_share(share: float) -> str:
    """A share in percent; one that is not zero is never shown as zero: <0.1%, 3.1%, 42%."""
    if not share:
        return "0%"
    percent = share * 100
    if percent < 0.1:  # noqa: PLR2004
        return "<0.1%"
    return f"{percent:.1f}%" if percent < 9.95 else f"{percent:.0f}%"  # noqa: PLR2004


def format_rate(count: float, seconds: float) -> str:
    """COUNT per second; a rate that is not zero is never shown as zero: <0.1, 3.1, 1,234."""
    rate = count / seconds
    if 0 < rate < 0.05:  # noqa: PLR2004
        return "<0.1"
    return f"{rate:.1f}" if 0 < rate < 9.95 else f"{rate:,.0f}"  # noqa: PLR2004


def format_clock(unix_ns: int) -> str:
    """The local time of day, to the microsecond: 14:03:07.000042."""
    seconds, ns = divmod(unix_ns, _NS_PER_S)
    return f"{time.strftime('%H:%M:%S', time.localtime(seconds))}.{ns // 1000:06d}"


def times(count: int) -> str:
    """COUNT behind a multiplication sign, as in 'REFUSED x5'."""
    return f"\N{MULTIPLICATION SIGN}{count:,}"


def bar(share: float, width: int) -> str:
    """A bar of SHARE (0 to 1) of WIDTH cells, to an eighth of a cell."""
    eighths = round(share * width * 8)
    full, part = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[part] if part else "")


def styled(text: str, colour: str, *, bold: bool = False) -> str:
    """TEXT between the escape sequences that show it in COLOUR ("red", "yellow")."""
    return f"\x1b[{_COLOURS[colour]}{';1' if bold else ''}m{text}\x1b[0m"


def shorten(text: str, width: int, keep_end: int = 0) -> str:
    """TEXT in at most WIDTH cells of a terminal, with an ellipsis for the part that was cut out;
    of the last KEEP_END characters those stay that fit."""
    if cell_len(text) <= width:
        return text
    if width < 1:
        return ""
    end = text[len(text) - min(keep_end, width - 1, len(text)) :]
    while cell_len(end) > width - 1:  # some characters take two
        end = end[1:]
    room = width - 1 - cell_len(end)
    return f"{set_cell_size(text, room).rstrip() if room > 0 else ''}…{end}"


def padded(text: str, width: int) -> str:
    """TEXT with spaces up to WIDTH cells of a terminal."""
    return text + " " * (width - cell_len(text))


def wrapped(parts: Iterable[str], width: int, separator: str = " ") -> Iterator[str]:
    """PARTS joined into lines of at most WIDTH cells, broken between parts. Only a part that is
    longer than a line is broken inside."""
    line = ""
    for part in parts:
        longer = f"{line}{separator}{part}" if line else part
        if cell_len(longer) <= width:
            line = longer
            continue
        if line:
            yield (line + separator).rstrip()
        line = part
        while cell_len(line) > width:
            head = _head(line, width)
            yield head
            line = line[len(head) :]
    if line:
        yield line


def fitting(parts: Sequence[str]) -> Callable[[int], str]:
    """A function that lists those of PARTS that fit into some cells, with an ellipsis for the
    others; a part that does not fit is left out whole, so that no number is cut."""

    def fit(width: int) -> str:
        for shown in range(len(parts), 0, -1):
            text = ", ".join([*parts[:shown], *(["…"] if shown < len(parts) else [])])
            if cell_len(text) <= width:
                return text
        return shorten(f"{_UNCOUNTED.sub('', parts[0])}, …", width) if parts else ""

    return fit


def clauses(text: str, width: int) -> Iterator[str]:
    """TEXT in lines of at most WIDTH cells, broken after commas and semicolons. A clause that is
    longer than a line is broken between words."""
    parts: list[str] = []
    for clause in _CLAUSES.split(text):
        parts += [clause] if cell_len(clause) <= width else clause.split(" ")
    return wrapped(parts, width)


def _head(text: str, width: int) -> str:
    """The longest start of TEXT that fits into WIDTH cells; at least one character."""
    at = 1
    while at < len(text) and cell_len(text[: at + 1]) <= width:
        at += 1
    return text[:at]
