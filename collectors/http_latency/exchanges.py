"""What can be said of the programs' records of exchanges, struct http_exchange, as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.mesh.v1 import ebpf_pb2 as pb

RECORDS: Final = ("http_exchange", "http_short_exchange")
"""The structs in which exchanges are recorded."""
DETAILED: Final = "http_detailed"
"""The one of a session that wants more of requests, instead of these."""

_FAILED_FROM: Final = 500  # the first status that says that the server failed (RFC 9110, 15.6)
_BY_CLIENT: Final = int(pb.HTTP_OUTCOME_ABORTED_BY_CLIENT)
_BY_SERVER: Final = int(pb.HTTP_OUTCOME_ABORTED_BY_SERVER)


def exchanges_of(records: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """All exchanges of a drain as struct http_exchange of shape (n,), or as struct http_detailed
    where the session wants more, in the order in which they ended. Nothing is known of the path
    beyond its `path_bytes` and a query."""
    if DETAILED in records:
        return records[DETAILED]
    long, short = (records[name] for name in RECORDS)
    if not len(short):
        return long
    exchanges = np.empty(len(long) + len(short), long.dtype)
    bytes_of = exchanges.view(np.uint8).reshape(len(exchanges), -1)
    bytes_of[: len(short), : short.itemsize] = short.view(np.uint8).reshape(len(short), -1)
    if not len(long):
        return exchanges
    exchanges[len(short) :] = long
    return exchanges[np.argsort(exchanges["ended_ns"], kind="stable")]


def since_began_ns(records: NDArray[Any], name: str) -> NDArray[np.uint64]:
    """From the first byte of each request to the time NAME; 0 where there was no such time. A
    response can come before the request has: its times are 0, too."""
    times = records[name].astype(np.int64) - records["began_ns"].astype(np.int64)
    return times.clip(min=0).astype(np.uint64)


def has_response(records: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether a final response to each request began."""
    found: NDArray[np.bool_] = records["status"] > 0
    return found


def first_byte_ns(records: NDArray[Any]) -> NDArray[np.uint64]:
    """From the first byte of each request to the first of its response; 0 without a response."""
    times: NDArray[np.uint64] = np.where(
        has_response(records), since_began_ns(records, "first_ns"), 0
    )
    return times


def has_failed(records: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the server said that it failed, or a side ended the connection before a response. An
    outcome that is not known is no failure."""
    outcomes = records["outcome"]
    aborted = (outcomes == _BY_CLIENT) | (outcomes == _BY_SERVER)  # isin takes ten times as long
    failed: NDArray[np.bool_] = (records["status"] >= _FAILED_FROM) | (
        aborted & ~has_response(records)
    )
    return failed
