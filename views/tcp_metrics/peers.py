"""The peer of a connection, in the room that a column has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from coral.views.names import Names
from coral.views.tcp_metrics.flows import LISTENER, OTHER, SERVER, Flow
from coral.views.text import shorten, times

_LEAST: Final = 5


def endpoint(host: str, port: int) -> str:
    """HOST:PORT, with brackets where the host has colons itself."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def peer(flow: Flow, names: Names | None = None) -> Callable[[int], str]:
    """`→ HOST:PORT` of a client, `:PORT ← HOST` of a server, and the number where there are
    several. Where there is no room, an address loses its middle and a name its end; port and
    number stay."""
    many = f" {times(flow.connections)}" if flow.connections > 1 else ""
    if flow.address == OTHER:
        return lambda width: shorten(f"others{many}", width, len(many))
    if flow.role == LISTENER:
        return lambda width: shorten(f":{flow.port}{many}", width, len(many))
    before, port = "→ ", f":{flow.port}"
    if flow.role == SERVER:
        before, port = f":{flow.port} ← ", f":{flow.other_port}" if flow.other_port else ""
    if flow.addresses > 1:
        text = f"{before}{flow.addresses:,} addresses{many}"
        return lambda width: shorten(text, width, len(many))
    name = names.of(flow.address) if names else ""

    def fit(width: int) -> str:
        after = f"{port}{many}"
        least = max(width - len(before) - len(after), _LEAST)
        if name:
            host = shorten(name, least)
        elif ":" in flow.address:
            host = f"[{shorten(flow.address, least - 2, (least - 2) // 2)}]" if port else ""
            host = host or shorten(flow.address, least, least // 2)
        else:
            host = shorten(flow.address, least, least // 2)
        return f"{before}{host}{after}"

    return fit
