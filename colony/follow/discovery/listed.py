"""Agents whose addresses are known: those of the configuration, and those in a file that is
watched."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import structlog

from coral.colony.follow.discovery.addresses import agent_address
from coral.colony.follow.discovery.source import Found
from coral.wire.settings.files import read_regular

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_LOOK_EVERY_S: Final = 1.0
_MOST_BYTES: Final = 1 << 20

Signature = tuple[int, ...]


class Listed:
    """ADDRESSES, which do not change."""

    def __init__(self, addresses: Iterable[str]) -> None:
        self._addresses = frozenset(addresses)

    async def follow(self, found: Found) -> None:
        """See `Source`."""
        found(self._addresses)
        await asyncio.Event().wait()


class Watched:
    """The addresses in the file at PATH, one a line; `#` begins a comment. It is looked at every
    second, and read when it was replaced or written. While it cannot be read, or has a line that is
    no address, those found before stay."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def follow(self, found: Found) -> None:
        """See `Source`."""
        seen: Signature | None = None
        while True:
            signature = _signature(self._path)
            if signature != seen:
                seen = signature
                try:
                    found(parsed(read_regular(self._path, _MOST_BYTES)))
                except (OSError, ValueError) as error:
                    reason = getattr(error, "strerror", None) or str(error)
                    log.warning("agents.file is not read", file=str(self._path), reason=reason)
            await asyncio.sleep(_LOOK_EVERY_S)


def parsed(content: bytes) -> frozenset[str]:
    """The addresses in a file of this CONTENT. Raises ValueError, with the line that has none."""
    addresses = set()
    for number, line in enumerate(content.decode().splitlines(), 1):
        if text := line.partition("#")[0].strip():
            try:
                addresses.add(agent_address(text))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return frozenset(addresses)


def _signature(path: Path) -> Signature:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
