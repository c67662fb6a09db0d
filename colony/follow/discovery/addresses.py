"""Addresses of agents, as operators write them."""

from __future__ import annotations

from typing import Final

from coral.client.address import checked_address, is_unix

ACCEPTED: Final = "give HOST:PORT, or unix:PATH"
_MOST_PORT: Final = 65535


def agent_address(text: str) -> str:
    """TEXT, an address of an agent. Raises ValueError, with what is accepted."""
    try:
        checked_address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not accepted; {ACCEPTED}") from None
    if not is_unix(text):
        host_and_port(text)
    return text


def host_and_port(text: str) -> tuple[str, int]:
    """The two parts of `HOST:PORT`; the host of an IPv6 address without its brackets. Raises
    ValueError, with what is accepted."""
    host, _, port = text.rpartition(":")
    is_number = port.isascii() and port.isdigit() and int(port) <= _MOST_PORT
    bare = host.removeprefix("[").removesuffix("]")
    is_in_brackets = host == f"[{bare}]"
    if not bare or not is_number or (":" in bare or bare != host) != is_in_brackets:
        raise ValueError(f"{text!r} is not accepted; {ACCEPTED}")
    return bare, int(port)


def joined(host: str, port: int) -> str:
    """HOST and PORT as one address; one of IPv6 is put in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
