"""What the agent knows of callers by their connection: from gRPC's context to a `Caller`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import grpc

from coral.agent.access.grants import CERTIFICATE
from coral.agent.caller import Caller, Identity, Trust
from coral.agent.config_access import ANYONE, LOOPBACK
from coral.agent.serving.counts import STALLED
from coral.agent.serving.listening import Origin
from coral.agent.serving.relay import Connection

Context = grpc.aio.ServicerContext[Any, Any]
CallerOf = Callable[[Context], Caller]

NOBODY: Final = Identity("anyone", (ANYONE,))
"""A caller that proves nothing."""
_OF_CERTIFICATES: Final = ("spiffe:", "subject:", "dns:")
_OF_THIS_MACHINE: Final = ("ipv4:127.", "ipv6:[::1]", "ipv6:[::ffff:127.")


def unknown_caller(context: Context) -> Caller:
    """The caller, as gRPC knows it; for servers without a gate."""
    return Caller(
        peer=context.peer(), principal=context.peer(), trust=Trust.ANYONE, identity=NOBODY
    )


class Callers:
    """Knows callers by their connection, which FIND finds by the name that gRPC has for it."""

    def __init__(self, find: Callable[[str], Connection | None]) -> None:
        self._find = find

    def of(self, context: Context) -> Caller:
        """The caller, as its connection shows it."""
        name = context.peer()
        connection = self._find(name)
        if not connection:  # it was closed meanwhile
            return unknown_caller(context)
        origin, trust = connection.origin, connection.origin.trust
        identity = identity_of(origin)
        if trust is Trust.ANYONE and identity.how == "certificate":
            trust = Trust.TOKEN
        return Caller(
            peer=origin.address,
            principal=f"{origin.principal}, {name}" if trust is Trust.OWNER else origin.principal,
            trust=trust,
            pid=origin.pid,
            hang_up=partial(connection.close, STALLED),
            identity=identity,
        )


def identity_of(origin: Origin) -> Identity:
    """What a connection proves of its caller."""
    if any(name.startswith(_OF_CERTIFICATES) for name in origin.names):
        return Identity("certificate", (*origin.names, CERTIFICATE))
    if origin.address.startswith("unix:"):
        return Identity("unix", origin.names)
    # The user of a connection over TCP is looked up, not vouched for: it gives no role.
    is_local = origin.address.startswith(_OF_THIS_MACHINE)
    return Identity("anyone", (ANYONE, LOOPBACK)) if is_local else NOBODY
