"""What can go wrong between a client and an agent, as exceptions that callers can branch on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc

from coral.client.address import ENV_ADDRESS, ENV_COLONY, ENV_TOKEN, is_unix
from coral.client.tls import Tls, failure

if TYPE_CHECKING:
    from coral.client.account import Account


class AgentError(Exception):
    """The agent refused a request, or could not be reached. `code` is a gRPC status code; the
    message is meant for people."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        self.code = code
        super().__init__(message)


class InvalidArgumentError(AgentError):
    """The request names an unknown kind, option or process, or has a value out of range."""


@contextmanager
def building_a_request() -> Iterator[None]:
    """Turns what a value raises that no request can hold into `InvalidArgumentError`."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidArgumentError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error


class NotFoundError(AgentError):
    """The agent has no such collector, service or agent id."""


class OutOfRangeError(AgentError):
    """`after_seq` is beyond the last event of the session so far."""


class PermissionDeniedError(AgentError):
    """This user may not open the agent's socket, or the agent's policy forbids the request."""


class UnauthenticatedError(AgentError):
    """The agent expects a token, and got none or a wrong one."""


class LimitExceededError(AgentError):
    """A limit of the agent is reached; the message names it. A stream ends with this error when
    its reader is too slow and asked for `overflow="end"`, or stalls."""


class FailedPreconditionError(AgentError):
    """The kernel refused the collector's programs or hooks, or the collector is not in a state for
    this: a continuous one has no lease to renew."""


class UnavailableError(AgentError):
    """No agent could be reached at the address. `reason` is the message without the advice for a
    person at a command line."""

    def __init__(self, code: grpc.StatusCode, message: str, advice: str = "") -> None:
        self.reason = message
        super().__init__(code, f"{message}: {advice}" if advice else message)


class TlsError(UnavailableError):
    """The agent and this client could not agree on TLS: one does not speak it, or does not accept
    the other's certificate. Streams try again, because certificates may be about to change."""


class ConnectionLostError(UnavailableError):
    """The agent was reached, and the connection broke before it had answered. It may have carried
    out the request."""


class DeadlineExceededError(AgentError):
    """The agent did not answer in time. It may still carry out the request."""


class ContractError(AgentError):
    """The agent sent something that the contract forbids: bytes that are no batch, or numbers that
    do not add up."""

    def __init__(self, message: str) -> None:
        super().__init__(grpc.StatusCode.INTERNAL, message)


class StreamLostError(AgentError):
    """A stream cannot be resumed, because the agent that answers now does not have it: the agent
    was restarted, or the session ended and is no longer kept. `account` says what was read."""

    def __init__(self, message: str, account: Account) -> None:
        self.account = account
        super().__init__(grpc.StatusCode.NOT_FOUND, message)


_TYPES: Final[Mapping[grpc.StatusCode, type[AgentError]]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitExceededError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who was called, in messages: its name, and what to do where none answers."""

    name: str
    start_one: str


AGENT: Final = Peer(
    "agent", f"start one with `coral agent`, or name its address with --agent or {ENV_ADDRESS}"
)
COLONY: Final = Peer(
    "colony", f"start one with `coral colony`, or name its address with --colony or {ENV_COLONY}"
)

# gRPC reports why it could not connect as text alone, which ends in the system's own words.
_CANNOT_CONNECT: Final = (
    *(errno.ENOENT, errno.EACCES, errno.EPERM, errno.ECONNREFUSED, errno.ENOTSOCK),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ETIMEDOUT),
)
_CANNOT_RESOLVE: Final = ("errors resolving", "DNS resolution failed")
_NO_METHOD: Final = ("Method not found!", "unknown service", "")
# How gRPC reports a call that its connection took along, beside UNAVAILABLE.
_CUT: Final = ("Stream removed", "RST_STREAM", "GOAWAY", "Socket closed")


def error_of(
    code: grpc.StatusCode,
    details: str,
    address: str,
    method: str,
    timeout_s: float,
    *,
    tls: Tls | None = None,
    peer: Peer = AGENT,
) -> AgentError:
    """The error for a call of METHOD of PEER that failed with CODE and DETAILS."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"the {peer.name} at {address} did not answer {method} within {timeout_s:g} s"
        return DeadlineExceededError(code, message)
    if code is grpc.StatusCode.UNAVAILABLE:
        if why := failure(details, address, tls, peer.name):
            return TlsError(code, why)
        return _unreachable(code, details, address, peer)
    cut = code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    if cut and any(sign in details for sign in _CUT):
        return _lost(details, address)
    message = details or code.name
    if code is grpc.StatusCode.UNIMPLEMENTED and details in _NO_METHOD:
        message = f"what answers at {address} is no {peer.name}, or one of another version"
    if code is grpc.StatusCode.UNAUTHENTICATED:
        message = f"{message} (set {ENV_TOKEN}, or pass `token`)"
    return _TYPES.get(code, AgentError)(code, message)


def _unreachable(code: grpc.StatusCode, details: str, address: str, peer: Peer) -> AgentError:
    found = next((n for n in _CANNOT_CONNECT if os.strerror(n) in details), None)
    if found in (errno.EACCES, errno.EPERM) and is_unix(address):
        return PermissionDeniedError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"permission denied: user {os.geteuid()} may not open {address}; run this as the "
            "socket's owner, usually root",
        )
    if any(sign in details for sign in _CANNOT_RESOLVE):
        return UnavailableError(
            code, f"no {peer.name} answers at {address} (no such host)", peer.start_one
        )
    if found is None:
        return _lost(details, address)
    reason = os.strerror(found)
    reason = reason[0].lower() + reason[1:]
    return UnavailableError(code, f"no {peer.name} answers at {address} ({reason})", peer.start_one)


def _lost(details: str, address: str) -> ConnectionLostError:
    return ConnectionLostError(
        grpc.StatusCode.UNAVAILABLE, f"the connection to {address} was lost: {details}"
    )
