"""Who calls: what the agent knows of the origin of a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


def _nothing() -> None:
    """There is no connection to close."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The origin of one call.

    `peer` is its address as gRPC has it, such as `unix:` or `ipv4:127.0.0.1:40000`; empty for a
    program that uses the supervisor as a library. `interactive` says that a person waits for what
    the call returns: the session that it reads is then the last to be preempted. `hang_up` closes
    the connection that the call came by, whatever is still to be sent.
    """

    peer: str = ""
    interactive: bool = False
    hang_up: Callable[[], None] = field(default=_nothing, compare=False)


LIBRARY = Caller()
