"""The answer to a call that fails: a status code, and a text that fits."""

from __future__ import annotations

import string
from typing import Final
from urllib.parse import quote

import grpc

from coral.agent.errors import (
    DeniedError,
    FailedPreconditionError,
    InvalidRequestError,
    LimitError,
    NotFoundError,
    OutOfRangeError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from coral.agent.streams import SubscriptionEndedError
from coral.bpf import BpfError
from coral.bpf.libbpf import EXHAUSTED

# Clients accept 8 KiB of trailing metadata, where a status's text is percent-encoded.
_STATUS_BYTES: Final = 4096
_SENT_AS_IT_IS: Final = string.punctuation.replace("%", "") + " "

_CODES: Final[dict[type[Exception], grpc.StatusCode]] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    OutOfRangeError: grpc.StatusCode.OUT_OF_RANGE,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeniedError: grpc.StatusCode.PERMISSION_DENIED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    UnsupportedError: grpc.StatusCode.FAILED_PRECONDITION,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    SubscriptionEndedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def code_of(error: Exception) -> grpc.StatusCode:
    """The code for ERROR; INTERNAL for an unexpected one."""
    if isinstance(error, BpfError):
        exhausted = error.errno in EXHAUSTED
        return (
            grpc.StatusCode.RESOURCE_EXHAUSTED if exhausted else grpc.StatusCode.FAILED_PRECONDITION
        )
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL)


def fitting(text: str) -> str:
    """TEXT, without its middle where it is longer than a client accepts: such a client would get a
    transport error in place of the refusal. Lone surrogates, which names from /proc can have, are
    escaped: they cannot be sent."""
    text = text.encode(errors="backslashreplace").decode()
    if len(quote(text, safe=_SENT_AS_IT_IS)) <= _STATUS_BYTES:
        return text
    plain = text.encode("ascii", "backslashreplace").decode()
    return f"{plain[: _STATUS_BYTES // 4]} [...] {plain[-_STATUS_BYTES // 4 :]}"
