"""The origin of a call: what the agent knows of it, and how far it believes what it says."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field


class Trust(enum.Enum):
    """Why a caller is let in, the most trusted first."""

    OWNER = "owner"
    """Root or the agent's own user, which the kernel vouches for on a unix socket."""
    TOKEN = "token"  # noqa: S105  a word
    """A caller that sent the agent's token."""
    ANYONE = "anyone"
    """Any user of this machine: the agent has no token and listens on TCP."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Caller:
    """The origin of one call.

    `peer` is what logs and lists show, such as `unix: uid 0, pid 123` or `ipv4:127.0.0.1:40000`;
    empty for a program that uses the supervisor as a library. `principal` is what limits for one
    peer count by, such as `uid 0` or `10.0.0.7`. `pid` is the id of the process that connected by a
    unix socket, by the kernel's word, else 0. `interactive` says that a person waits for what
    the call returns: the session that it reads is then the last to be preempted. `hang_up` closes
    the caller's connection at once, whatever is being written to it.
    """

    peer: str = ""
    interactive: bool = False
    principal: str = ""
    trust: Trust = Trust.OWNER
    pid: int = 0
    hang_up: Callable[[], None] = field(default=_nothing, compare=False)

    @property
    def may_claim(self) -> bool:
        """Whether the agent believes what the caller says of itself, such as `interactive`."""
        return self.trust is not Trust.ANYONE

    @property
    def refusals_of(self) -> str:
        """Whose refusals the log counts together with this caller's: those of its principal, or of
        all owners, each connection of which is a principal."""
        return "" if self.trust is Trust.OWNER else self.principal


LIBRARY = Caller()
