"""What the supervisor refuses, as types; each face (gRPC, a program) says it in its own way."""

from __future__ import annotations


class RefusedError(Exception):
    """A request that was understood and is not carried out."""


class InvalidRequestError(RefusedError):
    """A field's value is not accepted; the message names the field, the value, what is."""


class NotFoundError(RefusedError):
    """There is no such session, agent or service."""


class LimitError(RefusedError):
    """A limit stands against it; the message names the limit, its value and the request."""


class DeniedError(RefusedError):
    """The agent's policy does not allow it."""


class UnsupportedError(RefusedError):
    """This machine, or this agent, cannot run the collector."""
