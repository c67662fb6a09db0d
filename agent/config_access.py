"""The configuration of access: how callers prove who they are, what they may do, and the audit.

`agent.config` has the rest, and reads the file; docs/access.md explains these keys to users.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

from msgspec import Meta, Struct, field

from coral.agent.config_units import ByteCount

DEFAULT_TOKEN: Final = "default"  # noqa: S105  the name of the token in auth.token_file
_TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SERVICE_ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"

_Few = Annotated[int, Meta(ge=0, le=1_000_000)]


class TokenFile(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A token of one caller, or of several that may do the same."""

    name: Annotated[
        str,
        Meta(
            description="the caller is known as `token:NAME`: letters, digits, `.`, `_` and `-`; "
            "not `default`"
        ),
    ]
    file: Annotated[
        str,
        Meta(
            description="the file with the token, under the rules of `auth.token_file`; it is read "
            "again within a second after it changes"
        ),
    ]


class Kubernetes(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The API server that is asked about tokens, and what their holders may do."""

    server: Annotated[
        str,
        Meta(
            description="the API server, such as `https://kubernetes.default.svc`: a token that no "
            "file has is sent to its TokenReview, and its SubjectAccessReview says in which "
            "namespaces the caller may trace; empty: no token is sent anywhere"
        ),
    ] = ""
    ca_file: Annotated[
        str, Meta(description="the certificates of the authority that signed the server's own")
    ] = f"{_SERVICE_ACCOUNT}/ca.crt"
    token_file: Annotated[
        str,
        Meta(description="the agent's own token for the server, read again when it changes"),
    ] = f"{_SERVICE_ACCOUNT}/token"
    audience: Annotated[
        str,
        Meta(
            description="the audience that callers' tokens must be made for, so that the agent "
            "cannot use them elsewhere"
        ),
    ] = "coral.io"


class Auth(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which callers are let in."""

    token_file: Annotated[
        str,
        Meta(
            description="a file with a token that callers send as `authorization: Bearer TOKEN`: "
            "at least 16 bytes, in a file that only its owner may write; a warning is logged if "
            "every user may read it"
        ),
    ] = ""
    tokens: Annotated[
        tuple[TokenFile, ...],
        Meta(description="further tokens, each with a name that `roles` gives a role"),
    ] = ()
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    insecure_loopback: Annotated[
        bool,
        Meta(
            description="listen on TCP without a token: every local user can then trace what this "
            "agent can"
        ),
    ] = False

    @property
    def asks_for_tokens(self) -> bool:
        """Whether there is a token that a caller could send."""
        return bool(self.token_file or self.tokens or self.kubernetes.server)


class RoleQuotas(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What each caller of a role may use at a time."""

    sessions: Annotated[
        _Few, Meta(description="collectors that one caller has started; 0: only `limits` count")
    ] = 0
    streams: Annotated[
        _Few, Meta(description="subscriptions and watches of one caller; 0: only `limits` count")
    ] = 0
    bytes_per_second: Annotated[
        ByteCount,
        Meta(
            description="the rate of all subscriptions of one caller together; events beyond it "
            "are lost; by default only `limits` count"
        ),
    ] = ByteCount(0)


class RoleRule(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A role, who has it, and for what."""

    role: Annotated[
        Literal["view", "operate", "admin"],
        Meta(
            description="`view` lists and reads, `operate` also starts and stops its own, `admin` "
            "does everything"
        ),
    ]
    to: Annotated[
        tuple[str, ...],
        Meta(
            description="the names of callers, or patterns such as `token:ci-*`; the agent knows a "
            "caller by `uid:`, `gid:`, `socket:`, `token:`, `spiffe:`, `subject:`, `dns:` or "
            "`kubernetes:` and `kubernetes-group:`; `anyone` is a caller without credentials"
        ),
    ]
    kinds: Annotated[
        tuple[str, ...], Meta(description="the kinds of collectors it is for; empty: all")
    ] = ()
    namespaces: Annotated[
        tuple[str, ...],
        Meta(
            description="the Kubernetes namespaces, by name or pattern, whose processes it is for; "
            "with `services` and `cgroups` empty too: all processes"
        ),
    ] = ()
    services: Annotated[
        tuple[str, ...], Meta(description="the services, by name or pattern, that it is for")
    ] = ()
    cgroups: Annotated[
        tuple[str, ...],
        Meta(description="the cgroups whose processes it is for, each with those below it"),
    ] = ()
    host_scope: Annotated[
        bool,
        Meta(
            description="whether it is for collectors of every process of the machine too; `admin` "
            "is, where none of the three lists above is given"
        ),
    ] = False
    mode: Annotated[
        Literal["any", "summaries"],
        Meta(description="`summaries`: not for collectors with `mode: events`"),
    ] = "any"
    redact_addresses: Annotated[
        bool, Meta(description="whether the other ends of connections are left out of rows")
    ] = False
    quotas: RoleQuotas = field(default_factory=RoleQuotas)


class Audit(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where decisions about callers are written, a JSON line each."""

    file: Annotated[
        str,
        Meta(
            description="a file to append them to, made with mode 0600 and opened again after it "
            "was renamed or removed; empty: none"
        ),
    ] = ""
    stdout: Annotated[bool, Meta(description="whether they are written to standard output")] = False


def problem(auth: Auth, roles: Sequence[RoleRule], audit: Audit, kinds: Iterable[str]) -> str:
    """What makes no sense in them, after the path of the key; empty where all does. KINDS are those
    of the contract."""
    known = tuple(kinds)
    found = [
        *_of_tokens(auth, roles),
        *_of_kubernetes(auth.kubernetes),
        *(text for index, rule in enumerate(roles) for text in _of_rule(index, rule, known)),
    ]
    if audit.file and not Path(audit.file).is_absolute():
        found.append(f"audit.file: {audit.file!r} is not accepted; give an absolute path")
    return next(iter(found), "")


def _of_tokens(auth: Auth, roles: Sequence[RoleRule]) -> Iterable[str]:
    names = [token.name for token in auth.tokens]
    for index, token in enumerate(auth.tokens):
        path = f"auth.tokens[{index}]"
        if not _TOKEN_NAME.fullmatch(token.name) or token.name == DEFAULT_TOKEN:
            yield (
                f"{path}.name: {token.name!r} is not accepted; give letters, digits, `.`, `_` and "
                f"`-`, at most 63, and not {DEFAULT_TOKEN!r}, which is the token of auth.token_file"
            )
        if token.name in names[:index]:
            yield f"{path}.name: {token.name!r} is given twice; give each token a name of its own"
        if not token.file:
            yield f"{path}.file: the path of a file is expected"
        name = f"token:{token.name}"
        if not any(matches(name, pattern) for rule in roles for pattern in rule.to):
            yield f"{path}.name: no rule of `roles` is for {name!r}, so its holder may do nothing"


def _of_kubernetes(kubernetes: Kubernetes) -> Iterable[str]:
    if not kubernetes.server:
        return
    parts = urlsplit(kubernetes.server)
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
        yield (
            f"auth.kubernetes.server: {kubernetes.server!r} is not accepted; give https://HOST or "
            "https://HOST:PORT"
        )
    for key in ("ca_file", "token_file", "audience"):
        if not getattr(kubernetes, key):
            yield f"auth.kubernetes.{key}: a value is expected"


def _of_rule(index: int, rule: RoleRule, kinds: Sequence[str]) -> Iterable[str]:
    path = f"roles[{index}]"
    if not rule.to or not all(rule.to):
        yield f"{path}.to: at least one name of a caller is expected, such as token:ci or uid:1000"
    for kind in rule.kinds:
        if kind not in kinds:
            yield f"{path}.kinds: {kind!r} is not accepted; give one of {', '.join(kinds)}"


ANYONE: Final = "anyone"
LOOPBACK: Final = "loopback"
_LITERAL: Final = (ANYONE, LOOPBACK)


def matches(name: str, pattern: str) -> bool:
    """Whether PATTERN is for the caller of that NAME. Callers without credentials are meant only by
    their name itself: `*` is for those that are known."""
    return name == pattern or (name not in _LITERAL and fnmatchcase(name, pattern))
