"""The words for numbers that the kernel and the programs give: addresses, errors, reset reasons."""

from __future__ import annotations

import errno
import socket
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import Strings
from coral.collectors.tcp_metrics.connections import NAMES
from coral.mesh.v1 import ebpf_pb2 as pb

OTHER: Final = "other"
_ADDRESS_BYTES: Final = 16
_SCOPED_BYTES: Final = 20  # an address, and the index of an interface
_MAPPED: Final = bytes(10) + b"\xff\xff"

# Why the kernel sent a reset, by the numbers of tcp_metrics.bpf.c: enum sk_rst_reason of Linux
# 6.18, and one more. 0 means that the kernel does not say.
RESET_REASONS: Final = (
    "", "NOT_SPECIFIED", "NO_SOCKET", "TCP_INVALID_ACK_SEQUENCE", "TCP_RFC7323_PAWS",
    "TCP_TOO_OLD_ACK", "TCP_ACK_UNSENT_DATA", "TCP_FLAGS", "TCP_OLD_ACK", "TCP_ABORT_ON_DATA",
    "TCP_TIMEWAIT_SOCKET", "INVALID_SYN", "TCP_ABORT_ON_CLOSE", "TCP_ABORT_ON_LINGER",
    "TCP_ABORT_ON_MEMORY", "TCP_STATE", "TCP_KEEPALIVE_TIMEOUT", "TCP_DISCONNECT_WITH_DATA",
)  # fmt: skip


@lru_cache(4096)
def address_text(address: bytes) -> str:
    """The 16 bytes of an address as text, and the 4 bytes behind it, if any, as its scope; an IPv4
    address mapped into IPv6 as IPv4."""
    address, scope = address[:_ADDRESS_BYTES], int.from_bytes(address[_ADDRESS_BYTES:], "little")
    if address.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, address[-4:])
    text = socket.inet_ntop(socket.AF_INET6, address)
    return f"{text}%{scope}" if scope else text


def scoped(addresses: NDArray[np.uint8], scope_ids: NDArray[Any]) -> NDArray[np.uint8]:
    """ADDRESSES, of shape (n, 16), each followed by the 4 bytes of its scope, which is 0 for all
    but link-local ones: of shape (n, 20)."""
    link_local = (addresses[:, 0] == 0xFE) & (addresses[:, 1] & 0xC0 == 0x80)  # noqa: PLR2004
    scopes = np.where(link_local, scope_ids, 0).astype("<u4").reshape(-1, 1)
    return np.hstack([addresses, scopes.view(np.uint8)])


def address_indices(strings: Strings, addresses: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """The indices in STRINGS of scoped ADDRESSES, of shape (n, 20), as texts."""
    packed = np.ascontiguousarray(addresses).view(f"S{_SCOPED_BYTES}").reshape(-1)
    # numpy takes zeros off the end of a byte string.
    return strings.indices(packed, lambda text: address_text(text.ljust(_SCOPED_BYTES, b"\0")))


def end_name(end: int) -> str:
    """`fin_local` and its like."""
    return pb.TcpEnd.Name(end).removeprefix("TCP_END_").lower()


def error_name(number: int) -> str:
    """`ECONNREFUSED` and its like; empty for 0."""
    return errno.errorcode.get(number, str(number)) if number else ""


def reset_reason(number: int) -> str:
    """The kernel's word for why it sent a reset; empty for a number that is not known."""
    return RESET_REASONS[number] if number < len(RESET_REASONS) else ""


def counters_message(values: list[Any]) -> pb.TcpCounters:
    """One row of a matrix of counters, as pb.TcpCounters."""
    return pb.TcpCounters(
        **{name: value for name, value in zip(NAMES, values, strict=False) if value}
    )


def histogram_message(
    bounds: list[int], counts: list[int], total: int
) -> pb.BucketHistogram | None:
    """One row of a matrix of histograms, and the sum of its values; None if it is empty."""
    if not (total or any(counts)):
        return None
    return pb.BucketHistogram(bounds=bounds, counts=counts, sum=total)
