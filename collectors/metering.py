"""Whose CPU time it is: what a task uses, on the event loop and in threads, is charged to its
owner.

The event loop and the pool of threads serve everybody, so that the CPU time of the process says
nothing about one session. `metered` measures each step that a coroutine takes on the loop;
`measured` does the same for the work that it hands to a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

Charge = Callable[[int], None]  # takes nanoseconds of CPU time


def uncharged(_cpu_ns: int) -> None:
    """A `Charge` to nobody."""


_charge: Final[ContextVar[Charge | None]] = ContextVar("charge", default=None)


class metered(Generic[T]):  # noqa: N801  it reads as a function
    """Await it to run COROUTINE; CHARGE is called with the CPU time of each of its steps, and with
    that of what it runs in threads by `measured`. What other tasks use in between is not in it."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], charge: Charge) -> None:
        self._coroutine = coroutine
        self._charge = charge

    def __await__(self) -> Generator[Any, Any, T]:
        coroutine, charge = self._coroutine, self._charge
        token = _charge.set(charge)
        sent: Any = None
        raised: BaseException | None = None
        try:
            while True:
                began_ns = time.thread_time_ns()
                try:
                    waited_for = coroutine.throw(raised) if raised else coroutine.send(sent)
                except StopIteration as done:
                    value: T = done.value
                    return value
                finally:
                    charge(time.thread_time_ns() - began_ns)
                sent = raised = None
                try:
                    sent = yield waited_for
                except BaseException as error:  # noqa: BLE001  it is the coroutine's
                    raised = error
        finally:
            _charge.reset(token)


def measured(function: Callable[[], T]) -> Callable[[], T]:
    """FUNCTION for another thread: its CPU time is charged to the owner of the calling task, if it
    has one."""
    charge = _charge.get()
    if not charge:
        return function

    def measuring() -> T:
        began_ns = time.thread_time_ns()
        try:
            return function()
        finally:
            charge(time.thread_time_ns() - began_ns)

    return measuring
