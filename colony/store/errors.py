"""What the store refuses, and why."""

from __future__ import annotations

from coral.colony.delivery import EndedError


class StoreError(Exception):
    """The store cannot do it; the text is for the user."""


class StoreInUseError(StoreError):
    """Another process has the directory open."""


class StoreEndedError(StoreError, EndedError):
    """The writing thread has ended: nothing is stored any more."""


class StoreUnavailableError(StoreError):
    """The database is closed or being opened again. Ask again later."""
