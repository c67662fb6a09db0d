"""The door of the services: who calls, by the connection and by a token, and whether it may.

What is decided here is decided by `agent.access`; this is its shell, which waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from google.protobuf.descriptor import MethodDescriptor

from coral.agent.access.access import Verdict
from coral.agent.access.asking import Asking
from coral.agent.access.grants import ADMIN_SOCKET
from coral.agent.access.kubernetes import Reviews
from coral.agent.access.rpcs import About, Role, rpc_of
from coral.agent.access.tokens import Tokens
from coral.agent.caller import Caller, Identity, Trust
from coral.agent.errors import (
    DeniedError,
    LimitError,
    UnauthenticatedError,
    UnavailableError,
)
from coral.agent.rate import Bucket
from coral.agent.serving.caller import NOBODY, Context
from coral.agent.sessions.supervisor import Supervisor, unknown

_BEARER: Final = "Bearer "
_HINT: Final = "send `authorization: Bearer TOKEN` with this agent's token"
_MOST_TOKEN_BYTES: Final = 8 << 10
_TOKENS_A_SECOND: Final = 10.0  # of one peer, that only Kubernetes can know
_TOKENS_AT_ONCE: Final = 20.0
_MOST_PEERS: Final = 1024


class Door:
    """Lets callers in to the services of SUPERVISOR, by TOKENS, REVIEWS and their connections."""

    def __init__(
        self,
        supervisor: Supervisor,
        tokens: Tokens,
        reviews: Reviews | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._unheard: dict[str, Bucket] = {}  # by the peer that sends unknown tokens
        self._supervisor, self._access = supervisor, supervisor.access
        self._auth = supervisor.config.auth
        self._tokens, self._reviews = tokens, reviews
        self._asking = Asking(supervisor.access)

    async def let_in(self, caller: Caller, context: Context, method: MethodDescriptor) -> Caller:
        """CALLER with who it is and what lets it in. Raises `UnauthenticatedError`, `DeniedError`,
        or `UnavailableError` where Kubernetes does not answer."""
        row = rpc_of(method.full_name)
        if row.least is Role.NONE:
            return caller
        metadata = dict(context.invocation_metadata() or ())
        given = str(metadata.get("authorization", ""))
        try:
            caller = await self._identified(caller, given)
        except UnauthenticatedError as error:
            verdict = Verdict(False, Role.NONE, error.reason)
            self._access.audit.decided(replace(caller, identity=NOBODY), method.full_name, verdict)
            raise
        identity = caller.identity
        verdict = await self._asking.decided(
            identity, lambda: self._access.decide(identity, method.full_name)
        )
        if not verdict.allowed or row.about is About.NOTHING:
            self._access.audit.decided(caller, method.full_name, verdict)
        if verdict.allowed:
            return replace(caller, allowance=verdict.allowance)
        if identity.how == "anyone" and not verdict.role:
            raise UnauthenticatedError("authorization: no token", _HINT)
        raise DeniedError(verdict.reason)

    async def permit(self, caller: Caller, method: MethodDescriptor, request: object) -> Caller:
        """CALLER with what lets it do METHOD to the session that REQUEST names. Raises
        `NotFoundError` for one that is not there, or not for this caller."""
        if rpc_of(method.full_name).about is not About.SESSION:
            return caller
        session_id = str(getattr(request, "collector_id", ""))
        ownership = self._supervisor.ownership(session_id)
        if ownership is None:
            raise unknown(session_id)
        identity = caller.identity
        verdict = await self._asking.decided(
            identity, lambda: self._access.decide(identity, method.full_name, ownership)
        )
        self._access.audit.decided(caller, method.full_name, verdict, session=session_id)
        if not verdict.visible:
            raise unknown(session_id)
        if not verdict.allowed:
            raise DeniedError(f"collector_id: {verdict.reason}")
        return replace(caller, allowance=verdict.allowance)

    def limited(self, caller: Caller, method: MethodDescriptor, error: LimitError) -> None:
        """Notes in the audit that a limit stands against a call."""
        if rpc_of(method.full_name).least is Role.NONE:
            return
        verdict = Verdict(False, self._access.role_of(caller.identity), str(error))
        self._access.audit.decided(caller, method.full_name, verdict, limit=error.limit)

    async def _identified(self, caller: Caller, given: str) -> Caller:
        auth, identity = self._auth, caller.identity
        if not auth.asks_for_tokens:
            return caller
        if not given:
            if auth.token_file and identity.how == "unix":
                return replace(caller, identity=NOBODY)
            return caller
        token = given.removeprefix(_BEARER)
        if given.startswith(_BEARER) and token and len(token) <= _MOST_TOKEN_BYTES:
            if name := self._tokens.name_of(token):
                proven = Identity("token", (f"token:{name}", *self._of_connection(identity)))
                return _proven(caller, proven)
            if self._reviews and (found := await self._reviewed(self._reviews, token, caller)):
                names = (*found.names, *self._of_connection(identity))
                return _proven(caller, Identity(found.how, names))
        raise UnauthenticatedError("authorization: the token is wrong", _HINT)

    def _of_connection(self, identity: Identity) -> tuple[str, ...]:
        """What the connection adds to what a token says. With `auth.token_file`, the admin's socket
        gives no role by itself."""
        if identity.how == "anyone":
            return ()
        drops = (ADMIN_SOCKET,) if self._auth.token_file else ()
        return tuple(name for name in identity.names if name not in drops)

    async def _reviewed(self, reviews: Reviews, token: str, caller: Caller) -> Identity | None:
        if reviews.remembers(token):
            return reviews.identity_of(token)
        self._check_rate(caller.principal)
        return await self._asking.in_thread(lambda: reviews.identity_of(token))

    def _check_rate(self, peer: str) -> None:
        """The API server is the whole cluster's: no peer may keep it busy with tokens that it has
        to look at. Raises `UnavailableError`."""
        if len(self._unheard) >= _MOST_PEERS:
            self._unheard.clear()
        bucket = self._unheard.setdefault(peer, Bucket(_TOKENS_A_SECOND, _TOKENS_AT_ONCE))
        if not bucket.take(1, self._clock()):
            raise UnavailableError(
                "authorization: this peer sends more unknown tokens than Kubernetes is asked "
                f"about, {_TOKENS_A_SECOND:g} a second: try again"
            )


def _proven(caller: Caller, identity: Identity) -> Caller:
    trust = Trust.TOKEN if caller.trust is Trust.ANYONE else caller.trust
    return replace(caller, identity=identity, trust=trust)
