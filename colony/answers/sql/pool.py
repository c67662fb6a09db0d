"""Workers as the colony holds them: one waits, ready, so that a statement need not wait for Python
to start; each answers one statement and is gone after it, whatever happened.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import structlog

from coral.colony.answers.refusals import RefusedError
from coral.colony.answers.shares import Shares
from coral.colony.answers.sql.frames import (
    DONE,
    ERROR,
    HEAD,
    MOST_BYTES,
    NEEDS,
    PART,
    QUESTION,
    READY,
    TABLES,
    frame,
    packed,
    unpacked,
)
from coral.colony.answers.sql.hot import Shipment

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

_GRACE_S: Final = 2.0  # beyond its deadline, for a worker to say so itself
_START_S: Final = 60.0
_ENVIRONMENT: Final = ("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH")  # nothing secret

Ship = Callable[[Sequence[str], Sequence[str] | None], Awaitable[Shipment]]
"""Given the tables and the words of a statement, what it reads."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one statement may use, and how many there may be at a time."""

    deadline_s: float = 30.0
    memory_bytes: int = 256 << 20
    most_rows: int = 1_000_000
    at_a_time: int = 2


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer: how many rows it has, and whether there were more."""

    rows: int
    cut: bool


class _Worker:
    def __init__(self, process: subprocess.Popen[bytes], line: socket.socket) -> None:
        self.process = process
        self._line = line

    @classmethod
    def start(cls) -> _Worker:
        """Takes a few milliseconds. By vfork(2), unlike uvloop: no handler of gRPC is run."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "coral.colony.answers.sql.worker"),
                    *(str(theirs.fileno()), str(os.getpid())),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a traceback would be no line of the log
                pass_fds=(theirs.fileno(),),
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # a Ctrl-C is for the colony
            )
        return cls(process, ours)

    async def send(self, letter: bytes, data: object, fds: Sequence[int] = ()) -> None:
        content = frame(letter, packed(data))
        if fds:
            # The first byte brings the descriptors; a new socket has room for it.
            sent = socket.send_fds(self._line, [content[:1]], fds)
            content = content[sent:]
        with suppress(BrokenPipeError, ConnectionResetError):  # its last words may still be there
            await asyncio.get_running_loop().sock_sendall(self._line, content)

    async def receive(self) -> tuple[bytes, bytes]:
        """The next message. Raises EOFError where the worker is gone."""
        letter, size = HEAD.unpack(await self._read(HEAD.size))
        if size > MOST_BYTES:
            raise EOFError
        return letter, await self._read(size)

    async def _read(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < size:
            try:
                more = await loop.sock_recv(self._line, min(size - len(data), 1 << 20))
            except ConnectionResetError:
                more = b""
            if not more:
                raise EOFError
            data += more
        return bytes(data)

    async def end(self) -> int:
        """Kills it, if need be; how it ended."""
        self._line.close()
        self.process.kill()
        return await asyncio.to_thread(self.process.wait)


class Pool:
    """Answers statements. Use it as a context manager."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._spare: _Worker | None = None
        # Where there are several places, one is for others.
        most = self.limits.at_a_time
        self._shares = Shares(most, max(most - 1, 1))

    async def close(self) -> None:
        """Ends the worker that waits."""
        if self._spare:
            spare, self._spare = self._spare, None
            await spare.end()

    def warm_up(self) -> None:
        """Starts a worker for the next statement."""
        if not self._spare:
            self._spare = _Worker.start()

    async def answer(
        self, sql: str, ship: Ship, *, most_rows: int, deadline_s: float, caller: str = ""
    ) -> AsyncGenerator[bytes | Finished, None]:
        """Parts of an Arrow IPC stream, then the end. A reader that does not read is cut off at the
        deadline, as a statement that does not end is. Raises `BusyError` where all places that
        CALLER may have are taken, `RefusedError` for a statement that is refused, that fails, or
        that comes to a limit."""
        async with self._shares.place_at_once(caller, "SQL statements"), self._worker() as worker:
            question = {
                "sql": sql,
                "most_rows": most_rows,
                "deadline_s": deadline_s,
                "memory_bytes": self.limits.memory_bytes,
            }
            end_s = asyncio.get_running_loop().time() + deadline_s + _GRACE_S
            await worker.send(QUESTION, question)
            async for part in _conversation(worker, ship, end_s, deadline_s):
                yield part

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Worker]:
        self.warm_up()
        worker, self._spare = self._spare, None
        assert worker  # noqa: S101  warm_up made it
        try:
            async with asyncio.timeout(_START_S):
                letter, _ = await worker.receive()
            if letter != READY:
                raise EOFError
            self.warm_up()
            yield worker
        except (EOFError, TimeoutError) as error:
            status = await worker.end()
            log.warning("a worker for SQL ended without an answer", status=status)
            raise RefusedError(_fallen(status)) from error
        finally:
            await asyncio.shield(worker.end())


async def _conversation(
    worker: _Worker, ship: Ship, end_s: float, deadline_s: float
) -> AsyncIterator[bytes | Finished]:
    has_tables = False
    while True:
        try:
            async with asyncio.timeout_at(end_s):
                letter, content = await worker.receive()
        except TimeoutError as error:
            raise RefusedError(f"sql: it took longer than {deadline_s:g} s") from error
        if letter == PART:
            yield content
        elif letter == NEEDS and not has_tables:  # a worker that asks again is not itself any more
            has_tables = True
            needs: dict[str, Any] = unpacked(content)
            shipment = await ship(needs["tables"], needs["words"])
            try:
                await worker.send(TABLES, shipment.tables, shipment.fds)
            finally:
                shipment.close()
        elif letter == DONE:
            yield Finished(**unpacked(content))
            return
        elif letter == ERROR:
            raise RefusedError(f"sql: {_first_lines(unpacked(content))}")
        else:
            raise EOFError


def _fallen(status: int) -> str:
    """Why a worker ended without a word."""
    if status == -signal.SIGXCPU:
        return "sql: it used more CPU time than the limit"
    return (
        "sql: the process that answered it ended: it needed more memory, or depth, than the limit"
    )


def _first_lines(text: str, most: int = 6) -> str:
    return "\n".join(text.splitlines()[:most])
