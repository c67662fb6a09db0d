"""What the store refuses, and why."""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot do it; the text is for the user."""


class StoreInUseError(StoreError):
    """Another process has the directory open."""


class StoreUnavailableError(StoreError):
    """The database is closed or being opened again. Ask again later."""
