"""How many of something callers may have at a time, in all and each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from coral.agent.caller import Caller
from coral.agent.errors import LimitError


@dataclass
class Quota:
    """At most MOST at a time, and MOST_PER_PEER of one peer; NAME and PEER_NAME are the limits'
    names, THINGS is the noun for messages."""

    name: str
    most: int
    peer_name: str
    most_per_peer: int
    things: str
    refused: Counter[str] = field(default_factory=Counter)  # by limit
    taken: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def one(self, caller: Caller) -> Iterator[None]:
        """One more for CALLER, for the duration of the block. Raises `LimitError`."""
        peer = caller.principal
        self._check(self.peer_name, self.most_per_peer, self.taken[peer], f" of {peer}")
        self._check(self.name, self.most, self.taken.total(), "")
        self.taken[peer] += 1
        try:
            yield
        finally:
            self.taken[peer] -= 1
            if not self.taken[peer]:
                del self.taken[peer]

    def _check(self, name: str, most: int, taken: int, whose: str) -> None:
        if taken >= most:
            self.refused[name] += 1
            raise LimitError(
                f"limits.{name} is {most}, and {taken} {self.things}{whose} are under way: wait "
                "for one to end",
                f"limits.{name}",
            )
