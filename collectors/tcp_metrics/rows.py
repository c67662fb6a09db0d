"""Connections as messages: a Python object for each row, and nothing that is not shown."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.tcp_metrics.connections import BOUNDS_US, NAMES, RTT, Changes
from coral.mesh.v1 import ebpf_pb2 as pb

OTHER: Final = "other"
_NO_THRESHOLD: Final = 0x7FFFFFFF  # TCP_INFINITE_SSTHRESH: no loss yet
_MAPPED: Final = bytes(10) + b"\xff\xff"

# Why the kernel sent a reset, by the numbers of tcp_metrics.bpf.c: enum sk_rst_reason of Linux
# 6.18, and one more. 0 is that it does not say.
RESET_REASONS: Final = (
    "", "NOT_SPECIFIED", "NO_SOCKET", "TCP_INVALID_ACK_SEQUENCE", "TCP_RFC7323_PAWS",
    "TCP_TOO_OLD_ACK", "TCP_ACK_UNSENT_DATA", "TCP_FLAGS", "TCP_OLD_ACK", "TCP_ABORT_ON_DATA",
    "TCP_TIMEWAIT_SOCKET", "INVALID_SYN", "TCP_ABORT_ON_CLOSE", "TCP_ABORT_ON_LINGER",
    "TCP_ABORT_ON_MEMORY", "TCP_STATE", "TCP_KEEPALIVE_TIMEOUT", "TCP_DISCONNECT_WITH_DATA",
)  # fmt: skip


@lru_cache(4096)
def address_text(address: bytes) -> str:
    """16 bytes of an address as text; that of IPv4 in IPv6 as IPv4."""
    if address.startswith(_MAPPED):
        return socket.inet_ntop(socket.AF_INET, address[-4:])
    return socket.inet_ntop(socket.AF_INET6, address)


def end_name(end: int) -> str:
    """`fin_local` and its like."""
    return pb.TcpEnd.Name(end).removeprefix("TCP_END_").lower()


def error_name(number: int) -> str:
    """`ECONNREFUSED` and its like; empty for 0."""
    return errno.errorcode.get(number, str(number)) if number else ""


def reset_reason(number: int) -> str:
    """The kernel's word for why it sent a reset; empty where it says nothing that is known."""
    return RESET_REASONS[number] if number < len(RESET_REASONS) else ""


def addresses(column: NDArray[np.uint8]) -> list[str]:
    """Addresses of shape (n, 16), as texts."""
    wire = column.tobytes()
    return [address_text(wire[at : at + 16]) for at in range(0, len(wire), 16)]


def counters_message(counters: NDArray[np.uint64]) -> pb.TcpCounters:
    """One row of counters."""
    return _counters(counters[:RTT].tolist())


def _counters(values: list[int]) -> pb.TcpCounters:
    return pb.TcpCounters(
        **{name: value for name, value in zip(NAMES, values, strict=True) if value}
    )


def histogram(counts: NDArray[np.uint64]) -> pb.BucketHistogram | None:
    """Counts by `BOUNDS_US`, and after them the sum; none where there is nothing in it."""
    return _histogram(counts.tolist())


def _histogram(counts: list[int]) -> pb.BucketHistogram | None:
    if not any(counts):
        return None
    return pb.BucketHistogram(bounds=BOUNDS_US, counts=counts[:-1], sum=counts[-1])


def connection_rows(
    changes: Changes, names: Mapping[int, str], offset_ns: int, top: int
) -> list[pb.TcpMetrics]:
    """A message for each connection, those that carried most first; of TOP > 0, at most so many,
    the last the rest's sum. OFFSET_NS makes Unix time of the programs' times; NAMES are commands
    by tgid."""
    carried = changes.delta[:, 0] + changes.delta[:, 2]
    order = np.argsort(carried, kind="stable")[::-1]
    rest = order[max(top - 1, 0) :] if top and len(order) > top else order[:0]
    rows = _rows(changes.take(order[: len(order) - len(rest)]), names, offset_ns)
    if len(rest):
        added = changes.delta[rest].sum(axis=0)
        rows.append(
            pb.TcpMetrics(
                remote_address=OTHER,
                connections=len(rest),
                opened=int(changes.new[rest].sum()),
                established=int(changes.established[rest].sum()),
                delta=counters_message(added),
                rtt_us_delta=histogram(added[RTT:]),
            )
        )
    return rows


def _rows(changes: Changes, names: Mapping[int, str], offset_ns: int) -> list[pb.TcpMetrics]:
    columns = _columns(changes, offset_ns)
    fields = tuple(columns)
    texts = zip(
        addresses(changes.connections["local"]),
        addresses(changes.connections["remote"]),
        map(error_name, changes.connections["error"].tolist()),
        changes.connections["reset_reason"].tolist(),
        changes.connections["comm"].tolist(),
        strict=True,
    )
    rows = []
    for values, (local, remote, error, reason, comm), delta, total in zip(
        zip(*(column.tolist() for column in columns.values()), strict=True),
        texts,
        changes.delta.tolist(),
        changes.total.tolist(),
        strict=True,
    ):
        row = pb.TcpMetrics(
            **dict(zip(fields, values, strict=True)),
            local_address=local,
            remote_address=remote,
            error=error,
            reset_reason=reset_reason(reason),
            delta=_counters(delta[:RTT]),
            total=_counters(total[:RTT]),
            rtt_us_delta=_histogram(delta[RTT:]),
            rtt_us_total=_histogram(total[RTT:]),
        )
        row.comm = names.get(row.pid) or comm.decode(errors="replace")
        rows.append(row)
    return rows


def _columns(changes: Changes, offset_ns: int) -> dict[str, NDArray[Any]]:
    """The fields of pb.TcpMetrics that are numbers, each of shape (n,)."""
    c = changes.connections
    start_ns = c["start_ns"].astype(np.int64)
    known = start_ns > 0
    until_ns = np.where(c["ended_ns"] > 0, c["ended_ns"], c["read_ns"]).astype(np.int64)
    timed = known & (c["established_ns"] > 0) & (c["role"] == pb.TCP_ROLE_CLIENT)
    return {
        "connection_id": c["cookie"],
        "start_ns": np.where(known, start_ns + offset_ns, 0),
        "duration_ns": np.where(known, until_ns - start_ns, 0).clip(min=0),
        "connect_ns": np.where(timed, c["established_ns"].astype(np.int64) - start_ns, 0),
        "network_namespace": c["network"],
        "preexisting": ~known,
        "end": np.where(c["ended_ns"] > 0, c["end"], pb.TCP_END_OPEN),  # who closed is known before
        "was_established": (c["established_ns"] > 0) | ~known,
        "opened": (changes.new & known).astype(np.int64),
        "established": changes.established.astype(np.int64),
        "rtt_us": c["srtt_us"] >> 3,
        "rtt_variation_us": c["rtt_deviation_us"] >> 2,
        "rtt_min_us": np.where(c["srtt_us"] > 0, c["rtt_min_us"], 0),
        "slow_start_threshold": c["slow_start_threshold"] % _NO_THRESHOLD,
        **{name: c[name] for name in _SAME},
    }


# Fields that the program's record has by the same name.
_SAME: Final = (
    "local_port", "remote_port", "role", "state", "pid", "congestion_window",
    "segment_bytes",
)  # fmt: skip
