"""What is wrong with a configuration, in its users' words: where, the value, and what is accepted.

The types say what is accepted. This file knows none of the keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from coral.wire.text import safe

_MOST_SHOWN: Final = 200
_WORDS: Final[Mapping[object, str]] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list",
    dict: "a mapping of keys to values",
}

Decode = Callable[[type, object], object]


class ConfigError(ValueError):
    """A configuration is not accepted; the message, one line, has the source, the path and the
    value."""

    def __init__(self, message: str) -> None:
        super().__init__("; ".join(safe(line) for line in message.splitlines()))


class _Hint(NamedTuple):
    """A type hint: the type itself, the generic type that it is made from, and its bounds."""

    type: Any
    origin: Any
    metas: tuple[Meta, ...]

    @classmethod
    def of(cls, hint: object) -> _Hint:
        """Takes `Annotated` apart."""
        parts: tuple[Any, ...] = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        return cls(parts[0], get_origin(parts[0]) or parts[0], parts[1:])

    @property
    def is_struct(self) -> bool:
        """Whether it has keys of its own."""
        return isinstance(self.type, type) and issubclass(self.type, Struct)


def first_problem(value: object, hint: object, decode: Decode, path: str = "") -> str:
    """`PATH: what is wrong` for the first value in VALUE that HINT does not accept; empty if it
    accepts all. DECODE is msgspec's hook for custom types."""
    wanted = _Hint.of(hint)
    problems: Iterable[str]
    if wanted.is_struct and isinstance(value, Mapping):
        problems = _of_struct(value, wanted, decode, path)
    elif wanted.origin is dict and isinstance(value, Mapping):
        problems = _of_mapping(value, wanted, decode, path)
    elif wanted.origin is tuple and isinstance(value, list | tuple):
        each = get_args(wanted.type)[0]
        problems = (
            first_problem(below, each, decode, f"{path}[{index}]")
            for index, below in enumerate(value)
        )
    else:
        problems = _of_value(value, hint, decode, path)
    return next(filter(None, problems), "")


def _of_struct(
    value: Mapping[object, object], wanted: _Hint, decode: Decode, path: str
) -> Iterable[str]:
    hints = get_type_hints(wanted.type, include_extras=True)
    for name, below in value.items():
        if name in hints:
            yield first_problem(below, hints[str(name)], decode, _join(path, name))
        else:
            yield f"{_join(path, name)}: no such key{choices(str(name), hints, 'accepted are')}"
    for key in msgspec.structs.fields(wanted.type):
        if key.required and key.name not in value:
            yield f"{_join(path, key.name)}: it is missing; give {accepted(hints[key.name])}"


def _of_mapping(
    value: Mapping[object, object], wanted: _Hint, decode: Decode, path: str
) -> Iterable[str]:
    for name, below in value.items():
        if not isinstance(name, str):
            yield f"{path}: the key {shown(name)} is not text; put it in quotes"
        yield first_problem(below, get_args(wanted.type)[1], decode, _join(path, name))


def _of_value(value: object, hint: object, decode: Decode, path: str) -> Iterable[str]:
    try:
        msgspec.convert(value, hint, strict=False, dec_hook=decode)
    except msgspec.ValidationError:
        yield f"{path}: {shown(value)} is not accepted; give {accepted(hint)}"


def _join(path: str, name: object) -> str:
    name = str(name)[:_MOST_SHOWN]
    return f"{path}.{name}" if path else name


def accepted(hint: object) -> str:
    """What HINT accepts, as a phrase to put after "give"."""
    wanted = _Hint.of(hint)
    if wanted.origin is Literal:
        return f"one of {', '.join(get_args(wanted.type))}"
    if wanted.is_struct:
        return _WORDS[dict]
    text: str = getattr(wanted.type, "accepts", None) or _WORDS[wanted.origin]
    bounds = [f" {words}" for meta in wanted.metas if (words := _bounds(meta))]
    return text + "".join(bounds)


def _bounds(meta: Meta) -> str:
    if meta.ge is not None:
        return f"from {meta.ge:,} to {meta.le:,}"
    if meta.gt is not None:
        return f"more than {meta.gt:,}, at most {meta.le:,}"
    return ""


def choices(name: str, known: Iterable[str], introduction: str) -> str:
    """`; accepted are a, b` for that INTRODUCTION, after `; did you mean ...?` if one of KNOWN is
    like NAME."""
    known = tuple(known)
    near = difflib.get_close_matches(name.lower(), known, 1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"; {hint}{introduction} {', '.join(known)}"


def shown(value: object) -> str:
    """A value as a message shows it: shortened, and as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}[...]"
