"""Addresses as people write them."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv6Address


@lru_cache(4096)
def address_text(high: int, low: int, scope: int = 0) -> str:
    """An address of 128 bits as text; that of IPv4 in IPv6 as IPv4, a link-local one with its
    scope."""
    address = IPv6Address(high << 64 | low)
    text = str(address.ipv4_mapped or address)
    return f"{text}%{scope}" if scope and address.is_link_local else text


def endpoint(host: str, port: int) -> str:
    """HOST:PORT, with brackets where the host has colons itself."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
