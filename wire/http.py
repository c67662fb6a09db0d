"""Where the histograms of HTTP requests divide times: the boundaries of OpenTelemetry's semantic
conventions (`http.server.request.duration`), extended below."""

from __future__ import annotations

from typing import Final

_NS_PER_US: Final = 1000
_BOUNDS_US: Final = (
    *(100, 250, 500, 1000, 2500),
    *(5000, 10_000, 25_000, 50_000, 75_000, 100_000, 250_000, 500_000, 750_000),
    *(1_000_000, 2_500_000, 5_000_000, 7_500_000, 10_000_000),
)
BOUNDS_NS: Final = tuple(us * _NS_PER_US for us in _BOUNDS_US)
