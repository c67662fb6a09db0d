"""What finds agents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Found = Callable[[frozenset[str]], None]


class Source(Protocol):
    """Finds agents."""

    async def follow(self, found: Found) -> None:
        """Calls FOUND with all addresses, at first and whenever they change, until it is
        cancelled."""
