"""Connections added up by who is at the other end: remote address and port of clients, remote
address and listening port of servers."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.tcp_metrics.connections import (
    BOUNDS_US,
    COLUMNS,
    LISTENER,
    RTT,
    SLOTS,
    Changes,
)
from coral.collectors.tcp_metrics.rows import (
    OTHER,
    addresses,
    counters_message,
    end_name,
    error_name,
    histogram,
)
from coral.mesh.v1 import ebpf_pb2 as pb

_OPENED, _ESTABLISHED, _CLOSED, _FAILED, _OPEN = range(5)
_STATES: Final = 5


def peer_rows(changes: Changes, top: int) -> list[pb.TcpPeerMetrics]:
    """A message for each peer with which anything moved, those with most bytes first; of TOP > 0,
    at most so many, the last the rest's sum."""
    connections = changes.connections
    keys, of_row = np.unique(_peers_of(connections), return_inverse=True)
    counters = np.zeros((len(keys), COLUMNS), np.uint64)
    np.add.at(counters, of_row, changes.delta)
    states = np.zeros((len(keys), _STATES), np.int64)
    ended = (connections["ended_ns"] > 0) & (connections["role"] != LISTENER)
    began = changes.new & (connections["start_ns"] > 0) & (connections["role"] != LISTENER)
    np.add.at(states[:, _OPENED], of_row, began)
    np.add.at(states[:, _ESTABLISHED], of_row, changes.established)
    np.add.at(states[:, _CLOSED], of_row, ended)
    failed = ended & _never_established(connections)
    np.add.at(states[:, _FAILED], of_row, failed)
    open_keys, open_counts = np.unique(_peers_of(changes.open), return_counts=True)
    at = np.searchsorted(open_keys, keys).clip(max=max(len(open_keys) - 1, 0))
    if len(open_keys):
        states[:, _OPEN] = np.where(open_keys[at] == keys, open_counts[at], 0)
    connects = np.zeros((len(keys), SLOTS + 1), np.uint64)
    took_us, timed = _connect_times(changes)
    slots = np.searchsorted(np.array(BOUNDS_US), took_us, side="right")
    np.add.at(connects, (of_row[timed], slots[timed]), 1)
    np.add.at(connects[:, SLOTS], of_row[timed], took_us[timed])

    order = np.argsort(counters[:, 0] + counters[:, 2], kind="stable")[::-1]
    rest = order[max(top - 1, 0) :] if top and len(order) > top else order[:0]
    rows = []
    raw = keys.view(np.uint8).reshape(-1, _KEY_BYTES)
    texts = addresses(np.ascontiguousarray(raw[:, :16]))
    for index in order[: len(order) - len(rest)].tolist():
        row = _row(counters[index], states[index], connects[index])
        row.remote_address = texts[index]
        row.port = int(raw[index, 16]) << 8 | int(raw[index, 17])
        row.role = int(raw[index, 18])  # type: ignore[assignment]
        rows.append(row)
    if len(rest):
        row = _row(
            counters[rest].sum(axis=0),
            states[rest].sum(axis=0),
            connects[rest].sum(axis=0),
        )
        row.remote_address = OTHER
        rows.append(row)
    place = np.full(len(keys), len(rows) - 1)  # of each peer's row
    place[order[: len(order) - len(rest)]] = np.arange(len(order) - len(rest))
    for index, end, count in _counts(place[of_row[ended]], connections["end"][ended]):
        rows[index].ends[end_name(end)] = count
    for index, error, count in _counts(place[of_row[failed]], connections["error"][failed]):
        rows[index].failures[error_name(error)] = count
    return rows


_KEY_BYTES: Final = 20


def _peers_of(connections: NDArray[Any]) -> NDArray[Any]:
    """One key for each connection: address, port, role, and a last byte that is not 0, because
    numpy's byte strings end where zeros do."""
    keys = np.ones((len(connections), _KEY_BYTES), np.uint8)
    client = connections["role"] == pb.TCP_ROLE_CLIENT
    port = np.where(client, connections["remote_port"], connections["local_port"])
    keys[:, :16] = connections["remote"]
    keys[:, 16], keys[:, 17] = port >> 8, port & 0xFF
    keys[:, 18] = connections["role"]
    return keys.view(f"S{_KEY_BYTES}").reshape(-1)


def _never_established(connections: NDArray[Any]) -> NDArray[np.bool_]:
    """One that was there before it was found was established."""
    never: NDArray[np.bool_] = (connections["established_ns"] == 0) & (connections["start_ns"] > 0)
    return never


def _connect_times(changes: Changes) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Each connection's time to connect, and which of them have one to tell."""
    connections = changes.connections
    timed = changes.established & (connections["role"] == pb.TCP_ROLE_CLIENT)
    timed &= connections["start_ns"] > 0
    took_ns = connections["established_ns"] - connections["start_ns"]
    return took_ns // np.uint64(1000), timed


def _counts(rows: NDArray[np.intp], values: NDArray[Any]) -> list[tuple[int, int, int]]:
    """How often each row has each value."""
    pairs = np.stack([rows, values.astype(np.intp)])
    found, counts = np.unique(pairs, axis=1, return_counts=True)
    return list(zip(*found.tolist(), counts.tolist(), strict=True))


def _row(
    counters: NDArray[np.uint64], states: NDArray[np.int64], connects: NDArray[np.uint64]
) -> pb.TcpPeerMetrics:
    return pb.TcpPeerMetrics(
        connections_opened=int(states[_OPENED]),
        connections_closed=int(states[_CLOSED]),
        connections_failed=int(states[_FAILED]),
        connections_open=int(states[_OPEN]),
        connections_established=int(states[_ESTABLISHED]),
        delta=counters_message(counters),
        rtt_us_delta=histogram(counters[RTT:]),
        connect_us_delta=histogram(connects),
    )
