"""The origin of a call: what the agent knows of it, and how far it believes what it says."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final


class Trust(enum.Enum):
    """Why a caller is let in, the most trusted first."""

    OWNER = "owner"
    """Root or the agent's own user, which the kernel vouches for on a unix socket."""
    TOKEN = "token"  # noqa: S105  a word
    """A caller that proved who it is, such as by a token or a certificate."""
    ANYONE = "anyone"
    """Any user of this machine: the agent has no token and listens on TCP."""


# The kinds of names that tell one caller from all others, the most telling first. The rest (`gid:`,
# `socket:`, groups) say what several callers have in common.
_PRINCIPALS: Final = ("token:", "kubernetes:", "spiffe:", "subject:", "dns:", "uid:")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a caller is, and how the agent knows.

    HOW is `unix`, `certificate`, `token`, `kubernetes`, `anyone` or, for a program that uses the
    supervisor as a library, `library`. NAMES are what roles are given to, such as `uid:1000`,
    `socket:view`, `token:ci` or `kubernetes:system:serviceaccount:shop:tracer`.
    """

    how: str
    names: tuple[str, ...]

    @property
    def principal(self) -> str:
        """The name that sessions belong to, and that quotas count by."""
        for prefix in _PRINCIPALS:
            for name in self.names:
                if name.startswith(prefix):
                    return name
        return self.names[0] if self.names else self.how


LIBRARY_IDENTITY: Final = Identity("library", ())


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a call that was let in may use, and see. KEY is what in the configuration let it in, for
    messages; a number of 0 is without a limit of its own. REDACTED streams do not show the other
    ends of connections."""

    key: str = ""
    sessions: int = 0
    streams: int = 0
    bytes_per_second: int = 0
    redacted: bool = False


UNLIMITED: Final = Allowance()


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
    the caller's connection at once, whatever is being written to it. `identity` is what roles
    depend on; `allowance` is what comes with the one that let this call in.
    """

    peer: str = ""
    interactive: bool = False
    principal: str = ""
    trust: Trust = Trust.OWNER
    pid: int = 0
    hang_up: Callable[[], None] = field(default=_nothing, compare=False)
    identity: Identity = LIBRARY_IDENTITY
    allowance: Allowance = UNLIMITED

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
