"""Agents by a name in DNS: every address of `NAME:PORT` (A and AAAA, such as those of a headless
Service), or every target of an SRV record `_NAME._tcp.DOMAIN`, which has the ports too."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Final

import structlog

from coral.colony.follow.discovery.addresses import host_and_port, joined
from coral.colony.follow.discovery.source import Found

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_MOST_HOST: Final = 255
_GONE_AFTER_S: Final = 60.0
"""Servers of large names answer with some of the addresses only, in turns, so one that is missing
may come back with the next answer."""


class Named:
    """The agents of NAME, which is asked for every EVERY_S seconds. While there is no answer, those
    found before stay."""

    def __init__(self, name: str, every_s: float, gone_after_s: float = _GONE_AFTER_S) -> None:
        self._name = name
        self._every_s = every_s
        self._gone_after_s = gone_after_s

    async def follow(self, found: Found) -> None:
        """See `Source`."""
        seen_s: dict[str, float] = {}
        told: frozenset[str] | None = None
        failed = False
        while True:
            try:
                addresses = await self._resolved()
            except OSError as error:
                if not failed:
                    reason = error.strerror or str(error)
                    log.warning(
                        "a name of agents.dns has no answer", name=self._name, reason=reason
                    )
                failed = True
                if told is None:
                    told = frozenset()
                    found(told)
            else:
                failed, now_s = False, time.monotonic()
                seen_s |= dict.fromkeys(addresses, now_s)
                seen_s = {a: s for a, s in seen_s.items() if now_s - s <= self._gone_after_s}
                if told != (told := frozenset(seen_s)):
                    found(told)
            await asyncio.sleep(self._every_s)

    async def _resolved(self) -> frozenset[str]:
        """Raises OSError."""
        if not is_srv(self._name):
            return await _addresses(*host_and_port(self._name))
        targets = await _targets(self._name)
        each = await asyncio.gather(*(_addresses(host, port) for host, port in targets))
        return frozenset().union(*each)


def is_srv(name: str) -> bool:
    """Whether NAME is one of SRV records: RFC 2782."""
    return name.startswith("_")


async def _addresses(host: str, port: int) -> frozenset[str]:
    """Raises OSError."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{host[:_MOST_HOST]!r} is no name of a host") from error
    return frozenset(joined(str(address[0]), port) for *_, address in found)


async def _targets(name: str) -> list[tuple[str, int]]:
    from dns.asyncresolver import resolve  # noqa: PLC0415  the C library knows no SRV records
    from dns.exception import DNSException  # noqa: PLC0415

    try:
        answer = await resolve(name, "SRV")
    except DNSException as error:
        raise OSError(str(error)) from error
    return [(str(each.target).rstrip("."), int(each.port)) for each in answer]
