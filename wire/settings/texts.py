"""The texts of a configuration: what may stand in one, and what becomes one."""

from __future__ import annotations

from typing import Final

from coral.wire.settings.words import shown
from coral.wire.text import is_printable

_MOST_BYTES: Final = 4096


def write_options_as_text(rules: object) -> None:
    """Makes numbers and booleans in `config` of each of RULES, as YAML reads an option such as
    `top: 5`, the texts that a request would have. RULES may be anything: a value of another shape
    is left for the check of types to refuse."""
    for rule in rules if isinstance(rules, list) else ():
        options = rule.get("config") if isinstance(rule, dict) else None
        if isinstance(options, dict):
            for name, value in options.items():
                if isinstance(value, bool | int | float):
                    options[name] = str(value).lower()


def problem_of_texts(value: object, path: str = "") -> str:
    """`PATH: what is wrong` for the first text in VALUE, keys included, that is too long or cannot
    be printed; empty if there is none. Every text is a name, a path or an address, and gets into
    logs and messages."""
    if isinstance(value, dict):
        parts = [
            (part, f"{path}.{key}" if path else str(key))
            for key, below in value.items()
            for part in (str(key), below)
        ]
    elif isinstance(value, list | tuple):
        parts = [(below, f"{path}[{index}]") for index, below in enumerate(value)]
    elif isinstance(value, str):
        return _problem_of(value, path)
    else:
        return ""
    return next(filter(None, (problem_of_texts(*part) for part in parts)), "")


def _problem_of(text: str, path: str) -> str:
    if not is_printable(text):
        return f"{path}: {shown(text)} has characters that cannot be printed; give printable text"
    if len(text.encode()) > _MOST_BYTES:
        return f"{path}: {shown(text)} has more than {_MOST_BYTES:,} bytes"
    return ""
