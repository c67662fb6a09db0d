"""Connections added up by peer: remote address and port for clients, remote address and listening
port for servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import Strings, split_top, sum_by_group, with_row
from coral.collectors.contract import Summaries
from coral.collectors.resources import ResourceTable, with_resources
from coral.collectors.tcp_metrics.connections import (
    BOUNDS_US,
    LISTENER,
    RTT,
    RTT_SUM,
    SLOTS,
    Changes,
)
from coral.collectors.tcp_metrics.names import (
    OTHER,
    address_indices,
    counters_message,
    end_name,
    error_name,
    histogram_message,
    scoped,
)
from coral.mesh.v1 import ebpf_pb2 as pb

_KEY_BYTES: Final = 28
_ENDS: Final = len(pb.TcpEnd.values())


def peer_summaries(changes: Changes, top: int, table: ResourceTable | None = None) -> Summaries:
    """A row for each peer with which anything moved, those with most bytes first. With TOP > 0 only
    the first TOP, then the row `other`, which adds up the rest. With TABLE, each row is of one
    container, too."""
    strings = Strings()
    keys, of_row = np.unique(_peers_of(changes.connections), return_inverse=True)
    counters = sum_by_group(changes.delta, of_row, len(keys))
    errors, failures = _failures(changes.connections, of_row, len(keys))
    figures = {
        "delta": counters[:, :RTT],
        "rtt_us_delta": counters[:, RTT:RTT_SUM],
        "rtt_us_delta_sum": counters[:, RTT_SUM],
        "failures": failures,
        **_states(changes, of_row, len(keys)),
        **_connect_times(changes, of_row, len(keys)),
        "connections_open": _open(changes, keys),
    }
    busiest, rest = split_top(counters[:, 0] + counters[:, 2], top)
    raw = keys.view(np.uint8).reshape(-1, _KEY_BYTES)[busiest]
    columns = {
        "remote_address": address_indices(strings, raw[:, :20]),
        "port": raw[:, 24].astype(np.uint32) << 8 | raw[:, 25],
        "role": raw[:, 26].astype(np.uint32),
        **{name: values[busiest] for name, values in figures.items()},
    }
    if len(rest):
        added = {name: values[rest].sum(axis=0) for name, values in figures.items()}
        columns = with_row(columns, {"remote_address": strings.index(OTHER), **added})
    count = len(columns["port"])
    columns["rtt_us_bounds"] = columns["connect_us_bounds"] = np.array(BOUNDS_US, np.uint32)
    columns["failure_names"] = strings.indices(errors, error_name)
    made = Summaries(pb.TcpPeerMetricsColumns, columns, strings.table, messages, count)
    groups = np.ascontiguousarray(raw[:, 20:24]).view("<u4").reshape(-1)
    return with_resources(made, table.indices(groups) if table else None, table)


def _peers_of(connections: NDArray[Any]) -> NDArray[Any]:
    """A key for each connection: address, scope, the owner's group (0 unless the session watches
    pods), port, role, and a last byte that is not 0, because numpy's byte strings end where zeros
    do."""
    keys = np.ones((len(connections), _KEY_BYTES), np.uint8)
    client = connections["role"] == pb.TCP_ROLE_CLIENT
    port = np.where(client, connections["remote_port"], connections["local_port"])
    keys[:, :20] = scoped(connections["remote"], connections["scope_id"])
    keys[:, 20:24] = connections["group"].astype("<u4").reshape(-1, 1).view(np.uint8)
    keys[:, 24], keys[:, 25] = port >> 8, port & 0xFF
    keys[:, 26] = connections["role"]
    return keys.view(f"S{_KEY_BYTES}").reshape(-1)


def _ended(connections: NDArray[Any]) -> NDArray[np.bool_]:
    ended: NDArray[np.bool_] = (connections["ended_ns"] > 0) & (connections["role"] != LISTENER)
    return ended


def _failed(connections: NDArray[Any]) -> NDArray[np.bool_]:
    """Those that ended and were never established; one that was there before it was found was."""
    never = (connections["established_ns"] == 0) & (connections["start_ns"] > 0)
    failed: NDArray[np.bool_] = _ended(connections) & never
    return failed


def _states(changes: Changes, of_row: NDArray[np.intp], peers: int) -> dict[str, NDArray[Any]]:
    """How many connections of each peer were opened, ended and so on, (peers,), and how they ended,
    (peers, _ENDS). OF_ROW is the peer of each connection."""
    connections = changes.connections
    ended = _ended(connections)
    began = changes.new & (connections["start_ns"] > 0) & (connections["role"] != LISTENER)
    states = {}
    for name, mask in (
        ("opened", began),
        ("closed", ended),
        ("failed", _failed(connections)),
        ("established", changes.established),
    ):
        counts = np.bincount(of_row[mask], minlength=peers)
        states[f"connections_{name}"] = counts.astype(np.uint64)
    ends = np.zeros((peers, _ENDS), np.uint64)
    np.add.at(ends, (of_row[ended], connections["end"][ended]), 1)
    return {**states, "ends": ends}


def _failures(
    connections: NDArray[Any], of_row: NDArray[np.intp], peers: int
) -> tuple[NDArray[Any], NDArray[np.uint64]]:
    """The errors, (k,), of connections that failed, and how many of each peer failed for each,
    (peers, k)."""
    failed = _failed(connections)
    errors, which = np.unique(connections["error"][failed], return_inverse=True)
    failures = np.zeros((peers, len(errors)), np.uint64)
    np.add.at(failures, (of_row[failed], which), 1)
    return errors, failures


def _open(changes: Changes, keys: NDArray[Any]) -> NDArray[np.uint64]:
    """How many connections are open with each peer of KEYS, which are sorted."""
    of_open = _peers_of(changes.open)
    if not len(keys):
        return np.zeros(0, np.uint64)
    at = np.searchsorted(keys, of_open).clip(max=len(keys) - 1)
    counts = np.bincount(at[keys[at] == of_open], minlength=len(keys))
    return counts.astype(np.uint64)


def _connect_times(
    changes: Changes, of_row: NDArray[np.intp], peers: int
) -> dict[str, NDArray[Any]]:
    """The histogram of the time that clients took to connect, (peers, SLOTS), and its sum."""
    connections = changes.connections
    timed = changes.established & (connections["role"] == pb.TCP_ROLE_CLIENT)
    timed &= connections["start_ns"] > 0
    took_ns = connections["established_ns"][timed] - connections["start_ns"][timed]
    took_us = took_ns // np.uint64(1000)
    slots = np.searchsorted(np.array(BOUNDS_US), took_us, side="right")
    counts = np.zeros((peers, SLOTS), np.uint64)
    np.add.at(counts, (of_row[timed], slots), 1)
    sums = np.zeros(peers, np.uint64)
    np.add.at(sums, of_row[timed], took_us)
    return {"connect_us_delta": counts, "connect_us_delta_sum": sums}


def messages(
    columns: Mapping[str, NDArray[Any]], strings: Sequence[str]
) -> list[pb.TcpPeerMetrics]:
    """The rows of COLUMNS, a pb.TcpPeerMetricsColumns as arrays, as messages."""
    rtt_bounds = columns["rtt_us_bounds"].tolist()
    connect_bounds = columns["connect_us_bounds"].tolist()
    errors = [strings[at] for at in columns["failure_names"].tolist()]
    numbers = [columns[name].tolist() for name in _NUMBERS]
    matrices = [columns[name].tolist() for name in _MATRICES]
    rows = []
    for address, values, (delta, rtt, rtt_sum, connect, connect_sum, ends, failures) in zip(
        columns["remote_address"].tolist(),
        zip(*numbers, strict=True),
        zip(*matrices, strict=True),
        strict=True,
    ):
        rows.append(
            pb.TcpPeerMetrics(
                **dict(zip(_NUMBERS, values, strict=True)),
                remote_address=strings[address],
                delta=counters_message(delta),
                rtt_us_delta=histogram_message(rtt_bounds, rtt, rtt_sum),
                connect_us_delta=histogram_message(connect_bounds, connect, connect_sum),
                ends={end_name(end): count for end, count in enumerate(ends) if count},
                failures={
                    error: count for error, count in zip(errors, failures, strict=False) if count
                },
            )
        )
    return rows


_MATRICES: Final = (
    "delta", "rtt_us_delta", "rtt_us_delta_sum", "connect_us_delta", "connect_us_delta_sum", "ends",
    "failures",
)  # fmt: skip
_NUMBERS: Final = tuple(
    field.name
    for field in pb.TcpPeerMetrics.DESCRIPTOR.fields
    if field.name not in (*_MATRICES, "remote_address", "resource")
)
