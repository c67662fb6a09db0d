"""What the store refuses, and why."""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot do it; the text is for the user."""


class StoreInUseError(StoreError):
    """Another process has the directory open."""


class SequenceError(StoreError):
    """A delivery does not follow on what the store has of its session: events would be counted
    twice, or never. Subscribe again after `expected_seq`."""

    def __init__(self, text: str, expected_seq: int) -> None:
        super().__init__(text)
        self.expected_seq = expected_seq


class StoreUnavailableError(StoreError):
    """The database is closed or being opened again. Ask again later."""
