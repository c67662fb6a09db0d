"""Requests that wait for their receiver: bounded in bytes, the oldest give way. Loop-free."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Request:
    """The body of a request, and how many samples it has."""

    body: bytes
    samples: int


class Backlog:
    """At most MOST_BYTES, or one request."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._waiting: deque[Request] = deque()
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def samples(self) -> int:
        """How many samples wait."""
        return sum(it.samples for it in self._waiting)

    def add(self, request: Request) -> int:
        """Lets REQUEST wait; returns how many samples gave way."""
        self._waiting.append(request)
        self.size_bytes += len(request.body)
        dropped = 0
        while self.size_bytes > self._most_bytes and len(self._waiting) > 1:
            dropped += self.take().samples
        return dropped

    def take(self) -> Request:
        """The oldest, which waits no more. Raises IndexError where none waits."""
        request = self._waiting.popleft()
        self.size_bytes -= len(request.body)
        return request
