"""What a source of names is: something that may be there, and says why it is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from coral.agent.machine.pods.facts import Facts


class SourceError(Exception):
    """A source cannot be asked; the message says why, and how to have it."""


@dataclass(frozen=True)
class SourceState:
    """One source of what is known of pods: whether it is used, and how, or why not."""

    name: str
    used: bool
    detail: str


class Source(Protocol):
    """Knows pods and containers of this node. Used by one thread at a time."""

    name: str  # one of `standing.SOURCES`

    @property
    def about(self) -> str:
        """What it is, once it has answered."""

    def fetch(self) -> Facts:
        """All that it knows. Blocks, for seconds at most. Raises `SourceError`."""

    def close(self) -> None:
        """Frees what it holds. It can be asked again."""
