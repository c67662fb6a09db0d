"""Requests in words: which side, which method and route, how they ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.data import short_name
from coral.views.text import format_amount, shorten
from coral.wire.text import safe

CLIENT: Final = pb.HTTP_ROLE_CLIENT
SERVER: Final = pb.HTTP_ROLE_SERVER
OTHER: Final = "other"  # the agent's word for the route of rows that it has added up
ARROWS: Final = {CLIENT: "→", SERVER: "←"}

_SERVER_ERROR: Final = 500
_CLIENT_ERROR: Final = 400
_REDIRECTION: Final = 300
_SUCCESS: Final = 200
# Capitals are for what should not have happened.
_OUTCOMES: Final = {
    pb.HTTP_OUTCOME_ABORTED_BY_CLIENT: "ABORTED by client",
    pb.HTTP_OUTCOME_ABORTED_BY_SERVER: "ABORTED by server",
    pb.HTTP_OUTCOME_UPGRADED: "upgraded",
    pb.HTTP_OUTCOME_UNKNOWN: "end not seen",
    pb.HTTP_OUTCOME_IN_PROGRESS: "in progress",
}
_ENDS_NOT_KNOWN: Final = (pb.HTTP_OUTCOME_UNKNOWN, pb.HTTP_OUTCOME_IN_PROGRESS)
_PROTOCOLS: Final = {
    "tls": "TLS",
    "http2": "HTTP/2",
    "other": "another protocol",
    "upgraded": "what follows an upgrade",
}
_UNREAD: Final = {
    "joined": "joined in the middle, up to the next request",
    "unseen": "reads and writes unseen",
    "behind": "with too many requests at a time",
    "peer": "requests over TLS without a known peer",
    "io_uring": "reads and writes by io_uring",
    "in_progress": "requests in progress at the end",
}


def method_word(method: int) -> str:
    """`GET` and its like, and `_OTHER`, as OpenTelemetry says."""
    if method == pb.HTTP_METHOD_OTHER:
        return "_OTHER"
    return short_name(pb.HttpMethod.DESCRIPTOR, method).upper() if method else ""


def outcome_word(outcome: int) -> str:
    """How a request ended, in words; empty if it is complete."""
    return _OUTCOMES.get(outcome, "")  # type: ignore[call-overload, no-any-return]


def outcome_of(name: str) -> int:
    """The HttpOutcome that the contract calls NAME, such as "aborted_by_client"; 0 if none."""
    values = pb.HttpOutcome.DESCRIPTOR.values_by_name
    found = values.get(f"HTTP_OUTCOME_{name.upper()}")
    return found.number if found else 0


def status_word(status: int) -> str:
    """The code; `-` where there was no response."""
    return str(status or "-")


def is_error(status: int, outcome: int = pb.HTTP_OUTCOME_COMPLETE) -> bool:
    """Whether the contract counts a request as an error: a status of 500 or more, or no response
    where that is known."""
    return status >= _SERVER_ERROR or (not status and outcome not in _ENDS_NOT_KNOWN)


def is_refusal(status: int) -> bool:
    """Whether the server blames the client."""
    return _CLIENT_ERROR <= status < _SERVER_ERROR


def is_success(status: int) -> bool:
    """Whether this is a status of the class 2xx."""
    return _SUCCESS <= status < _REDIRECTION


def unread_text(unread: Mapping[str, tuple[int, int]]) -> str:
    """What could not be read, by the contract's word for it, with how many and their bytes; empty
    if there was nothing."""
    texts = []
    for what, (count, size) in unread.items():
        carried = f" ({format_amount(size)}B)" if size else ""
        number = f"{count:,}"
        if what in _PROTOCOLS:
            number = (
                f"{_PROTOCOLS[what]} on {number} {'connection' if count == 1 else 'connections'}"
            )
        else:
            number = f"{number} {_UNREAD.get(what, what)}"
        texts.append(number + carried)
    return f"not read: {', '.join(texts)}" if texts else ""


def request(role: int, method: int, path: str) -> Callable[[int], str]:
    """`← GET /users/{id}` of a server, `→ GET /` of a client. Where there is no room, the path
    loses its middle."""
    if path == OTHER:
        before, path = ARROWS.get(role, ""), "others"  # type: ignore[call-overload]
    else:
        before = f"{ARROWS.get(role, '')} {method_word(method)}".strip()  # type: ignore[call-overload]
    before += " " * bool(before)

    def fit(width: int) -> str:
        room = max(width - len(before), 1)
        return shorten(f"{before}{shorten(path, room, room // 2)}", width)

    return fit


def process(comm: str, pid: int) -> Callable[[int], str]:
    """`python3/1234`; a name is shortened, and an id is not."""
    text = f"{safe(comm)}/{pid}"
    return lambda width: shorten(text, width, len(f"/{pid}"))
