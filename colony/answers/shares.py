"""Places that callers share: none can take all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from coral.colony.answers.refusals import BusyError


class Shares:
    """PLACES, of which one caller may have EACH at a time."""

    def __init__(self, places: int, each: int) -> None:
        self._count = places
        self._places = asyncio.Semaphore(places)
        self._each = each
        self._own: dict[str, asyncio.Semaphore] = {}
        self._callers: Counter[str] = Counter()

    @asynccontextmanager
    async def place(self, caller: str, most: int | None = None) -> AsyncIterator[None]:
        """A place for the duration of the block, once CALLER may have it. Raises `BusyError` where
        the caller has or waits for MOST already."""
        if most is not None and self._callers[caller] >= most:
            raise BusyError(
                f"{caller} has {most} questions under way, and may have no more at a time: wait "
                "for their answers, or cancel some"
            )
        own = self._own.setdefault(caller, asyncio.Semaphore(self._each))
        self._callers[caller] += 1
        try:
            # First its own: those of one caller who wait do not stand before others.
            async with own, self._places:
                yield
        finally:
            self._callers[caller] -= 1
            if not self._callers[caller]:
                del self._callers[caller], self._own[caller]

    @asynccontextmanager
    async def place_at_once(self, caller: str, what: str) -> AsyncIterator[None]:
        """A place for the duration of the block. Raises `BusyError`, with WHAT has the places,
        where CALLER would have to wait for one."""
        if self._places.locked():
            raise BusyError(
                f"{self._count} {what} are at work, which is the limit; try again later"
            )
        if self._callers[caller] >= self._each:
            raise BusyError(
                f"{self._callers[caller]} of the {self._count} places have {what} of {caller}, and "
                "the rest is for others; try again later"
            )
        async with self.place(caller):  # a semaphore that is not locked does not suspend
            yield
