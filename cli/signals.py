"""How a command ends by a signal: in order where something has to be cleaned up, and without a
traceback. Its exit status is then the one that a shell has for the signal, 128 + N."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_AGAIN_S: Final = 0.01

_handlers: list[Callable[[int], None]] = []  # of the running event loop, the innermost last
_deferred: list[int] | None = None


class _Ended(SystemExit):
    """A signal ends the command."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(128 + number)


def _taken() -> list[signal.Signals]:
    """The signals that end a command; `nohup` has it ignore SIGHUP."""
    return [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _end_at_once() -> None:
    for number in _taken():
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def exiting() -> Iterator[None]:
    """In the block, the first signal raises SystemExit, so that `finally` blocks run; a second one
    ends the process at once."""

    def on_signal(number: int, _frame: object) -> None:
        _end_at_once()
        if _deferred is None:
            raise _Ended(number)
        _deferred.append(number)

    def on_unraisable(arguments: sys.UnraisableHookArgs) -> None:
        # A library's callback was under way, from which nothing can be raised: try again soon.
        if isinstance(arguments.exc_value, _Ended):
            number = arguments.exc_value.number
            signal.signal(number, on_signal)
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()
        else:
            hook_before(arguments)

    hook_before, sys.unraisablehook = sys.unraisablehook, on_unraisable
    before = {number: signal.signal(number, on_signal) for number in _taken()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook_before


@contextmanager
def deferring() -> Iterator[None]:
    """What `exiting` raises comes after the block: a process that is started there has an owner."""
    global _deferred  # noqa: PLW0603  signals are the process's own
    received: list[int] = []
    _deferred = received
    try:
        yield
    finally:
        _deferred = None
    if received:
        raise SystemExit(128 + received[0])


@contextmanager
def on_signal(handle: Callable[[int], None]) -> Iterator[None]:
    """In the block, the first signal calls HANDLE with its number, on the event loop; a second one
    ends the process at once. Blocks can be nested: the innermost counts."""
    loop = asyncio.get_running_loop()
    numbers = _taken()
    before = {number: signal.getsignal(number) for number in numbers}

    def leave() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)

    def first(number: int) -> None:
        leave()
        _end_at_once()
        _handlers[-1](number)

    outermost = not _handlers
    _handlers.append(handle)
    if outermost:
        for number in numbers:
            loop.add_signal_handler(number, first, number)
    try:
        yield
    finally:
        _handlers.pop()
        if outermost:
            leave()
            for number, handler in before.items():
                signal.signal(number, handler)


async def cancelled_by_signals(main: Coroutine[Any, Any, int]) -> int:
    """The exit status that MAIN returns; a signal cancels it, and is the status then."""
    task, received = asyncio.ensure_future(main), list[int]()

    def cancel(number: int) -> None:
        received.append(number)
        task.cancel()

    with on_signal(cancel):
        try:
            return await task
        except asyncio.CancelledError:
            if not received:
                raise
            return 128 + received[0]
