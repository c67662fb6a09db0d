"""The options of collectors: `map<string, string>` on the wire, typed and checked here.

An options class is a frozen dataclass whose fields are made by `option`. A bad value raises an
`OptionError`, which names the option, the value and what is accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from coral.wire.text import is_printable

T = TypeVar("T")

_SIZE: Final = re.compile(r"([0-9]{1,15})(KiB|MiB)?")
_SIZE_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20}

_DURATION: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)(ms|s|m|h)?")
_MINUTE_S: Final = 60
MOST_ITEMS: Final = 10_240  # of a list; as many as a session has entries
_SECONDS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class OptionError(ValueError):
    """A config value that is not accepted.

    `str()` is the text for the API, in the contract's terms. For words of its own, a user interface
    has `name`, `value` and `accepts`, a phrase to put after "give".
    """

    def __init__(self, name: str, value: str, accepts: str) -> None:
        self.name, self.value, self.accepts = name, value, accepts
        super().__init__(f'config["{name}"]: {value!r} is not accepted; give {accepts}')


class UnknownOptionError(ValueError):
    """A config key that the collector does not have.

    `known` are the options that it has, `nearest` is the one most like `name`, or "".
    """

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name, self.known = name, tuple(sorted(known))
        self.nearest = next(iter(difflib.get_close_matches(name, self.known, 1)), "")
        hint = f' (did you mean "{self.nearest}"?)' if self.nearest else ""
        super().__init__(
            f'config["{name}"]: there is no such option{hint}; accepted are {", ".join(self.known)}'
        )


@dataclass(frozen=True, slots=True)
class Parser:
    """How a text becomes a value. `parse` raises ValueError for a text that it does not accept,
    with a phrase to put after "give", or without one where `accepts` says it all. Where what it
    accepts depends on the machine at that moment, `parse_anywhere` is the part that does not."""

    accepts: str
    parse: Callable[[str], Any]
    parse_anywhere: Callable[[str], Any] | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One option, for help and documentation."""

    name: str
    accepts: str
    default: str
    description: str


def option(parser: Parser, default: str, description: str) -> Any:  # noqa: ANN401
    """A field of an options class. DEFAULT is the text that a request would give; "" stands for the
    parser's empty value."""
    return dataclasses.field(
        default=parser.parse(default),
        metadata={"parser": parser, "default": default, "description": description},
    )


def describe(options_type: type) -> tuple[Option, ...]:
    """The options of a class, in the order of its fields."""
    return tuple(
        Option(
            field.name,
            field.metadata["parser"].accepts,
            field.metadata["default"],
            field.metadata["description"],
        )
        for field in dataclasses.fields(options_type)
    )


def parse_options(options_type: type[T], config: Mapping[str, str], *, anywhere: bool = False) -> T:
    """CONFIG as an instance of OPTIONS_TYPE. ANYWHERE leaves out the checks that depend on the
    machine at this moment. Raises `OptionError` or `UnknownOptionError`."""
    fields = {field.name: field for field in dataclasses.fields(options_type)}  # type: ignore[arg-type]
    values = {}
    for name, text in config.items():
        if name not in fields:
            raise UnknownOptionError(name, fields)
        parser: Parser = fields[name].metadata["parser"]
        parse = (anywhere and parser.parse_anywhere) or parser.parse
        try:
            values[name] = parse(text)
        except ValueError as error:
            raise OptionError(name, text, str(error) or parser.accepts) from error
    return options_type(**values)


def parse_duration_s(text: str) -> float:
    """`500ms`, `1s`, `1.5m`, `2h`, or plain seconds. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError("a duration such as 500ms, 30s or 5m")
    return float(match[1]) * _SECONDS[match[2] or "s"]


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration_s` reads as SECONDS."""
    if seconds and seconds < 1:
        return f"{seconds * 1000:g}ms"
    if seconds >= _MINUTE_S and seconds % _MINUTE_S == 0:
        return f"{seconds / _MINUTE_S:g}m"
    return f"{seconds:g}s"


def value_text(value: object) -> str:
    """The shortest text of the VALUE of an option, of which only durations have fractions."""
    if isinstance(value, float):
        return format_duration(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def duration(least_s: float, most_s: float) -> Parser:
    """A duration in seconds, within bounds."""
    accepts = f"a duration from {format_duration(least_s)} to {format_duration(most_s)}"

    def parse(text: str) -> float:
        try:
            seconds = parse_duration_s(text)
        except ValueError:
            raise ValueError(accepts) from None
        if not least_s <= seconds <= most_s:
            raise ValueError(accepts)
        return seconds

    return Parser(accepts, parse)


def integer(least: int, most: int) -> Parser:
    """A whole number, within bounds."""
    accepts = f"a whole number from {least} to {most}"

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,15}", text.strip()) or not least <= int(text) <= most:
            raise ValueError(accepts)
        return int(text)

    return Parser(accepts, parse)


def size(least_bytes: int, most_bytes: int) -> Parser:
    """A size in bytes that is a power of two, within bounds."""
    bounds = f"from {least_bytes >> 10}KiB to {most_bytes >> 20}MiB"
    accepts = f"a power of two {bounds}, such as 64KiB or 4MiB"

    def parse(text: str) -> int:
        match = _SIZE.fullmatch(text.strip())
        count = int(match[1]) * _SIZE_UNITS[match[2]] if match else 0
        if not least_bytes <= count <= most_bytes or count & (count - 1):
            raise ValueError(accepts)
        return count

    return Parser(accepts, parse)


def boolean() -> Parser:
    """`true` or `false`."""
    accepts = "true or false"

    def parse(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(accepts)
        return text.lower() == "true"

    return Parser(accepts, parse)


def choice(*values: str) -> Parser:
    """One of VALUES, or an empty text."""
    accepts = " or ".join(values)

    def parse(text: str) -> str:
        if text and text not in values:
            raise ValueError(accepts)
        return text

    return Parser(accepts, parse)


def text(accepts: str, most_bytes: int) -> Parser:
    """Any printable text of at most MOST_BYTES."""

    def parse(value: str) -> str:
        if len(value.encode(errors="replace")) > most_bytes:
            raise ValueError(accepts)
        if not is_printable(value):
            raise ValueError(f"{accepts}, in printable characters")
        return value

    return Parser(accepts, parse)


def items(
    each: Callable[[str], T], accepts: str, each_anywhere: Callable[[str], T] | None = None
) -> Parser:
    """A comma-separated list as a tuple, each item once; EACH raises ValueError for an item it does
    not accept. EACH_ANYWHERE leaves out the checks that depend on the machine."""

    def parse(value: str, each: Callable[[str], T] = each) -> tuple[T, ...]:
        texts = dict.fromkeys(item.strip() for item in value.split(",") if item.strip())
        if len(texts) > MOST_ITEMS:
            raise ValueError(f"{accepts}, at most {MOST_ITEMS:,}")
        return tuple(each(text) for text in texts)

    return Parser(accepts, parse, partial(parse, each=each_anywhere or each))
