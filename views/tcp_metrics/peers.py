"""The peer of a connection, in the room that a column has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from coral.views.names import Names
from coral.views.tcp_metrics.flows import LISTENER, OTHER, SERVER, Flow
from coral.views.text import shorten, times

_LEAST: Final = 12  # of an address; a client's own port is left out before it gets less


def peer(flow: Flow, names: Names | None = None) -> Callable[[int], str]:
    """`→ HOST:PORT` of a client, `:PORT ← HOST` of a server, and the number where there are
    several. Where there is no room, an address loses its middle, a name its end, and a client's own
    port is left out; the server's port and the number stay."""
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
        least = min(_LEAST, len(name or flow.address))
        if flow.role == SERVER and width - len(before) - len(after) < least:
            after = many
        room = max(width - len(before) - len(after), 1)
        if name:
            host = shorten(name, room)
        elif ":" in flow.address and after != many:
            host = f"[{shorten(flow.address, room - 2, (room - 2) // 2)}]"
        else:
            host = shorten(flow.address, room, room // 2)
        return f"{before}{host}{after}"

    return fit
