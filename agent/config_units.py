"""The units of the configuration's values: durations and sizes, as users write them."""

from __future__ import annotations

import re
from typing import ClassVar, Final

from coral.collectors.options import parse_duration_s

_LEAST_S: Final = 1e-3
_MOST_S: Final = 366 * 86_400.0
_SIZE: Final = re.compile(r"([0-9]{1,15})(KiB|MiB|GiB)?")
_MOST_SIZE_BYTES: Final = 1 << 40
_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class Duration(float):
    """Seconds, written as a number or as `500ms`, `30s`, `5m`, `2h`; from 1 ms to 366 days."""

    accepts: ClassVar = "a duration such as 500ms, 30s or 5m, from 1ms to 366 days"


class ByteCount(int):
    """Bytes, written as a number or as `64KiB`, `8MiB`, `1GiB`; at most 1 TiB."""

    accepts: ClassVar = "a size such as 65536, 64KiB or 8MiB, at most 1024GiB"


def decode(wanted: type, value: object) -> object:
    """VALUE, as YAML or the environment has it, as one of these types: msgspec's hook for types
    that it does not know. Raises ValueError with what is accepted."""
    if wanted is Duration:
        if isinstance(value, str):
            value = parse_duration_s(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            value = 0
        if _LEAST_S <= value <= _MOST_S:
            return Duration(value)
        raise ValueError(Duration.accepts)
    if wanted is ByteCount:
        if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
            value = int(match[1]) * _UNITS[match[2]]
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_SIZE_BYTES:
            return ByteCount(value)
        raise ValueError(ByteCount.accepts)
    raise NotImplementedError(wanted)
