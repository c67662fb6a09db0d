"""Where metrics are sent, and within which bounds. Figures and names alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from coral.wire.posting import Headers

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Receiver:
    """A receiver at the URL `endpoint`. `headers` go with each request; `ca` are the authorities
    of its certificate, in PEM, or None for those of this machine."""

    endpoint: str
    headers: Headers = ()
    ca: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """`name` tells this colony's series from those of others that are sent to the same place, such
    as the other shards.

    `otlp` is `http://HOST:PORT` for gRPC, the URL to which `/v1/metrics` is added for HTTP;
    `remote_write` the whole URL.
    """

    name: str
    otlp: Receiver | None = None
    otlp_protocol: Literal["grpc", "http"] = "grpc"
    resource: Mapping[str, str] = field(default_factory=dict)
    """More attributes of OTLP's resources."""
    remote_write: Receiver | None = None
    labels: Mapping[str, str] = field(default_factory=lambda: {"job": "coral-colony"})
    """What every series of remote write has; `instance` is `name` unless it is here."""
    interval_s: float = 60.0
    max_series: int = 10_000
    """Label sets of each kind of collector."""
    queue_bytes: int = 16 * _MIB
    """Requests of remote write that wait for a receiver; the oldest give way."""
    most_rows: int = 2_000_000
    """Rows of rollups that wait to be added up; more are dropped."""
    timeout_s: float = 10.0
    most_retry_s: float = 30.0
