"""Agents by a name in DNS: every address of `NAME:PORT` (A and AAAA, such as those of a headless
Service), or every target of an SRV record `_NAME._tcp.DOMAIN`, which has the ports too."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Collection
from typing import Final

import structlog

from coral.colony.follow.discovery.addresses import host_and_port, joined
from coral.colony.follow.discovery.left_out import MOST_ADDRESSES, Bounded, Troubles
from coral.colony.follow.discovery.source import Found

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_MOST_HOST: Final = 255
_AT_ONCE: Final = 4
"""Each name of a host that is asked for takes a thread of the loop's, which others need too."""
_GONE_AFTER_S: Final = 60.0
"""Servers of large names answer with some of the addresses only, in turns, so one that is missing
may come back with the next answer."""


class Seen:
    """The addresses of NAME, each until no answer has had it for GONE_AFTER_S."""

    def __init__(self, name: str, gone_after_s: float, most: int = MOST_ADDRESSES) -> None:
        self._gone_after_s = gone_after_s
        self._bounded = Bounded(f"agents.dns: {name}", most)
        self._seen_s: dict[str, float] = {}

    def after(self, answer: Collection[str], now_s: float) -> frozenset[str]:
        """Those that count once ANSWER has come at NOW_S."""
        seen_s = self._seen_s | dict.fromkeys(answer, now_s)
        there = frozenset(a for a, s in seen_s.items() if now_s - s <= self._gone_after_s)
        self._seen_s = {address: seen_s[address] for address in self._bounded.of(there)}
        return frozenset(self._seen_s)


class Named:
    """The agents of NAME, which is asked for every EVERY_S seconds. While there is no answer, those
    found before stay. A target of an SRV record that has no address, such as that of a pod that
    just went, is left out."""

    def __init__(self, name: str, every_s: float, gone_after_s: float = _GONE_AFTER_S) -> None:
        self._name = name
        self._every_s = every_s
        self._seen = Seen(name, gone_after_s)
        self._targets = Troubles("targets of an SRV record are left out", name=name)

    async def follow(self, found: Found) -> None:
        """See `Source`."""
        told: frozenset[str] | None = None
        failed = False
        while True:
            try:
                addresses = await self._resolved()
            except OSError as error:
                if not failed:
                    log.warning(
                        "a name of agents.dns has no answer", name=self._name, reason=_why(error)
                    )
                failed = True
                if told is None:
                    told = frozenset()
                    found(told)
            else:
                failed = False
                if told != (told := self._seen.after(addresses, time.monotonic())):
                    found(told)
            await asyncio.sleep(self._every_s)

    async def _resolved(self) -> frozenset[str]:
        """Raises OSError."""
        if not is_srv(self._name):
            return await _addresses(*host_and_port(self._name))
        found: set[str] = set()
        failures: dict[str, OSError] = {}
        places = asyncio.Semaphore(_AT_ONCE)

        async def resolve(host: str, port: int) -> None:
            async with places:
                if len(found) > MOST_ADDRESSES:
                    return
                try:
                    found.update(await _addresses(host, port))
                except OSError as error:
                    failures[joined(host, port)] = error

        targets = await _targets(self._name)
        await asyncio.gather(*(resolve(*target) for target in targets))
        if failures and not found:
            raise next(iter(failures.values()))
        self._targets.are({target: _why(failures[target]) for target in sorted(failures)})
        return frozenset(found)


def _why(error: OSError) -> str:
    return error.strerror or str(error)


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


async def _targets(name: str) -> frozenset[tuple[str, int]]:
    """Raises OSError."""
    from dns.asyncresolver import resolve  # noqa: PLC0415  the C library knows no SRV records
    from dns.exception import DNSException  # noqa: PLC0415

    try:
        answer = await resolve(name, "SRV")
    except DNSException as error:
        raise OSError(str(error)) from error
    return frozenset((str(each.target).rstrip("."), int(each.port)) for each in answer)
