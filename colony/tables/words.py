"""What tables say about each kind of collector that the contract does not: which matrix has which
columns, and how figures are added up over minutes and hours. The one file here that names kinds.

A kind without an entry has tables too, by the rules of `layout.py`. It needs one for matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from google.protobuf.descriptor import EnumDescriptor
from numpy.typing import NDArray

from coral.colony.tables.matrices import Bounds, Fields, Log2, Matrix, Named, Numbered
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.data import short_name
from coral.views.errnos import errno_name
from coral.views.http_latency.words import method_word
from coral.wire.http import BOUNDS_NS

Word = Callable[[int], str]
Columns = Mapping[str, NDArray[Any]]

_RTT_BOUNDS_US: Final = (
    20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000,
    500_000, 1_000_000,
)  # fmt: skip
_ERROR_CLASSES: Final = (
    "other", "not_found", "permission", "again", "interrupted", "invalid", "exhausted",
    "connection",
)  # fmt: skip


@dataclass(frozen=True)
class Derived:
    """A column that is made of others of a batch: from its columns, all of shape (n, ...), the
    values, of shape (n,). They are added up."""

    name: str
    make: Callable[[Columns], NDArray[Any]]


@dataclass(frozen=True)
class Words:
    """Of one table. All names are those of the contract.

    `matrices`: what the columns of each matrix are. `words`: the words of a column of numbers,
    where the row message does not have an enumeration of that name. `each_row`: what the batch has
    once and every row gets; `first_row`: what only the first row gets, because it is of the whole
    batch. `left_out` is not stored.

    Rollups: `keys`, `sums`, `most`, `least` and `dropped` are exceptions to the rules of
    `layout.py`. `key_where`: a column of numbers that tells rows apart only where another column
    has one of some words, and becomes 0 elsewhere.
    """

    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    words: Mapping[str, Word] = field(default_factory=dict)
    derived: tuple[Derived, ...] = ()
    each_row: tuple[str, ...] = ()
    first_row: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    most: tuple[str, ...] = ()
    least: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    key_where: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)


def word_of(enum: EnumDescriptor) -> Word:
    """The words of an enumeration: lower case, and nothing for `..._UNSPECIFIED`. HTTP's methods
    are as HTTP and OpenTelemetry write them."""
    if enum.full_name == pb.HttpMethod.DESCRIPTOR.full_name:
        return method_word
    unspecified = {it.number for it in enum.values if it.name.endswith("_UNSPECIFIED")}
    return lambda number: "" if number in unspecified else short_name(enum, number)


def _is_last(columns: Columns) -> NDArray[np.bool_]:
    """Whether a connection's row is its last. A listener is no connection."""
    last: NDArray[np.bool_] = (columns["end"] != pb.TCP_END_OPEN) & (
        columns["role"] != pb.TCP_ROLE_LISTENER
    )
    return last


WORDS: Final[Mapping[str, Words]] = {
    "syscall_stats": Words(
        matrices={
            "errors_by_class": Named("errors", "error_classes", _ERROR_CLASSES),
            "latency_ns": Log2(
                "latency", "latency_first_exponent", range(6, 38), "ns",
                total="total_duration_ns", most="max_duration_ns",
            ),
        },
    ),
    "http_latency": Words(
        matrices={
            "outcomes": Numbered("outcomes", word_of(pb.HttpOutcome.DESCRIPTOR), 7),
            "counts": Bounds(
                "duration", "bounds_ns", BOUNDS_NS, "ns",
                total="sum_ns", least="min_ns", most="max_ns",
            ),
            "first_byte_counts": Bounds(
                "first_byte", "bounds_ns", BOUNDS_NS, "ns",
                total="first_byte_sum_ns", least="first_byte_min_ns", most="first_byte_max_ns",
            ),
        },
    ),
    "tcp_metrics": Words(
        matrices={
            "delta": Fields(pb.TcpCounters.DESCRIPTOR),
            "rtt_us_delta": Bounds(
                "rtt_us", "rtt_us_bounds", _RTT_BOUNDS_US, "us", total="rtt_us_delta_sum"
            ),
        },
        derived=(
            Derived("closed", _is_last),
            Derived("failed", lambda it: _is_last(it) & (it["was_established"] == 0)),
        ),
        left_out=("total", "rtt_us_total", "rtt_us_total_sum"),
        sums=("connections", "opened", "established"),
        most=("connect_ns", "backlog", "backlog_limit"),
        least=("rtt_min_us",),
        dropped=(
            "connection_id", "state", "network_namespace", "start_ns", "preexisting", "rtt_us",
            "rtt_variation_us", "congestion_window", "slow_start_threshold", "segment_bytes",
            "was_established",
        ),
        key_where={
            "local_port": ("role", ("server", "listener")),
            "remote_port": ("role", ("client",)),
        },
    ),
    "tcp_peers": Words(
        matrices={
            "delta": Fields(pb.TcpCounters.DESCRIPTOR),
            "rtt_us_delta": Bounds(
                "rtt_us", "rtt_us_bounds", _RTT_BOUNDS_US, "us", total="rtt_us_delta_sum"
            ),
            "connect_us_delta": Bounds(
                "connect_us", "connect_us_bounds", _RTT_BOUNDS_US, "us",
                total="connect_us_delta_sum",
            ),
            "ends": Numbered("ends", word_of(pb.TcpEnd.DESCRIPTOR), 10),
            "failures": Named(
                "failures", "failure_names",
                ("none", "econnrefused", "etimedout", "econnreset", "ehostunreach", "enetunreach"),
            ),
        },
        most=("connections_open",),
    ),
    "cpu_profile": Words(
        derived=(
            Derived("cpu_ns", lambda it: it["count"] * it["period_ns"]),
            Derived("cycles", lambda it: it["count"] * it["period_cycles"]),
        ),
        each_row=("period_ns", "period_cycles"),
        first_row=("samples_lost", "samples_truncated"),
        dropped=("comm", "period_ns", "period_cycles"),
    ),
    "tcp_state_changes": Words(
        words={
            "what": word_of(pb.TcpStateChange.What.DESCRIPTOR),
            "old_state": word_of(pb.TcpState.DESCRIPTOR),
            "new_state": word_of(pb.TcpState.DESCRIPTOR),
            "error": errno_name,
        },
    ),
    "http_requests": Words(words={"outcome": word_of(pb.HttpOutcome.DESCRIPTOR)}),
}  # fmt: skip
