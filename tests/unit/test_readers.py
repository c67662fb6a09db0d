"""Streaming calls: which have stopped reading, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from coral.agent.caller import LIBRARY, Caller
from coral.agent.streams import Readers
from tests.scripted import until

PATIENCE_S = 30.0


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def _messages() -> AsyncIterator[bytes]:
    while True:
        yield b"x"


async def _quiet() -> AsyncIterator[bytes]:
    """One message, and then none."""
    yield b"x"
    await asyncio.Event().wait()


class Call:
    """A streaming call whose every write waits until the test lets it return."""

    def __init__(self, readers: Readers) -> None:
        self.hung_up = 0
        self.written = 0
        self.may_write = asyncio.Event()
        caller = replace(LIBRARY, peer="unix:", hang_up=self._hang_up)
        self.task = asyncio.create_task(self._serve(readers, caller))

    def _hang_up(self) -> None:
        self.hung_up += 1

    async def _serve(self, readers: Readers, caller: Caller) -> None:
        with readers.open(caller) as reader:
            async for _ in reader.timed(_messages()):
                await self.may_write.wait()
                self.may_write.clear()
                self.written += 1

    async def write_one(self) -> None:
        before = self.written
        self.may_write.set()
        await until(lambda: self.written > before)


async def test_a_call_that_reads_nothing_is_let_go_after_the_limit_and_no_other() -> None:
    clock = Clock()
    readers = Readers(PATIENCE_S, clock)
    stalled, reading = Call(readers), Call(readers)
    await until(lambda: len(readers) == 2)
    await asyncio.sleep(0)
    clock.now_s += PATIENCE_S
    await reading.write_one()
    readers.check()
    assert len(readers) == 2
    clock.now_s += 0.001
    readers.check()
    assert (stalled.hung_up, reading.hung_up) == (1, 0)
    with pytest.raises(asyncio.CancelledError):
        await stalled.task
    assert len(readers) == 1
    readers.check()
    assert stalled.hung_up == 1
    clock.now_s += PATIENCE_S
    readers.check()
    assert reading.hung_up == 1
    with pytest.raises(asyncio.CancelledError):
        await reading.task


async def test_a_call_that_waits_for_events_is_not_stalled() -> None:
    clock = Clock()
    readers = Readers(PATIENCE_S, clock)

    async def quiet() -> None:
        with readers.open(LIBRARY) as reader:
            async for _ in reader.timed(_quiet()):
                await asyncio.sleep(0)

    task = asyncio.create_task(quiet())
    for _ in range(3):
        await asyncio.sleep(0)
    clock.now_s += 10 * PATIENCE_S
    readers.check()
    assert len(readers) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(readers) == 0
