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
