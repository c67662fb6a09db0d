"""`-o`: the form of an answer, and where it goes."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import click

from coral.cli.common import one_of
from coral.cli.tap.files import check_path, replace_file
from coral.wire.text import safe_lines

TABLE, JSON, CSV, ARROW = FORMS = ("table", "json", "csv", "arrow")
PICTURES: Final = (".svg", ".html", ".folded", ".pb.gz", ".speedscope.json")
"""Of profiles, by their suffixes."""


@dataclass(frozen=True)
class Output:
    """A form of FORMS, or the suffix of a picture; and the file it goes to, or standard output."""

    form: str = TABLE
    path: Path | None = None

    def write(self, content: bytes) -> None:
        """Writes all of CONTENT. Raises OSError."""
        if self.path:
            replace_file(self.path, content)
        else:
            if sys.stdout.isatty():  # names and routes are strangers'
                content = safe_lines(content.decode().replace("\r\n", "\n")).encode()
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()


def parse_output(text: str, *, pictures: bool) -> Output:
    """What the user gave for -o. Raises a usage error before anything is asked."""
    if text in FORMS:
        if text == ARROW and sys.stdout.isatty():
            raise click.UsageError("-o arrow: this is binary; give a file, or a pipe")
        return Output(text)
    suffixes = [*(f".{form}" for form in FORMS[1:]), *(PICTURES if pictures else ())]
    if pictures and f".{text}" in PICTURES:
        return Output(f".{text}")
    name = Path(text).name.lower()
    # The longest first: .speedscope.json before .json.
    for suffix in sorted(suffixes, key=len, reverse=True):
        if name.endswith(suffix) and name != suffix:
            path = Path(os.path.realpath(text))
            check_path(text, path)
            form = suffix.removeprefix(".")
            return Output(form if form in FORMS else suffix, path)
    named = [*FORMS, *(each.removeprefix(".") for each in PICTURES if pictures)]
    more = "" if pictures or f".{text}" not in PICTURES else ": pictures are of profiles"
    raise click.UsageError(
        f"-o {text}: give {one_of(named)}, or a file whose name ends with {one_of(suffixes)}{more}"
    )


def json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """An object a line."""
    return "".join(json.dumps(dict(row), default=_plain) + "\n" for row in rows).encode()


def csv_text(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """RFC 4180, with a line of names; lists are JSON, and what is not there is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row[name]) for name in names])
    return text.getvalue().encode(errors="surrogateescape")


def _cell(value: Any) -> Any:  # noqa: ANN401  whatever SQL has
    if isinstance(value, list | dict):
        return json.dumps(value, default=_plain)
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else value


def _plain(value: object) -> object:
    """What JSON has no type for, as text."""
    if isinstance(value, datetime | date | time_of_day):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)
