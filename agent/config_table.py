"""The keys of the configuration as a table, for its page in docs/."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct

from coral.agent.config_rules import ServiceRule
from coral.agent.config_units import ByteCount, Duration
from coral.collectors.options import format_duration


def describe(struct: type[Struct], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every key of STRUCT and of those below it: its path, type, default and meaning."""
    for key in msgspec.structs.fields(struct):
        hint = get_type_hints(struct, include_extras=True)[key.name]
        if isinstance(hint, type) and issubclass(hint, Struct):
            yield from describe(hint, f"{prefix}{key.name}.")
            continue
        base, *metas = get_args(hint)
        description = next(m.description for m in reversed(metas) if m.description)
        default = "" if key.default is msgspec.NODEFAULT else _show(key.default)
        yield f"{prefix}{key.name}", _type_name(base), default, description
        if base == dict[str, ServiceRule]:
            yield from describe(ServiceRule, f"{prefix}{key.name}.NAME.")
        if struct_of := _listed_struct(base):
            yield from describe(struct_of, f"{prefix}{key.name}[].")


def _listed_struct(hint: object) -> type[Struct] | None:
    """The structure that HINT is a list of."""
    each = get_args(hint)[0] if get_origin(hint) is tuple else None
    return each if isinstance(each, type) and issubclass(each, Struct) else None


def _show(value: object) -> str:
    if isinstance(value, Duration):
        return format_duration(value)
    if isinstance(value, ByteCount):
        if not value:
            return ""
        return f"{value >> 20}MiB" if value >= 1 << 20 else f"{value >> 10}KiB"
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if _listed_struct(hint):
        return "list"
    if get_origin(hint) is tuple:
        return "list of texts"
    if get_origin(hint) is dict:
        return "mapping"
    names = {
        str: "text",
        bool: "boolean",
        int: "number",
        float: "number",
        Duration: "duration",
        ByteCount: "size",
    }
    return names[hint]  # type: ignore[index]
