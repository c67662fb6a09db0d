"""The one place where it is decided whether a caller may do what it asks for.

`Access.decide` is synchronous, and knows nothing of the event loop. It blocks only where
`Access.may_block` says so: where it looks at processes, or asks Kubernetes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from coral.agent.access import policy
from coral.agent.access.audit import Audit
from coral.agent.access.grants import VIEW_SOCKET, Grant, Grants
from coral.agent.access.quotas import CallerQuotas
from coral.agent.access.rpcs import About, Role, Rpc, rpc_of, short
from coral.agent.access.target import Ownership, Target
from coral.agent.caller import LIBRARY_IDENTITY, UNLIMITED, Allowance, Identity
from coral.agent.config import Config
from coral.agent.errors import DeniedError

# A request for more namespaces than this needs the right in all of them at once.
_MOST_NAMESPACES: Final = 16
_SERVICE_ACCOUNT: Final = "kubernetes:system:serviceaccount:"
EVERY_NAMESPACE: Final = ""


class Reviewer(Protocol):
    """What Kubernetes says."""

    @property
    def unanswered(self) -> int:
        """How often it did not answer."""

    def is_allowed(self, identity: Identity, verb: str, namespace: str) -> bool:
        """Whether the caller may VERB `collectors.coral.io` in NAMESPACE; in all of them where it
        is empty. Blocks. Raises `UnavailableError`."""


_EVERYTHING: Final = policy.Scope("")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided. ROLE is the greatest that the caller has. REASON says why not, or by what;
    ALLOWANCE and SCOPE come with what allowed it, RULE is its number in `roles`, if it is there. A
    session that is not VISIBLE to the caller is answered as one that does not exist."""

    allowed: bool
    role: Role
    reason: str
    allowance: Allowance = UNLIMITED
    visible: bool = True
    scope: policy.Scope = _EVERYTHING
    rule: int | None = None


