"""Values that rows are chosen by: whether a column can have them at all. One that it never has
would give an empty answer, which looks like one about quiet services."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from coral.colony.answers.named import Named
from coral.colony.answers.refusals import RefusedError, shortened
from coral.colony.tables import TABLES
from coral.colony.tables.layout import Column, Form

_TRUTHS: Final = ("true", "false")  # as DuckDB casts BOOLEAN to VARCHAR


def check_value(named: Named, column: str, text: str) -> None:
    """Raises `RefusedError` where TEXT is nothing that rows of NAMED can have in COLUMN, a known
    one. Patterns, in which `*` stands for anything, are only looked at for columns of numbers."""
    found = list(_columns(named, column))
    forms = {it.form for it in found}
    if Form.NUMBER in forms:
        if not _is_number(text):
            raise _refused(column, text, "a whole number without a sign, such as 503, or 5*")
    elif "*" in text:
        return
    elif forms == {Form.TRUTH}:
        if text not in _TRUTHS:
            raise _refused(column, text, " or ".join(_TRUTHS))
    elif forms == {Form.WORD} and all(it.words for it in found):
        words = dict.fromkeys(word for it in found for word in it.words)
        # Newer agents may have values without a word yet: their number is the word.
        if text not in words and not _is_number(text):
            raise _refused(column, text, f"one of {', '.join(filter(None, words))}")


def _columns(named: Named, column: str) -> Iterator[Column]:
    for source in named.sources:
        for it in TABLES[source.table].columns:
            if it.name == column:
                yield it


def _is_number(text: str) -> bool:
    """Whether TEXT is a whole number as SQL writes it, or a pattern of digits."""
    digits = text.replace("*", "")
    if not digits:
        return "*" in text
    if not (digits.isascii() and digits.isdigit()):
        return False
    return "*" in text or text == "0" or not text.startswith("0")


def _refused(column: str, text: str, accepted: str) -> RefusedError:
    # The column again: the command line puts all conditions in place of the first part.
    return RefusedError(
        f"where: {column}={shortened(text)!r} is not accepted; give {column} as {accepted}"
    )
