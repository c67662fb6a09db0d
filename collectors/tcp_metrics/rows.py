"""Summaries of connections: as columns, made by array, and as row messages for subscribers that
want rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.clock import UnixClock
from coral.collectors.columns import Strings, split_top, with_row
from coral.collectors.contract import Summaries
from coral.collectors.members import Members, comm_text
from coral.collectors.resources import ResourceTable, with_resources
from coral.collectors.tcp_metrics.connections import BOUNDS_US, RTT, RTT_SUM, Changes
from coral.collectors.tcp_metrics.names import (
    OTHER,
    address_indices,
    counters_message,
    error_name,
    histogram_message,
    reset_reason,
    scoped,
)
from coral.mesh.v1 import ebpf_pb2 as pb

_NO_THRESHOLD: Final = 0x7FFFFFFF  # TCP_INFINITE_SSTHRESH: no loss yet


def connection_summaries(
    changes: Changes,
    members: Members,
    clock: UnixClock,
    top: int,
    table: ResourceTable | None = None,
) -> Summaries:
    """A row for each connection, those that carried most bytes first. With TOP > 0 only the first
    TOP, then the row `other`, which adds up the rest. OFFSET_NS makes Unix time of the programs'
    times. With TABLE, each row has its resource."""
    strings = Strings()
    busiest, rest = split_top(changes.delta[:, 0] + changes.delta[:, 2], top)
    columns = _columns(changes.take(busiest), members, clock, strings)
    if len(rest):
        others = changes.take(rest)
        added = others.delta.sum(axis=0)
        columns = with_row(
            columns,
            {
                "remote_address": strings.index(OTHER),
                "connections": len(rest),
                "opened": np.count_nonzero(others.new & (others.connections["start_ns"] > 0)),
                "established": np.count_nonzero(others.established),
                **_counter_columns("delta", added),
            },
        )
    count = len(columns["pid"])
    columns["rtt_us_bounds"] = np.array(BOUNDS_US, np.uint32)
    made = Summaries(pb.TcpMetricsColumns, columns, strings.table, messages, count)
    resource = table.indices(changes.connections["group"][busiest]) if table else None
    return with_resources(made, resource, table)


def _columns(
    changes: Changes, members: Members, clock: UnixClock, strings: Strings
) -> dict[str, NDArray[Any]]:
    """The columns of pb.TcpMetricsColumns that are by row."""
    c = changes.connections
    start_ns = c["start_ns"].astype(np.int64)
    known = start_ns > 0
    until_ns = np.where(c["ended_ns"] > 0, c["ended_ns"], c["read_ns"]).astype(np.int64)
    timed = known & (c["established_ns"] > 0) & (c["role"] == pb.TCP_ROLE_CLIENT)
    comms = members.comms_of(c["pid"])
    return {
        "connection_id": c["cookie"],
        "local_address": address_indices(strings, scoped(c["local"], c["scope_id"])),
        "remote_address": address_indices(strings, scoped(c["remote"], c["scope_id"])),
        "comm": strings.indices(np.where(comms == b"", c["comm"], comms), comm_text),
        "network_namespace": c["network"],
        "start_ns": np.where(known, clock.unix_ns(start_ns), 0),
        "duration_ns": np.where(known, until_ns - start_ns, 0).clip(min=0).astype(np.uint64),
        "connect_ns": np.where(timed, c["established_ns"].astype(np.int64) - start_ns, 0).astype(
            np.uint64
        ),
        # The programs know who closed before the connection has ended.
        "end": np.where(c["ended_ns"] > 0, c["end"], pb.TCP_END_OPEN),
        "error": strings.indices(c["error"], error_name),
        "reset_reason": strings.indices(c["reset_reason"], reset_reason),
        "preexisting": (~known).astype(np.uint32),
        **_counter_columns("delta", changes.delta),
        **_counter_columns("total", changes.total),
        "rtt_us": c["srtt_us"] >> 3,
        "rtt_variation_us": c["rtt_deviation_us"] >> 2,
        "rtt_min_us": np.where(c["srtt_us"] > 0, c["rtt_min_us"], 0),
        "slow_start_threshold": c["slow_start_threshold"] % _NO_THRESHOLD,
        "connections": np.zeros(len(c), np.uint32),
        "opened": (changes.new & known).astype(np.uint32),
        "established": changes.established.astype(np.uint32),
        "was_established": ((c["established_ns"] > 0) | ~known).astype(np.uint32),
        **{name: c[name] for name in _SAME},
    }


# Fields that the program's record has by the same name.
_SAME: Final = (
    "local_port", "remote_port", "role", "state", "pid", "congestion_window",
    "segment_bytes", "backlog", "backlog_limit",
)  # fmt: skip


def _counter_columns(name: str, counters: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
    """The columns of counters, of shape (n, COLUMNS) or (COLUMNS,): NAME is `delta` or `total`."""
    return {
        name: counters[..., :RTT],
        f"rtt_us_{name}": counters[..., RTT:RTT_SUM],
        f"rtt_us_{name}_sum": counters[..., RTT_SUM],
    }


def messages(columns: Mapping[str, NDArray[Any]], strings: Sequence[str]) -> list[pb.TcpMetrics]:
    """The rows of COLUMNS, a pb.TcpMetricsColumns as arrays, as messages."""
    bounds = columns["rtt_us_bounds"].tolist()
    numbers = [columns[name].tolist() for name in _NUMBERS]
    texts = [[strings[at] for at in columns[name].tolist()] for name in _TEXTS]
    matrices = [columns[name].tolist() for name in _MATRICES]
    rows = []
    for others, values, words, (delta, total, rtt, rtt_sum, rtt_all, rtt_all_sum) in zip(
        columns["connections"].tolist(),
        zip(*numbers, strict=True),
        zip(*texts, strict=True),
        zip(*matrices, strict=True),
        strict=True,
    ):
        row = pb.TcpMetrics(
            **dict(zip(_NUMBERS, values, strict=True)),
            **dict(zip(_TEXTS, words, strict=True)),
            delta=counters_message(delta),
            # `other` has no figures since the beginning.
            total=None if others else counters_message(total),
            rtt_us_delta=histogram_message(bounds, rtt, rtt_sum),
            rtt_us_total=histogram_message(bounds, rtt_all, rtt_all_sum),
        )
        rows.append(row)
    return rows


_TEXTS: Final = ("local_address", "remote_address", "comm", "error", "reset_reason")
_MATRICES: Final = (
    "delta", "total", "rtt_us_delta", "rtt_us_delta_sum", "rtt_us_total", "rtt_us_total_sum",
)  # fmt: skip
_NUMBERS: Final = tuple(
    field.name
    for field in pb.TcpMetrics.DESCRIPTOR.fields
    if field.name not in (*_TEXTS, *_MATRICES, "resource")
)
