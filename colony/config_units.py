"""The units of the configuration's values: durations and sizes, as users write them. Rows are kept
for years and on large disks, so both go beyond the agent's."""

from __future__ import annotations

import re
from typing import ClassVar, Final, TypeVar

import msgspec
from msgspec import Struct

from coral.wire.settings.words import first_problem

_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_SECONDS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_LEAST_S: Final = 1e-3
_MOST_S: Final = 3660 * 86_400.0
_SIZE: Final = re.compile(r"([0-9]{1,15})(KiB|MiB|GiB|TiB)?")
_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_MOST_BYTES: Final = 1 << 50

S = TypeVar("S", bound=Struct)


class Duration(float):
    """Seconds, written as a number or as `500ms`, `30s`, `5m`, `2h`, `7d`; from 1 ms to 3660
    days."""

    accepts: ClassVar = "a duration such as 500ms, 30s, 5m, 2h or 7d, from 1ms to 3660d"


class ByteCount(int):
    """Bytes, written as a number or as `64KiB`, `8MiB`, `1GiB`, `1TiB`; at most 1 PiB."""

    accepts: ClassVar = "a size such as 65536, 64KiB, 8MiB or 20GiB, at most 1024TiB"


def converted(values: object, wanted: type[S]) -> S:
    """VALUES, as YAML has them, as a WANTED. Raises ValueError, `PATH: what is wrong` for the first
    value that is not accepted."""
    try:
        return msgspec.convert(values, wanted, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ValueError(first_problem(values, wanted, _decode) or str(error)) from None


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
