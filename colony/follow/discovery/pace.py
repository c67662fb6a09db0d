"""How soon a server is asked again that ends its answers, or fails."""

from __future__ import annotations

from typing import Final

LEAST_PAUSE_S: Final = 1.0
MOST_PAUSE_S: Final = 60.0


class Pace:
    """The pause before the server is asked again: LEAST_S at first, and twice as long each time
    that nothing came of it, up to MOST_S."""

    def __init__(self, least_s: float = LEAST_PAUSE_S, most_s: float = MOST_PAUSE_S) -> None:
        self._least_s = least_s
        self._most_s = most_s
        self._next_s = least_s

    @property
    def is_slow(self) -> bool:
        """Whether nothing came of the last two."""
        return self._next_s > 2 * self._least_s

    def ended(self, lasted_s: float, changes: int) -> float:
        """The pause in seconds after an answer that the server ended as it may. One that lasted is
        followed by the next at once, and one that brought CHANGES did not fail."""
        if changes or lasted_s >= self._least_s:
            self._next_s = self._least_s
        return 0.0 if lasted_s >= self._least_s else self._again()

    def failed(self, lasted_s: float) -> float:
        """The pause in seconds after a failure. Whether there were changes before does not count:
        a server that fails after each of them would be asked without end."""
        if lasted_s >= self._most_s:
            self._next_s = self._least_s
        return self._again()

    def _again(self) -> float:
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._most_s)
        return pause_s
