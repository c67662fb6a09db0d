"""When a window begins and ends, as users write it."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Final

import click

_AGO: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|d|w)")
_SECONDS: Final = {
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86_400.0,
    "w": 604_800.0,
}
_CLOCK: Final = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?")
_ACCEPTED: Final = (
    "give how long ago, such as 15m, 6h or 7d, or a time, such as 12:03 or 2026-11-27T12:03"
)


class MomentType(click.ParamType[float | datetime]):
    """`15m`: so many seconds ago; `12:03`, `2026-11-27`, `2026-11-27T12:03:10Z`: a time."""

    name = "moment"

    def convert(
        self,
        value: object,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float | datetime:
        """Seconds ago or a time, or a usage error."""
        try:
            return moment(str(value), datetime.now().astimezone())
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


class SpanType(click.ParamType[float]):
    """`1h`: as seconds."""

    name = "span"

    def convert(
        self,
        value: object,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float:
        """Seconds, or a usage error."""
        seconds = span_s(str(value))
        if not seconds:
            self.fail(f"{value!r} is not a time span; give 30m, 1h or 7d", param, ctx)
        return seconds


def span_s(text: str) -> float:
    """`1h` in seconds; 0 for what is no span."""
    match = _AGO.fullmatch(text)
    return float(match[1]) * _SECONDS[match[2]] if match else 0.0


def moment(text: str, now: datetime) -> float | datetime:
    """What TEXT says at NOW, which has a zone. A time of day without a date is the last one that
    has been. Raises ValueError."""
    if text == "now":
        return 0.0
    if match := _AGO.fullmatch(text):
        return float(match[1]) * _SECONDS[match[2]]
    try:
        if match := _CLOCK.fullmatch(text):
            hour, minute, second = (int(part or 0) for part in match.groups())
            found = now.replace(hour=hour, minute=minute, second=second, microsecond=0)
            return found if found <= now else found - timedelta(days=1)
        found = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(_ACCEPTED) from None
    found = found if found.tzinfo else found.astimezone()
    if found > now:
        raise ValueError("it is in the future")
    return found
