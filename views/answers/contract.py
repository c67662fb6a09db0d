"""What a table of an answer is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from coral.views.sheet import Column, Content, Sheet
from coral.views.text import format_amount, format_clock, format_ns

Row = Mapping[str, Any]
Cell = Content | tuple[Content, str]

TIME: Final = "time"
"""The column that says of which part of the window a row is: when that began, in Unix ns."""
BAD: Final = "bold red"
WARNING: Final = "yellow"
_STYLES: Final = {"failing": BAD, "slower": BAD, "new": WARNING, "gone": WARNING, "faster": "green"}
_TITLES: Final = {"remote_address": "PEER"}
_ARROW: Final = "\N{RIGHTWARDS ARROW}"


@dataclass(frozen=True)
class Shown:
    """The rows of an answer: plain data by the names of its columns. `by` are the columns that tell
    rows apart; `seconds` is how long the window is; `bounds` has the upper ends of the slots of
    each histogram, by its column; `compared` rows have another window's figures, too; `cut` says
    that there are more rows."""

    rows: Sequence[Row]
    by: Sequence[str] = ()
    seconds: float = 0.0
    bounds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    compared: bool = False
    cut: bool = False
    now_ns: int = 0


@dataclass(frozen=True)
class AnswerView:
    """A query for people: SHEETS makes its tables. `nothing` is said where there are no rows."""

    sheets: Callable[[Shown], Iterable[Sheet | str]]
    nothing: str = "no rows"


def places(shown: Shown, subject: Sequence[str]) -> tuple[list[Column], list[str]]:
    """Columns for those of `by` that are no part of the SUBJECT of a row, and their names."""
    names = [name for name in shown.by if name not in subject]
    columns = [
        Column(_TITLES.get(name, name.upper()), right=False, fits=True, room=10, comfort=16)
        for name in names
    ]
    return columns, names


def place_cells(row: Row, names: Sequence[str]) -> list[Cell]:
    """The cells of `places`."""
    return [format_clock(row[name])[:8] if name == TIME else text_of(row[name]) for name in names]


@dataclass(frozen=True)
class Leading:
    """The columns before the figures: what tells rows apart. `subject` says whether the answer has
    any part of what its rows are about, such as a request; `names` are the others of `by`."""

    columns: Sequence[Column]
    names: Sequence[str]
    subject: bool

    def cells(self, row: Row, subject: Cell) -> list[Cell]:
        """The cells of ROW, with its SUBJECT where there is a column for it."""
        return [*place_cells(row, self.names), *([subject] if self.subject else [])]


def leading(shown: Shown, parts: Sequence[str], column: Column) -> Leading:
    """COLUMN has the subject, which is made from those of PARTS that are in `by`."""
    columns, names = places(shown, parts)
    has_subject = any(name in shown.by for name in parts)
    return Leading([*columns, column] if has_subject else columns, names, has_subject)


def text_of(value: object) -> str:
    """A value that tells rows apart; `-` for none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else str(value)


def time_cell(value: float | None, unit_ns: float = 1.0) -> str:
    """A time in UNIT_NS; empty where there is none."""
    return format_ns(value * unit_ns) if value else ""


def verdict_cell(row: Row) -> Cell:
    """What became of a row since the other window."""
    verdict = row["verdict"]
    return verdict, _STYLES.get(verdict, "")


def change(row: Row, name: str, form: Callable[[float], str]) -> str:
    """`4.21ms → 12.5ms`: a figure in the other window, and in this one."""
    before, now = row.get(f"{name}_before"), row.get(name)
    if before is None and now is None:
        return ""
    return f"{_known(before, form)} {_ARROW} {_known(now, form)}"


def _known(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def count_text(count: float) -> str:
    """1,234."""
    return f"{count:,.0f}"


def bytes_text(amount: float) -> str:
    """3.1MB."""
    return f"{format_amount(amount)}B" if amount else "0"
