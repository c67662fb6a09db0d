"""The units of the configuration's values: durations and sizes, as users write them."""

from __future__ import annotations

from typing import ClassVar


class Duration(float):
    """Seconds, written as a number or as `500ms`, `30s`, `5m`, `2h`; from 1 ms to 366 days."""

    accepts: ClassVar = "a duration such as 500ms, 30s or 5m, from 1ms to 366 days"


class ByteCount(int):
    """Bytes, written as a number or as `64KiB`, `8MiB`, `1GiB`; at most 1 TiB."""

    accepts: ClassVar = "a size such as 65536, 64KiB or 8MiB, at most 1024GiB"