class Access:
    """What the callers of one agent may do. REVIEWER is asked about callers that Kubernetes knows;
    AUDIT gets a line for each decision."""

    def __init__(
        self, config: Config, reviewer: Reviewer | None = None, audit: Audit | None = None
    ) -> None:
        self.audit = audit or Audit(config.name)
        self.quotas = CallerQuotas()
        self._policy = config.policy
        self._grants = Grants(config)
        self._reviewer = reviewer

    @property
    def unanswered(self) -> int:
        """How many questions Kubernetes did not answer."""
        return self._reviewer.unanswered if self._reviewer else 0

    def may_block(self, identity: Identity) -> bool:
        """Whether decisions about the caller have to be made in a thread."""
        return self._is_reviewed(identity)

    def role_of(self, identity: Identity) -> Role:
        """The greatest role that the configuration gives the caller."""
        if identity is LIBRARY_IDENTITY:
            return Role.ADMIN
        return max((grant.role for grant in self._grants.of(identity)), default=Role.NONE)

    def decide(
        self, identity: Identity, rpc: str, about: Target | Ownership | None = None
    ) -> Verdict:
        """Whether the caller may call RPC, by its full name: by its role alone, or, where it is
        known what the call is ABOUT, for that. Looks at processes for a `Target`; asks Kubernetes
        where `may_block`. Raises `UnavailableError` where Kubernetes does not answer."""
        if isinstance(about, Target):
            return self._start(identity, rpc, about)
        if isinstance(about, Ownership):
            return self._session(identity, rpc, about)
        return self._call(identity, rpc)

    def _call(self, identity: Identity, rpc: str) -> Verdict:
        """By the caller's role alone."""
        row = rpc_of(rpc)
        if row.least is Role.NONE:
            return Verdict(True, self.role_of(identity), "it needs no role")
        if identity is LIBRARY_IDENTITY:
            return _LIBRARY
        grant = next((each for each in self._grants.of(identity) if each.role >= row.least), None)
        if grant:
            return self._allowed(identity, grant)
        if self._is_reviewed(identity, row):
            if row.about is not About.NOTHING:
                return Verdict(True, Role.OPERATE, "Kubernetes is asked once the target is known")
            return self._review(identity, rpc, row, _own_namespace(identity))
        return self._lacks(identity, rpc, row)

    def sees(self, identity: Identity, ownership: Ownership) -> bool:
        """Whether the caller may know of a session. Asks Kubernetes where `may_block`."""
        if identity is LIBRARY_IDENTITY or self._is_own(identity, ownership):
            return True
        if any(self._reaches(grant, ownership) for grant in self._grants.of(identity)):
            return True
        return (
            ownership.continuous
            and self._is_reviewed(identity)
            and self._is_allowed(identity, "list", _asked(ownership.namespaces))
        )

    def sees_namespace(self, identity: Identity, namespace: str) -> bool:
        """Whether the caller may know which pods are in a Kubernetes NAMESPACE. Asks Kubernetes
        where `may_block`."""
        if identity is LIBRARY_IDENTITY:
            return True
        for grant in self._grants.of(identity):
            scope = grant.scope
            named = not scope.lists or policy.are_among((namespace,), scope.namespaces)
            if grant.role >= Role.VIEW and named:
                return True
        return self._is_reviewed(identity) and self._is_allowed(identity, "list", (namespace,))

    def covering(self, target: Target) -> frozenset[int]:
        """The numbers of the grants whose constraints TARGET meets. Blocks."""
        return self._grants.covering(target)

    def looks_at_cgroups(self, identity: Identity) -> bool:
        """Whether what the caller may watch depends on cgroups, which only a look tells."""
        return any(grant.scope.cgroups for grant in self._grants.of(identity))

    def _start(self, identity: Identity, rpc: str, target: Target) -> Verdict:
        try:
            policy.check(target.watched, target.service, self._policy)
        except DeniedError as error:
            return Verdict(False, self.role_of(identity), str(error))
        return self.foresee(identity, rpc, target)

    def foresee(self, identity: Identity, rpc: str, target: Target) -> Verdict:
        """As `decide`, by roles and Kubernetes alone: for a TARGET that was not looked at, so that
        a refusal tells nothing of what is there. Of cgroups it knows nothing."""
        if identity is LIBRARY_IDENTITY:
            return _LIBRARY
        role, row, reasons = self.role_of(identity), rpc_of(rpc), []
        for grant in self._grants.of(identity):
            if grant.role < row.least:
                continue
            reason = grant.refusal(target)
            if not reason:
                return self._allowed(identity, grant)
            reasons.append(reason)
        if self._is_reviewed(identity, row):
            return self._review(identity, rpc, row, _asked(target.namespaces))
        if not reasons:
            return self._lacks(identity, rpc, row)
        return Verdict(False, role, f"{'; '.join(reasons)}; {_known_as(identity, role)}")

    def _session(self, identity: Identity, rpc: str, ownership: Ownership) -> Verdict:
        if identity is LIBRARY_IDENTITY:
            return _LIBRARY
        row, role = rpc_of(rpc), self.role_of(identity)
        if not self.sees(identity, ownership):
            return Verdict(False, role, "it is another caller's", visible=False)
        is_own = self._is_own(identity, ownership)
        for grant in self._grants.of(identity):
            # Of the caller's own too: what allows another target says nothing of this one.
            if grant.role < row.least or not grant.covers(ownership):
                continue
            if is_own or grant.role is Role.ADMIN or row.least is Role.VIEW:
                return self._allowed(identity, grant)
        if self._is_reviewed(identity, row) and (is_own or row.least is Role.VIEW):
            return self._review(identity, rpc, row, _asked(ownership.namespaces))
        if is_own or row.least is Role.VIEW:
            return self._lacks(identity, rpc, row)
        reason = f"{short(rpc)} of what others have started needs the role admin"
        return Verdict(False, role, f"{reason}; {_known_as(identity, role)}")

    def _is_own(self, identity: Identity, ownership: Ownership) -> bool:
        return bool(ownership.by) and ownership.by == identity.principal

    @staticmethod
    def _reaches(grant: Grant, ownership: Ownership) -> bool:
        is_enough = grant.role is Role.ADMIN or ownership.continuous
        return is_enough and grant.role >= Role.VIEW and grant.covers(ownership)

    def _allowed(self, identity: Identity, grant: Grant) -> Verdict:
        reason = f"{grant.key} gives {grant.role}"
        role = self.role_of(identity)
        rule = grant.number if grant.number >= 0 else None
        return Verdict(True, role, reason, grant.allowance, scope=grant.scope, rule=rule)

    def _lacks(self, identity: Identity, rpc: str, row: Rpc) -> Verdict:
        role = self.role_of(identity)
        known_as = _known_as(identity, role)
        return Verdict(False, role, f"{short(rpc)} needs the role {row.least}; {known_as}")

    # Kubernetes.

    def _is_reviewed(self, identity: Identity, row: Rpc | None = None) -> bool:
        """Whether Kubernetes decides where no rule does; of the RPC of ROW."""
        # Nor does Kubernetes make an operator of whoever comes by the viewers' socket.
        is_too_much = row is not None and row.least > Role.VIEW and VIEW_SOCKET in identity.names
        return identity.how == "kubernetes" and self._reviewer is not None and not is_too_much

    def _is_allowed(self, identity: Identity, verb: str, namespaces: Sequence[str]) -> bool:
        return not self._refused_in(identity, verb, namespaces)

    def _refused_in(
        self, identity: Identity, verb: str, namespaces: Sequence[str]
    ) -> tuple[str, ...]:
        assert self._reviewer  # noqa: S101  only of callers that it knows
        if len(namespaces) > 1 and self._reviewer.is_allowed(identity, verb, EVERY_NAMESPACE):
            return ()
        refused = (n for n in namespaces if not self._reviewer.is_allowed(identity, verb, n))
        first = next(refused, None)
        return () if first is None else (first,)

    def _review(self, identity: Identity, rpc: str, row: Rpc, namespaces: Sequence[str]) -> Verdict:
        refused = self._refused_in(identity, row.verb, namespaces)
        what = f"{row.verb} collectors.coral.io"
        if not refused:
            return Verdict(True, max(self.role_of(identity), row.least), f"Kubernetes: {what}")
        where = (
            f"in the namespace {refused[0]}"
            if refused[0]
            else "in every namespace, since the target lies in none that is known"
            if row.about is not About.NOTHING
            else "in every namespace"
        )
        return Verdict(
            False,
            self.role_of(identity),
            f"{short(rpc)} needs the right to {what} {where}, which Kubernetes does not give "
            f"{identity.principal.removeprefix('kubernetes:')}",
        )


_LIBRARY: Final = Verdict(True, Role.ADMIN, "a program uses the agent as a library")


def _asked(namespaces: tuple[str, ...]) -> tuple[str, ...]:
    """The namespaces to ask about: every one of a target that may lie outside those known."""
    if not namespaces or len(namespaces) > _MOST_NAMESPACES:
        return (EVERY_NAMESPACE,)
    return namespaces


def _own_namespace(identity: Identity) -> tuple[str, ...]:
    """That of a service account; every one for other callers."""
    if identity.principal.startswith(_SERVICE_ACCOUNT):
        return (identity.principal.removeprefix(_SERVICE_ACCOUNT).partition(":")[0],)
    return (EVERY_NAMESPACE,)


def _known_as(identity: Identity, role: Role) -> str:
    names = ", ".join(identity.names) or "nobody"
    has = f"have the role {role}" if role else "have no role"
    return f"you are known as {names}, and {has}"
