"""How many agents are connected to at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    """Lets MOST agents connect at a time. Those that did not answer last time have a queue of their
    own: an address where nobody answers holds its place for seconds, and must not keep those
    waiting that are there."""

    def __init__(self, most: int) -> None:
        self._lanes = asyncio.Semaphore(most), asyncio.Semaphore(most)
        self.waiting = 0
        self.within = 0

    @asynccontextmanager
    async def passing(self, *, failed: bool) -> AsyncIterator[None]:
        """A place, for as long as the block. FAILED says that the agent did not answer last
        time."""
        lane = self._lanes[failed]
        self.waiting += 1
        try:
            await lane.acquire()
        finally:
            self.waiting -= 1
        self.within += 1
        try:
            yield
        finally:
            self.within -= 1
            lane.release()
