"""Which rows a table has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

_Row = TypeVar("_Row")


def pick(
    rows: Sequence[_Row],
    most: int,
    busy: Callable[[_Row], Any],
    worst: Callable[[_Row], Any],
    in_trouble: Callable[[_Row], bool],
) -> tuple[list[_Row], list[_Row]]:
    """The MOST rows that are shown, in the order of the key BUSY, and the rest. Those IN_TROUBLE
    get up to half of the lines before others, in the order of the key WORST."""
    troubled = sorted(filter(in_trouble, rows), key=worst)[: max(most // 2, 1)]
    first = {id(row) for row in troubled}
    ordered = troubled + sorted((row for row in rows if id(row) not in first), key=busy)
    return sorted(ordered[:most], key=busy), ordered[most:]
