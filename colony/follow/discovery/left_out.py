"""What a source of agents leaves out, and says so once: a name without an address, a slice that
cannot be read, addresses beyond the most that are followed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import structlog

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

MOST_ADDRESSES: Final = 10_000
"""Of one source: several times as many agents as one colony can follow."""
_MOST_NAMED: Final = 5


class Troubles:
    """Logs EVENT once for each thing that has a trouble, until it is over or becomes another."""

    def __init__(self, event: str, **context: str) -> None:
        self._event = event
        self._context = context
        self._told: dict[str, str] = {}

    def are(self, now: Mapping[str, str]) -> None:
        """NOW holds the reason of each thing that has a trouble; those of all others are over. New
        ones share a line, which names the first few."""
        new = [each for each, reason in now.items() if self._told.get(each) != reason]
        if new:
            log.warning(
                self._event, **self._context, count=len(new), first=new[:_MOST_NAMED],
                reason=now[new[0]],
            )  # fmt: skip
        self._told = dict(now)


class Bounded:
    """Lets at most MOST addresses of SOURCE through. Those that it let through before come first,
    so that no agent is followed no longer because of others that are new."""

    def __init__(self, source: str, most: int = MOST_ADDRESSES) -> None:
        self._source = source
        self._most = most
        self._before: frozenset[str] = frozenset()
        self._is_told = False

    def of(self, addresses: frozenset[str]) -> frozenset[str]:
        """ADDRESSES, or as many of them as may be followed, of which the log is told once."""
        more = len(addresses) - self._most
        if more > 0:
            if not self._is_told:
                log.warning(
                    "a source names more agents than are followed",
                    source=self._source, most=self._most, left_out=more,
                )  # fmt: skip
            stay = sorted(addresses & self._before)
            come = sorted(addresses - self._before)
            addresses = frozenset((stay + come)[: self._most])
        self._is_told = more > 0
        self._before = addresses
        return addresses
