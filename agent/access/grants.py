"""Which roles a caller has, and for what: the rules of the configuration, and those that always
hold. A rule adds to the others; none takes anything away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Self

from coral.agent.access import policy
from coral.agent.access.rpcs import Role
from coral.agent.access.target import Ownership, Target
from coral.agent.caller import UNLIMITED, Allowance, Identity
from coral.agent.config import Config
from coral.agent.config_access import (
    DEFAULT_TOKEN,
    LOOPBACK,
    RoleRule,
    matches,
)
from coral.agent.errors import DeniedError
from coral.wire.kinds import kind_name, kind_of

CERTIFICATE: Final = "certificate"
ADMIN_SOCKET: Final = "socket:admin"
VIEW_SOCKET: Final = "socket:view"
_MOST_KNOWN: Final = 1024  # identities whose grants are remembered


@dataclass(frozen=True, slots=True)
class Grant:
    """A role for callers with one of the names TO, within constraints. KEY is where it comes from,
    for messages; NUMBER tells rules of the configuration apart, and is -1 for others, which have no
    constraints."""

    key: str
    role: Role
    to: tuple[str, ...]
    number: int = -1
    scope: policy.Scope = field(default_factory=lambda: policy.Scope(""))
    kinds: frozenset[int] = frozenset()
    summaries_only: bool = False
    allowance: Allowance = UNLIMITED

    @classmethod
    def of(cls, number: int, rule: RoleRule) -> Self:
        """The grant that a rule of the configuration makes."""
        key = f"roles[{number}]"
        return cls(
            key,
            Role[rule.role.upper()],
            rule.to,
            number,
            policy.Scope.of_rule(key, rule),
            frozenset(map(kind_of, rule.kinds)),
            rule.mode == "summaries",
            Allowance(
                key,
                rule.quotas.sessions,
                rule.quotas.streams,
                rule.quotas.bytes_per_second,
                rule.redact_addresses,
            ),
        )

    @property
    def _is_constrained(self) -> bool:
        return bool(self.scope.lists or self.kinds or self.summaries_only)

    def is_for(self, identity: Identity) -> bool:
        """Whether the caller has it."""
        return any(matches(name, pattern) for name in identity.names for pattern in self.to)

    def refusal(self, target: Target) -> str:
        """Why a session of TARGET may not be started by it; empty where it may. Blocks."""
        if text := self._wrong_form(target):
            return text
        try:
            policy.check_scope(target.watched, target.service, target.namespaces, self.scope)
        except DeniedError as error:
            return str(error)
        return ""

    def _wrong_form(self, target: Target) -> str:
        if self.kinds and target.kind not in self.kinds:
            return (
                f"kind: {kind_name(target.kind)} is not allowed by this agent's {self.key}.kinds, "
                f"{', '.join(sorted(map(kind_name, self.kinds)))}"
            )
        if self.summaries_only and target.single_events:
            return (
                f"config[\"mode\"]: 'events' is not allowed by this agent's {self.key}.mode; give "
                "summaries"
            )
        return ""

    def includes(self, target: Target) -> bool:
        """Whether a session of TARGET, by whomever it was started, is one of those that it is for.
        A view that names no processes includes the whole machine: it starts nothing. Blocks."""
        if self._wrong_form(target):
            return False
        scope = self.scope
        if target.watched.pods and scope.cgroups:
            # Of others' sessions, pods that come later may be in any cgroup.
            scope = replace(scope, cgroups=())
            if not scope.lists:
                return False
        return policy.covers(scope, target.watched, target.service, target.namespaces)

    def covers(self, ownership: Ownership) -> bool:
        """The same of a session that was looked at when it was started."""
        return not self._is_constrained or self.number in ownership.covered_by


class Grants:
    """All grants of one configuration."""

    def __init__(self, config: Config) -> None:
        self._rules = tuple(Grant.of(number, rule) for number, rule in enumerate(config.roles))
        self._all = (*_built_in(config), *self._rules)
        self._known: dict[tuple[str, ...], Sequence[Grant]] = {}

    def of(self, identity: Identity) -> Sequence[Grant]:
        """Those of a caller: the greatest role first, then in the order of the configuration."""
        found = self._known.get(identity.names)
        if found is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            found = self._known[identity.names] = tuple(self._find(identity))
        return found

    def _find(self, identity: Identity) -> list[Grant]:
        found = [grant for grant in self._all if grant.is_for(identity)]
        if VIEW_SOCKET in identity.names:
            # The socket says what it is for, whoever reaches it: a container's root, for one.
            found = [replace(grant, role=min(grant.role, Role.VIEW)) for grant in found]
        return sorted(found, key=lambda grant: -grant.role)

    def covering(self, target: Target) -> frozenset[int]:
        """The numbers of the rules that TARGET is one of the sessions for. Blocks."""
        return frozenset(grant.number for grant in self._rules if grant.includes(target))


def _built_in(config: Config) -> Iterator[Grant]:
    """What holds unless a rule names the same callers, by exactly that name."""
    named = {name for rule in config.roles for name in rule.to}
    grants = [
        Grant("the unix socket", Role.ADMIN, (ADMIN_SOCKET,)),
        Grant("the unix socket for viewers", Role.VIEW, (VIEW_SOCKET,)),
        Grant("auth.token_file", Role.ADMIN, (f"token:{DEFAULT_TOKEN}",)),
    ]
    if not config.roles:  # as the holder of the token: it was made for callers of this agent
        grants.append(Grant("tls.client_ca", Role.ADMIN, (CERTIFICATE,)))
    if config.auth.insecure_loopback and not config.auth.asks_for_tokens:
        grants.append(Grant("auth.insecure_loopback", Role.ADMIN, (LOOPBACK,)))
    yield from (grant for grant in grants if named.isdisjoint(grant.to))
