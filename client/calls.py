"""A server-streaming call that is made again when its connection breaks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import grpc

from coral.client.backoff import Backoff, Retry
from coral.client.errors import (
    AgentError,
    ConnectionLostError,
    DeadlineExceededError,
    UnavailableError,
)


class Call(Protocol):
    """A call of grpc.aio whose messages are bytes."""

    async def initial_metadata(self) -> object:
        """Returns when the agent has answered."""

    async def read(self) -> object:
        """The next message, or grpc.aio.EOF."""

    def done(self) -> bool:
        """Whether it has ended."""

    async def code(self) -> grpc.StatusCode:
        """How it ended."""

    async def details(self) -> str | None:
        """Why."""

    def cancel(self) -> bool:
        """Ends it."""


class RepeatedCall:
    """One stream of messages over as many calls as it takes.

    MAKE makes a call that goes on where the messages read so far end; ERROR says what the status of
    a failed call means. A call counts only once it stands, that is, once the agent has answered
    with its headers.
    """

    def __init__(
        self,
        make: Callable[[], Call],
        error: Callable[[grpc.StatusCode, str], AgentError],
        retry: Retry,
        timeout_s: float,
    ) -> None:
        self.stood = 0  # calls that did
        self._make = make
        self._error = error
        self._retry = retry
        self._backoff = Backoff(retry)
        self._timeout_s = timeout_s
        self._call: Call | None = None
        self._was_cancelled = False  # by the caller, while it stood

    async def open(self) -> None:
        """Returns when the first call stands. A connection that breaks meanwhile is made again; an
        agent that is not there is an error at once. Raises `AgentError`."""
        try:
            await self._open_once()
        except ConnectionLostError as error:
            await self._reopen(error)

    async def read(self) -> bytes | None:
        """The next message; None where the agent has ended the call well. When the connection
        breaks, waits until a new call stands. Cancelling a read loses nothing: the next one goes on
        where this one began. Raises `AgentError`: what the agent refuses, or `UnavailableError`
        when it stays away for too long."""
        cause = AgentError(grpc.StatusCode.UNAVAILABLE, "the agent has ended the call")
        while True:
            try:
                if self._call is None:
                    if self._was_cancelled:
                        await self.open()
                    else:
                        await self._reopen(cause)
                    self._was_cancelled = False
                    continue
                message = await self._call.read()
            except grpc.aio.AioRpcError as failed:
                cause = self._error(failed.code(), failed.details() or "")
                self.close()
                if not _is_transient(cause):
                    raise cause from failed
            except asyncio.CancelledError:
                self._was_cancelled = self._call is not None or self._was_cancelled
                self.close()  # gRPC has cancelled the call together with the read
                raise
            else:
                self._backoff.delivers()
                return message if isinstance(message, bytes) else None

    def close(self) -> None:
        """Ends the call, if there is one."""
        if self._call:
            self._call.cancel()
        self._call = None

    async def _reopen(self, cause: AgentError) -> None:
        while (delay_s := self._backoff.delay_s(time.monotonic())) is not None:
            await asyncio.sleep(delay_s)
            try:
                await self._open_once()
            except AgentError as error:
                if not _is_transient(error):
                    raise
                cause = error
            else:
                return
        bound = f"for {self._retry.patience_s:g} s"
        if self._retry.attempts is not None:
            bound += f" or {self._retry.attempts} attempts"
        raise UnavailableError(
            grpc.StatusCode.UNAVAILABLE, f"gave up after trying to reconnect {bound}: {cause}"
        ) from cause

    async def _open_once(self) -> None:
        call = self._make()
        try:
            async with asyncio.timeout(self._timeout_s):
                await call.initial_metadata()
                code = await call.code() if call.done() else grpc.StatusCode.OK
            if code is not grpc.StatusCode.OK:
                raise self._error(code, await call.details() or "")
        except TimeoutError as late:
            call.cancel()
            raise self._error(grpc.StatusCode.DEADLINE_EXCEEDED, "") from late
        except grpc.aio.AioRpcError as failed:
            raise self._error(failed.code(), failed.details() or "") from failed
        except asyncio.CancelledError:
            call.cancel()
            raise
        self._call = call
        self.stood += 1
        self._backoff.stands()


def _is_transient(error: AgentError) -> bool:
    return isinstance(error, (UnavailableError, DeadlineExceededError))
