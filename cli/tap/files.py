"""`-o FILE`: a session that is written to a file, whose suffix chooses its format."""

from __future__ import annotations

import gc
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click

from coral.cli.common import one_of
from coral.views.contract import FileFormat, Session, Story, View

FORMS: Final = ("table", "json", "yaml")
_TABLE, _JSON, _ = FORMS


@dataclass(frozen=True)
class Output:
    """What `-o` asks for: a form on standard output, and perhaps a file beside it."""

    form: str = _TABLE
    path: Path | None = None
    format: FileFormat | None = None

    def write(self, story: Story, session: Session) -> None:
        """Writes the file, if one was asked for: all of it, or nothing. Raises OSError."""
        if self.path and self.format:
            with _uncollected():
                content = self.format.content(story, session)
            replace_file(self.path, content)


def output_option(views: Iterable[View]) -> Callable[[Any], Any]:
    """Adds -o, and --json for short; `parse_output` takes its value."""
    having = [view for view in views if view.files]
    files = "".join(
        f" With {view.flag} it may be a file: {one_of([it.suffix for it in view.files])}."
        for view in having
    )
    short = click.option("--json", "as_json", is_flag=True, help="The same as -o json.")
    long = click.option(
        "-o",
        "--output",
        help=f"A table for people, or data for programs.{files}  [default: {_TABLE}]",
        metavar="|".join([*FORMS, *["FILE"] * bool(having)]),
    )
    return lambda function: long(short(_one_form(function)))


def _one_form(function: Callable[..., Any]) -> Callable[..., Any]:
    """FUNCTION with one `output` for -o and --json, which go against each other."""

    @wraps(function)
    def called(*arguments: Any, output: str | None, as_json: bool, **given: Any) -> Any:  # noqa: ANN401  what click calls
        if as_json and output not in (None, _JSON):
            raise click.UsageError(f"give only one of --json and -o {output}")
        form = _JSON if as_json else _TABLE if output is None else output
        return function(*arguments, output=form, **given)

    return called


def parse_output(text: str, view: View, views: Mapping[int, View]) -> Output:
    """What the user gave for -o. Raises a usage error before anything is started: for a suffix
    that VIEW has no format for, and for a path that cannot be written to."""
    if text in FORMS:
        return Output(text)
    accepted = one_of(FORMS)
    if not view.files:
        having = one_of([it.flag for it in views.values() if it.files])
        more = f"; {having} can be written to a file" if having and _is_path(text) else ""
        raise click.UsageError(f"-o {text}: give {accepted}{more}")
    name = Path(text).name.lower()
    for form in view.files:
        if name.endswith(form.suffix) and name != form.suffix:
            path = Path(os.path.realpath(text))
            check_path(text, path)
            return Output(path=path, format=form)
    suffixes = one_of([it.suffix for it in view.files])
    raise click.UsageError(f"-o {text}: give {accepted}, or a file whose name ends with {suffixes}")


def _is_path(text: str) -> bool:
    return "." in text or "/" in text


def check_path(text: str, path: Path) -> None:
    """Raises a usage error where PATH, without links, cannot be written. What is no regular file, a
    pipe or a device, would be replaced by one."""
    try:
        if path.is_dir():
            raise click.UsageError(f"-o {text}: this is a directory")
        if path.exists() and not path.is_file():
            raise click.UsageError(f"-o {text}: this is not a regular file")
        if not path.parent.is_dir():
            raise click.UsageError(f"-o {text}: there is no directory {path.parent}")
    except OSError as error:  # its name is too long, or a directory above it is closed to the user
        raise click.UsageError(f"-o {text}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise click.UsageError(f"-o {text}: the directory {path.parent} cannot be written to")


@contextmanager
def _uncollected() -> Iterator[None]:
    """In the block, no garbage is collected. A large profile becomes a tree of millions of objects,
    none of which is garbage: looking through them again and again takes longer than the rest."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def replace_file(path: Path, content: bytes) -> None:
    """Writes CONTENT to PATH. Another process sees what was there before, or all of it."""
    beside = path.with_name(f".coral-{secrets.token_hex(8)}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
