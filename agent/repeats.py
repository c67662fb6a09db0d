"""How often one kind of thing is logged: a burst, then one a second. Loop-free.

For lines that a caller can cause at will, such as refusals. Starts and stops are not limited.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from coral.agent.rate import Bucket

_BURST: Final = 10
_PER_S: Final = 1.0
_MOST_KINDS: Final = 256
OTHERS: Final = "others"
"""The kind of everything that comes while there are too many kinds."""


@dataclass
class _Kind:
    lines: Bucket
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
            now_s = self._clock()
            state = self._kinds.get(kind) or self._new(kind, now_s)
            if not state.lines.take(1, now_s):
                state.left_out += 1
                return None
            left_out, state.left_out = state.left_out, 0
            return left_out

    def overdue(self, *, at_end: bool = False) -> list[tuple[Hashable, int]]:
        """The kinds of which lines were left out and not reported since, with their number: those
        of which a line may be logged again, or all AT_END. Each counts as reported then."""
        told: list[tuple[Hashable, int]] = []
        with self._lock:
            now_s = self._clock()
            for kind, state in self._kinds.items():
                if state.left_out and (state.lines.take(1, now_s) or at_end):
                    told.append((kind, state.left_out))
                    state.left_out = 0
        return told

    def _new(self, kind: Hashable, now_s: float) -> _Kind:
        if len(self._kinds) >= _MOST_KINDS - 1:
            self._forget(now_s)
        if len(self._kinds) >= _MOST_KINDS - 1:
            kind = OTHERS
        # The last line of a burst is on credit.
        return self._kinds.setdefault(kind, _Kind(Bucket(self._per_s, self._burst - 1)))

    def _forget(self, now_s: float) -> None:
        """Forgets the kinds that a new one would be like."""
        for kind, state in tuple(self._kinds.items()):
            if not state.left_out and state.lines.is_full(now_s):
                del self._kinds[kind]
