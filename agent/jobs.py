"""Jobs of requests, each in a thread of its own and with a deadline: what a request names is looked
up in this way. Probing the kernel, loading and draining have no deadline: what they make needs an
owner, so their callers wait for them (`collectors.runner.in_thread`).

A thread cannot be stopped. A job that is late is left behind: its request is refused and gives
its slot back, while the thread goes on and is counted. The threads are daemons, so that one that
never ends does not hold up the agent's end; and they are not those that drain sessions, so that
slow requests do not delay anybody's events.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeVar

from coral.agent.errors import LimitError

DEADLINE_S: Final = 10.0
MOST_LATE: Final = 8

T = TypeVar("T")


class Jobs:
    """Runs jobs whose results need no owner: a late one is dropped."""

    def __init__(self, deadline_s: float = DEADLINE_S, most_late: int = MOST_LATE) -> None:
        self._deadline_s = deadline_s
        self._most_late = most_late
        self.late = 0  # jobs that are past their deadline and still run

    async def run(self, function: Callable[[], T], what: str) -> T:
        """What FUNCTION returns. Raises what it raises, or `LimitError`, which names WHAT, past the
        deadline, while too many jobs are late, and where no thread can be started. A caller that is
        cancelled waits until then."""
        if self.late >= self._most_late:
            raise LimitError(
                f"{what}: {self.late} earlier requests still wait for this machine's files, the "
                "most that this agent allows",
                "late requests",
            )
        loop = asyncio.get_running_loop()
        deadline, done = loop.time() + self._deadline_s, loop.create_future()
        try:
            _start(function, loop, done, self._caught_up)
        except RuntimeError as error:
            raise LimitError(
                f"{what}: the agent could not start a thread ({error}): raise the limit on its "
                "threads (TasksMax of its unit, RLIMIT_NPROC), or try again later",
                "threads",
            ) from error
        cancelled: asyncio.CancelledError | None = None
        while not done.done() and (left_s := deadline - loop.time()) > 0:
            try:
                await asyncio.wait([done], timeout=left_s)
            except asyncio.CancelledError as error:
                cancelled = error  # the thread works on, so the request keeps its slot
        if not done.done():
            self.late += 1
            done.cancel()
        elif not cancelled:
            result: T = done.result()
            return result
        if cancelled:
            raise cancelled
        raise LimitError(
            f"{what}: this took longer than {self._deadline_s:g} s, the most that this agent waits "
            "for this machine's files",
            "time of a request",
        )

    def _caught_up(self) -> None:
        self.late -= 1


def _start(
    function: Callable[[], object],
    loop: asyncio.AbstractEventLoop,
    done: asyncio.Future[Any],
    caught_up: Callable[[], None],
) -> None:
    """Runs FUNCTION in a new thread, for its outcome to be in DONE; calls CAUGHT_UP in the loop
    once it ends where DONE was cancelled before. Raises RuntimeError where no thread can be
    started: the job might block, so it must not run in the loop."""

    def settle(result: object, failure: BaseException | None) -> None:
        if done.cancelled():
            caught_up()
        elif failure:
            done.set_exception(failure)
            done.exception()  # marks it as seen: a cancelled caller does not look
        else:
            done.set_result(result)

    def job() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001  raised in the coroutine
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=job, name="coral-request", daemon=True).start()
