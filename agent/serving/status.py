"""The status code that answers a call that fails."""

from __future__ import annotations

from typing import Final

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
