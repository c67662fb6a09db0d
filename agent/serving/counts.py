"""The counts of the gate and the gRPC servers, for /metrics: connections, and refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

REFUSED_BY: Final = ("connections", "connections_per_peer", "descriptors")
"""The limits that connections are refused by; descriptors are the process's."""
STALLED: Final = "stalled"  # a reader that `agent.streams.Readers` has let go
CLOSED_FOR: Final = (
    "age", "certificate", "handshake", "http2_streams_per_peer", "idle", "malformed", "not_http2",
    STALLED, "tls", "unfinished", "unreachable", "unread",
)  # fmt: skip
"""Why the agent closes connections that neither their client nor gRPC has closed."""
CALLS_REFUSED_BY: Final = ("calls", "calls_per_peer", "streams", "streams_per_peer")
"""The limits that calls are refused by before they reach a method."""


def _zeros(names: Iterable[str]) -> Counter[str]:
    return Counter(dict.fromkeys(names, 0))  # a rate is known from the first increment on


@dataclass
class ConnectionCounts:
    """Of the listeners of one kind."""

    open: int = 0
    refused: Counter[str] = field(default_factory=lambda: _zeros(REFUSED_BY))
    closed: Counter[str] = field(default_factory=lambda: _zeros(CLOSED_FOR))
    throttled: int = 0
    """How often a connection had to wait because its peer sent too fast."""


@dataclass
class TlsCounts:
    """Of the certificate, key and authorities of one kind of listener."""

    reloads: int = 0
    failures: int = 0
    expiries_s: dict[str, float] = field(default_factory=dict)
    """When the `certificate`, the last of the `client_ca` and the first of the `client_crl` in use
    expire, in Unix seconds."""


@dataclass
class Counts:
    """Of all listeners and servers of one agent."""

    listeners: dict[str, ConnectionCounts] = field(
        default_factory=lambda: {"tcp": ConnectionCounts(), "unix": ConnectionCounts()}
    )
    """By `Listener.kind`."""
    exported: Counter[tuple[str, str]] = field(default_factory=Counter)
    """What OTLP was to carry: by signal, `metrics` or `spans`, and by `sent` or `lost`."""
    calls_refused: Counter[str] = field(default_factory=lambda: _zeros(CALLS_REFUSED_BY))
    tls: dict[str, TlsCounts] = field(default_factory=dict)
    """By what is served with it: `grpc`, `metrics`."""
