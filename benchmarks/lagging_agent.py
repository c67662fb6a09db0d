"""`coral agent` with a probe of its event loop, for the bench.

    python -P -m benchmarks.lagging_agent LAGS_FILE COMMAND...

COMMAND is the one that starts the agent; it runs in this process.

Every millisecond a callback is due; LAGS_FILE, an array of 64-bit floats, has in its first element
how many have run, and from there on two for each: by how many seconds it was late, and how much CPU
time the loop's thread has used since the one before. After a late one the next is due at the next
full millisecond.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from coral.agent import main as agent
from coral.cli.main import main as coral

TICK_S: Final = 0.001
_MOST: Final = 1 << 20


class Probe:
    """Writes down how late the loop is."""

    def __init__(self, path: Path) -> None:
        self._told = np.memmap(path, np.float64, "w+", shape=(1 + 2 * _MOST,))
        self._used_s = 0.0

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins, once the loop runs."""
        loop.call_soon(lambda: self._wait(loop, time.monotonic()))

    def _wait(self, loop: asyncio.AbstractEventLoop, after_s: float) -> None:
        due_s = after_s + TICK_S
        loop.call_later(max(due_s - time.monotonic(), 0.0), self._tick, loop, due_s)

    def _tick(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        # The loop's own clock is that of its last turn, and its timers may be early by a part of
        # a millisecond.
        late_s = max(time.monotonic() - due_s, 0.0)
        count = int(self._told[0])
        if count < _MOST:
            used_s = time.thread_time()
            self._told[1 + 2 * count : 3 + 2 * count] = late_s, used_s - self._used_s
            self._used_s = used_s
            self._told[0] = count + 1
        self._wait(loop, due_s + late_s // TICK_S * TICK_S)


def read_lags(path: Path) -> NDArray[np.float64]:
    """How late each callback was, and the CPU time before it, in seconds: of shape (n, 2)."""
    told = np.memmap(path, np.float64, "r")
    return np.array(told[1 : 1 + 2 * int(told[0])]).reshape(-1, 2)


def _main(path: Path, arguments: list[str]) -> None:
    probe, make = Probe(path), agent._loop_factory()  # noqa: SLF001  the agent's own loop

    def watched() -> asyncio.AbstractEventLoop:
        loop = make()
        probe.watch(loop)
        return loop

    agent._loop_factory = lambda: watched  # noqa: SLF001
    sys.argv = ["coral", *arguments[arguments.index("agent") :]]
    coral()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2:])
