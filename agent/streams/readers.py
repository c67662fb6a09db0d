"""The agent's streaming calls, and which of them have stopped reading.

They are kept apart from the sessions that they read: a session may end, and be forgotten, while a
call still holds its stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from coral.agent.caller import Caller

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.streams")

_CHECK_EVERY_S: Final = 1.0


class Reader:
    """The reading end of one streaming call."""

    def __init__(
        self, caller: Caller, task: asyncio.Task[None], clock: Callable[[], float]
    ) -> None:
        self.caller = caller
        self.blocked_since: float | None = None  # since when a write has not returned
        self._task = task
        self._clock = clock

    async def timed(self, messages: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """MESSAGES, each of which counts as being written until the next one is asked for."""
        async for message in messages:
            self.blocked_since = self._clock()
            yield message
            self.blocked_since = None

    def let_go(self) -> None:
        """Ends the call. Its connection is closed, because a call cannot be reset where nothing is
        read; its task is cancelled, and gives back what it holds."""
        self.caller.hang_up()
        self._task.cancel()


class Readers:
    """The open streaming calls. One that has not read for PATIENCE_S is let go."""

    def __init__(self, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._patience_s = patience_s
        self._clock = clock
        self._open: set[Reader] = set()

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def open(self, caller: Caller) -> Iterator[Reader]:
        """The current task as a streaming call of CALLER, for the duration of the block."""
        task = asyncio.current_task()
        assert task  # noqa: S101  a coroutine runs in one
        reader = Reader(caller, task, self._clock)
        self._open.add(reader)
        try:
            yield reader
        finally:
            self._open.discard(reader)

    def check(self) -> None:
        """Lets go of those that have stalled for too long."""
        now = self._clock()
        for reader in tuple(self._open):
            since = reader.blocked_since
            if since is not None and now - since > self._patience_s:
                self._open.discard(reader)  # once, whatever comes of it
                log.warning(
                    "subscriber let go",
                    peer=reader.caller.peer,
                    reason=f"nothing was read for {self._patience_s:g}s, this agent's "
                    "limits.stalled_subscriber",
                )
                reader.let_go()

    async def watch(self) -> None:
        """Checks every second, until cancelled."""
        while True:
            await asyncio.sleep(_CHECK_EVERY_S)
            self.check()
