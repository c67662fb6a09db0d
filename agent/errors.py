"""What the supervisor refuses, as types. Each front end (gRPC, a program) reports them in its own
way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self


class RefusedError(Exception):
    """A request that was understood and is not carried out."""


class InvalidRequestError(RefusedError):
    """A field's value is not accepted; the message names the field, the value, what is accepted."""

    @classmethod
    def not_one_of(cls, field: str, value: object, choices: Iterable[tuple[str, int]]) -> Self:
        """For a VALUE of an enum's field that is none of CHOICES, names with their numbers."""
        accepted = ", ".join(f"{name} ({number})" for name, number in choices)
        return cls(f"{field}: {value!r} is not accepted; give one of {accepted}")


class OutOfRangeError(RefusedError):
    """A number is beyond the last one that exists so far; later it may be accepted."""


class NotFoundError(RefusedError):
    """There is no such session, agent or service. HINT, at the end of the message, tells of what
    there is."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(f"{reason}{hint}")
        self.reason = reason


class FailedPreconditionError(RefusedError):
    """The session exists, and is not one to which this can be done."""


class LimitError(RefusedError):
    """A limit stands against it; the message names the limit, its value and the request. LIMIT is
    its name alone."""

    def __init__(self, message: str, limit: str = "") -> None:
        super().__init__(message)
        self.limit = limit
        self.is_audited = False


class DeniedError(RefusedError):
    """The agent's policy, or the caller's role, does not allow it."""

    resolved: Mapping[str, object] | None = None
    """What the request's target came to, for the audit; None where it was not looked at."""


class UnauthenticatedError(RefusedError):
    """It is not known who the caller is; the message says what is missing, and what helps."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(f"{reason}; {hint}")
        self.reason = reason


class UnsupportedError(RefusedError):
    """This machine, or this agent, cannot run the collector."""


class UnavailableError(RefusedError):
    """The agent is shutting down, or something that it has to ask does not answer."""
