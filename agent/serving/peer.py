"""What the connections of one peer have in common: their number, their rates, what they keep open.
Loop-free."""

from __future__ import annotations

from typing import Final

from coral.agent.config import Limits
from coral.agent.rate import Bucket

_CALLS_AT_ONCE: Final = 0.2  # of those of a second


class Peer:
    """The connections of one peer: their number, and the rates at which they may send together."""

    def __init__(self, limits: Limits) -> None:
        self.connections = 0
        self.unfinished_bytes = 0  # of requests that have not ended
        self.streams = 0  # that are open
        bytes_per_s, calls_per_s = limits.peer_bytes_per_second, limits.peer_calls_per_second
        self._bytes = Bucket(bytes_per_s, bytes_per_s)
        self._calls = Bucket(calls_per_s, calls_per_s * _CALLS_AT_ONCE)

    def spend(self, size_bytes: int, calls: float, now_s: float) -> None:
        """Charges bytes and calls that were received."""
        self._bytes.spend(size_bytes, now_s)
        self._calls.spend(calls, now_s)

    def wait_s(self, now_s: float) -> float:
        """How long it has to wait before it may send more, in seconds."""
        return max(self._bytes.wait_s(now_s), self._calls.wait_s(now_s))

    def is_forgettable(self, now_s: float) -> bool:
        """Whether it has no connection and owes nothing."""
        return not self.connections and self._bytes.is_full(now_s) and self._calls.is_full(now_s)
