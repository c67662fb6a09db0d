"""How often one kind of thing is logged: a burst, then one a second. Loop-free.

For lines that a caller can cause at will, such as refusals. Starts and stops are not limited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

_BURST: Final = 10
_PER_S: Final = 1.0
_MOST_KINDS: Final = 256


@dataclass
class _Kind:
    tokens: float
    at_s: float
    left_out: int = 0


class RepeatLimit:
    """Admits BURST lines of each kind at once, then PER_S a second, and counts those left out."""

    def __init__(
        self,
        burst: int = _BURST,
        per_s: float = _PER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        self._kinds: dict[Hashable, _Kind] = {}
        self._lock = threading.RLock()  # threads log too

    def admit(self, kind: Hashable) -> int | None:
        """Whether to log a line of KIND now: None if not, else how many like it were left out since
        the last one."""
        with self._lock:
            state = self._kinds.get(kind)
            if state is None:
                if len(self._kinds) >= _MOST_KINDS:
                    self._kinds.pop(next(iter(self._kinds)))
                state = self._kinds[kind] = _Kind(self._burst, self._clock())
            if not self._take(state):
                state.left_out += 1
                return None
            left_out, state.left_out = state.left_out, 0
            return left_out

    def overdue(self, *, at_end: bool = False) -> list[tuple[Hashable, int]]:
        """The kinds of which lines were left out and not reported since, with their number: those
        of which a line may be logged again, or all AT_END. Each counts as reported then."""
        told: list[tuple[Hashable, int]] = []
        with self._lock:
            for kind, state in self._kinds.items():
                if state.left_out and (self._take(state) or at_end):
                    told.append((kind, state.left_out))
                    state.left_out = 0
        return told

    def _take(self, state: _Kind) -> bool:
        now = self._clock()
        tokens = state.tokens + (now - state.at_s) * self._per_s
        state.tokens, state.at_s = min(tokens, self._burst), now
        if state.tokens < 1:
            return False
        state.tokens -= 1
        return True
