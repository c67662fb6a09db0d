"""Rows of any columns, as SQL gives them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

from coral.views.answers.contract import AnswerView, Shown
from coral.views.sheet import Column, Sheet
from coral.wire.text import safe

_ROOM: Final = 16


def sheets(shown: Shown) -> Iterator[Sheet]:
    """Numbers on the right, texts on the left; columns that do not fit stand below their rows, the
    last first."""
    names = list(shown.rows[0]) if shown.rows else []
    numeric = {name: _is_numeric(name, shown) for name in names}
    sheet = Sheet(
        [
            Column(
                safe(name),
                right=numeric[name],
                fits=not numeric[name],
                room=_ROOM,
                spare=at,
                below=True,
            )
            for at, name in enumerate(names)
        ]
    )
    for row in shown.rows:
        sheet.add(*(_text(row[name]) for name in names))
    yield sheet


def _is_numeric(name: str, shown: Shown) -> bool:
    values = [row[name] for row in shown.rows if row[name] is not None]
    return bool(values) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )


def _text(value: Any) -> str:  # noqa: ANN401  whatever SQL has
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, datetime):
        return value.isoformat(" ")
    return str(value)


VIEW: Final = AnswerView(sheets)
