"""Where an agent is, and how gRPC is to connect to it."""

from __future__ import annotations

import ipaddress
import os
from typing import Final

DEFAULT_ADDRESS: Final = "unix:/run/coral/agent.sock"
ENV_ADDRESS: Final = "CORAL_AGENT"
DEFAULT_COLONY: Final = "unix:/run/coral/colony.sock"
ENV_COLONY: Final = "CORAL_COLONY"
ENV_TOKEN: Final = "CORAL_TOKEN"  # noqa: S105  the variable's name

_KEEPALIVE_MS: Final = 30_000
_PING_TIMEOUT_MS: Final = 10_000
_LEAST_BACKOFF_MS: Final = 100
_MOST_BACKOFF_MS: Final = 1_000
_MOST_PATH_BYTES: Final = 107  # sun_path of unix(7), without its NUL
_SCHEMES: Final = ("ipv4:", "ipv6:", "dns:///", "dns:")


def default_address() -> str:
    """CORAL_AGENT, else the socket of this machine's agent."""
    return os.environ.get(ENV_ADDRESS) or DEFAULT_ADDRESS


def default_colony() -> str:
    """CORAL_COLONY, else the socket of this machine's colony."""
    return os.environ.get(ENV_COLONY) or DEFAULT_COLONY


def checked_address(address: str) -> str:
    """ADDRESS. Raises ValueError for one that gRPC cannot take."""
    path = address.removeprefix("unix:") if is_unix(address) else "."
    if not address.isprintable() or not path or len(path.encode()) > _MOST_PATH_BYTES:
        raise ValueError(
            f"address: {address!r} is not accepted; give HOST:PORT, or unix:PATH with a path of at "
            f"most {_MOST_PATH_BYTES} bytes"
        )
    return address


def checked_token(token: str) -> str:
    """TOKEN, which may be empty. Raises ValueError for one that no header can carry."""
    token = token.strip()
    if not (token.isascii() and (token.isprintable() or not token)):
        raise ValueError(f"token, or {ENV_TOKEN}: it has to be printable ASCII")
    return token


def is_unix(address: str) -> bool:
    """Whether ADDRESS is a unix socket."""
    return address.startswith(("unix:", "unix-abstract:"))


def is_local(address: str) -> bool:
    """Whether ADDRESS is a unix socket or on loopback, where no proxy can reach it."""
    if is_unix(address):
        return True
    for scheme in _SCHEMES:
        address = address.removeprefix(scheme)
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def channel_options(
    address: str, read_ahead_bytes: int | None = None
) -> tuple[tuple[str, int], ...]:
    """gRPC's options for a connection to ADDRESS. Of each stream that is not read it buffers
    READ_AHEAD_BYTES, by default as much as passes in a round trip, up to some megabytes."""
    window = (
        (("grpc.http2.lookahead_bytes", read_ahead_bytes), ("grpc.http2.bdp_probe", 0))
        if read_ahead_bytes
        else ()
    )
    return (
        *window,
        # A client has a connection of its own: by default all channels to one address share one.
        ("grpc.use_local_subchannel_pool", 1),
        # While a call waits, an agent that has vanished without closing its connection is found.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
        # Calls that fail are repeated by `Backoff`; gRPC's own, longer delays would add to its.
        ("grpc.initial_reconnect_backoff_ms", _LEAST_BACKOFF_MS),
        ("grpc.max_reconnect_backoff_ms", _MOST_BACKOFF_MS),
        # gRPC honours http_proxy even for loopback, and ignores no_proxy=127.0.0.0/8.
        *((("grpc.enable_http_proxy", 0),) if is_local(address) else ()),
    )
