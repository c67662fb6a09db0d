"""What is wrong with a configuration, in its users' words: where, the value, and what is accepted.

The types say what is accepted. This file knows none of the keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, TypeVar, get_args, get_origin
from typing import get_type_hints as hints_of

import msgspec
from msgspec import Meta, Struct

_MOST_SHOWN: Final = 200
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_SECONDS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_LEAST_S: Final = 1e-3
_MOST_S: Final = 3660 * 86_400.0
_SIZE: Final = re.compile(r"([0-9]{1,15})(KiB|MiB|GiB|TiB)?")
_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_MOST_BYTES: Final = 1 << 50
_WORDS: Final[Mapping[object, str]] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list",
    dict: "a mapping of keys to values",
}

S = TypeVar("S", bound=Struct)


class Duration(float):
    """Seconds, written as a number or as `500ms`, `30s`, `5m`, `2h`, `7d`."""

    accepts: ClassVar = "a duration such as 500ms, 30s, 5m, 2h or 7d, at most 3660d"


class ByteCount(int):
    """Bytes, written as a number or as `64KiB`, `8MiB`, `1GiB`, `1TiB`."""

    accepts: ClassVar = "a size such as 65536, 64KiB, 8MiB or 20GiB, at most 1024TiB"


def converted(values: object, wanted: type[S]) -> S:
    """VALUES, as YAML has them, as a WANTED. Raises ValueError, `PATH: what is wrong` for the first
    value that is not accepted."""
    try:
        return msgspec.convert(values, wanted, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ValueError(_problem(values, wanted, "") or str(error)) from None


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


def choices(name: str, known: Iterable[str], introduction: str) -> str:
    """`; INTRODUCTION a, b`, after `; did you mean ...?` if one of KNOWN is like NAME."""
    known = tuple(known)
    near = difflib.get_close_matches(name.lower(), known, 1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"; {hint}{introduction} {', '.join(known)}"


def accepted(hint: object) -> str:
    """What HINT accepts, as a phrase to put after "give"."""
    kind, origin, metas = _parts(hint)
    if origin is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if _is_struct(kind):
        return _WORDS[dict]
    text: str = getattr(kind, "accepts", None) or _WORDS[origin]
    bounds = (f" from {meta.ge:,} to {meta.le:,}" for meta in metas if meta.ge is not None)
    return text + "".join(bounds)


def _problem(value: object, hint: object, path: str) -> str:
    """`PATH: what is wrong` for the first value in VALUE that HINT does not accept; empty if it
    accepts all."""
    kind, origin, _ = _parts(hint)
    if _is_struct(kind) and isinstance(value, Mapping):
        problems: Iterable[str] = _of_struct(value, kind, path)
    elif origin is dict and isinstance(value, Mapping):
        problems = (
            _problem(it, get_args(kind)[1], _join(path, name)) for name, it in value.items()
        )
    elif origin is tuple and isinstance(value, list | tuple):
        each = get_args(kind)[0]
        problems = (_problem(it, each, f"{path}[{index}]") for index, it in enumerate(value))
    else:
        problems = _of_value(value, hint, path)
    return next(filter(None, problems), "")


def _of_struct(value: Mapping[Any, object], kind: type[Struct], path: str) -> Iterable[str]:
    hints = hints_of(kind, include_extras=True)
    for name, below in value.items():
        if name in hints:
            yield _problem(below, hints[name], _join(path, name))
        else:
            yield f"{_join(path, name)}: no such key{choices(str(name), hints, 'accepted are')}"
    for key in msgspec.structs.fields(kind):
        if key.required and key.name not in value:
            yield f"{_join(path, key.name)}: it is missing; give {accepted(hints[key.name])}"


def _of_value(value: object, hint: Any, path: str) -> Iterable[str]:  # noqa: ANN401  a type
    try:
        msgspec.convert(value, hint, strict=False, dec_hook=_decode)
    except msgspec.ValidationError:
        yield f"{path}: {shown(value)} is not accepted; give {accepted(hint)}"


def _parts(hint: object) -> tuple[Any, Any, tuple[Meta, ...]]:
    """A type, the generic type that it is made from, and its bounds."""
    parts: tuple[Any, ...] = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    return parts[0], get_origin(parts[0]) or parts[0], parts[1:]


def _is_struct(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def _join(path: str, name: object) -> str:
    name = str(name)[:_MOST_SHOWN]
    return f"{path}.{name}" if path else name


def _decode(wanted: type, value: object) -> object:
    if wanted is Duration:
        if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
            value = float(match[1]) * _SECONDS[match[2]]
        if isinstance(value, bool) or not isinstance(value, int | float):
            value = 0
        if _LEAST_S <= value <= _MOST_S:
            return Duration(value)
        raise ValueError(Duration.accepts)
    if wanted is ByteCount:
        if isinstance(value, str) and (found := _SIZE.fullmatch(value)):
            value = int(found[1]) * _UNITS[found[2]]
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_BYTES:
            return ByteCount(value)
        raise ValueError(ByteCount.accepts)
    raise NotImplementedError(wanted)
