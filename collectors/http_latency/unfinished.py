"""Requests that have not ended when a session does: what the programs' state of connections, struct
connection of connection.bpf.h, says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import HashMap
from coral.collectors.contract import Unread
from coral.collectors.http_latency.details import Wants
from coral.mesh.v1 import ebpf_pb2 as pb

# As in connection.bpf.h.
_SERVER: Final = pb.HTTP_ROLE_SERVER
_RECEIVED, _SENT = 0, 1
_AT_HAND: Final = 2
_HAS_TRACE: Final = 32
_SWITCHING: Final = 101  # the one interim status that is final
_FINAL: Final = 200  # the first status of a final response
# Fields of a connection and of a request that a record has, by the names there.
_OF_CONNECTION: Final = {
    "connection": "id", "pid": "tgid", "born": "born", "network": "network", "role": "role",
    "local_port": "local_port", "remote_port": "remote_port", "local": "local", "remote": "remote",
}  # fmt: skip
_OF_REQUEST: Final = {
    "number": "number", "began_ns": "begun_ns", "asked_ns": "ended_ns", "path_hash": "path_hash",
    "path_bytes": "path_bytes", "path_flags": "flags", "method": "method", "version": "version",
    "path": "path", "request_body_bytes": "body_bytes",
}  # fmt: skip

Spilled = dict[tuple[int, int], Any]


class Unfinished:
    """The requests of one session that have not ended, as records of type DTYPE: struct
    http_exchange, or http_detailed with what the session WANTS."""

    def __init__(self, dtype: np.dtype[Any], wants: Wants) -> None:
        self._wants = wants
        self.records: NDArray[Any] = np.empty(0, dtype)
        self._unknown = 0

    def read(
        self, connections: HashMap, spilled: HashMap, bit: int, since: int, now_ns: int
    ) -> None:
        """Looks at all CONNECTIONS, some thousand at a time, with the SPILLED requests, for the
        session with this BIT that began in the generation SINCE. It is NOW_NS, of the monotonic
        clock. Raises `BpfError`."""
        parts = [self.records]
        for _, found in connections.read_batches():
            if len(waiting := found[is_waiting(found, bit, since)]):
                parts.append(self._records_of(waiting, spilled, now_ns))
        self.records = np.concatenate(parts)

    def _records_of(self, connections: NDArray[Any], spilled: HashMap, now_ns: int) -> NDArray[Any]:
        of, numbers = waiting_numbers(connections)
        requests = connections["requests"][of, numbers % _AT_HAND]
        is_here = requests["number"] == numbers
        if not is_here.all():
            wanted = {
                (int(sk), int(number))
                for sk, number in zip(
                    connections["sk"][of[~is_here]], numbers[~is_here], strict=True
                )
            }
            kept = _spilled(spilled, wanted)
            for at in np.flatnonzero(~is_here).tolist():
                request = kept.get((int(connections["sk"][of[at]]), int(numbers[at])))
                if request is not None:
                    requests[at], is_here[at] = request, True
        self._unknown += int((~is_here).sum())
        of, requests = of[is_here], requests[is_here]
        records: NDArray[Any] = np.zeros(len(of), self.records.dtype)
        is_detailed = "exchange" in (records.dtype.names or ())
        fill(records["exchange"] if is_detailed else records, connections[of], requests, now_ns)
        if is_detailed:
            self._fill_details(records, requests)
        return records

    def _fill_details(self, records: NDArray[Any], requests: NDArray[Any]) -> None:
        if self._wants & Wants.QUERY:
            records["query_bytes"] = requests["query_bytes"]
        if self._wants & Wants.HOST:
            records["host"], records["host_bytes"] = requests["host"], requests["host_bytes"]
        if self._wants & Wants.TRACE:
            valid = (requests["flags"] & _HAS_TRACE) > 0
            records["trace"][valid] = requests["trace"][valid]
            records["parent"][valid] = requests["parent"][valid]

    def forget(self, records: NDArray[Any]) -> None:
        """RECORDS, of the same type, say that these have ended after all."""
        if not len(self.records):
            return
        ours, theirs = _exchanges(self.records), _exchanges(records)
        theirs = theirs[np.isin(theirs["connection"], ours["connection"])]
        ended = set(zip(theirs["connection"].tolist(), theirs["number"].tolist(), strict=True))
        pairs = zip(ours["connection"].tolist(), ours["number"].tolist(), strict=True)
        self.records = self.records[[pair not in ended for pair in pairs]]

    def take(self) -> tuple[NDArray[Any], Unread]:
        """The records that are left, and how many requests these and those without a record are,
        with the bytes of their bodies so far; nothing the next time."""
        records, unknown = self.records, self._unknown
        self.records, self._unknown = records[:0], 0
        exchanges = _exchanges(records)
        size = exchanges["request_body_bytes"].sum() + exchanges["response_body_bytes"].sum()
        return records, Unread(len(records) + unknown, int(size))


def _exchanges(records: NDArray[Any]) -> NDArray[Any]:
    return records["exchange"] if "exchange" in (records.dtype.names or ()) else records


def is_waiting(connections: NDArray[Any], bit: int, since: int) -> NDArray[np.bool_]:
    """Which of CONNECTIONS have requests that wait for their responses and that are the session's
    of this BIT, which began in the generation SINCE."""
    behind = (np.uint32(since) - connections["generation"]).astype(np.int32)
    waits = (connections["made"] != connections["answered"]) & (connections["on_trial"] == 0)
    found: NDArray[np.bool_] = (
        waits & ((connections["watching"] & np.uint64(bit)) > 0) & (behind <= 0)
    )
    return found


def waiting_numbers(connections: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.uint32]]:
    """For each request that waits on CONNECTIONS, of shape (n,): of which connection it is, and its
    number there; both of shape (requests,)."""
    counts = (connections["made"] - connections["answered"]).astype(np.intp)
    of = np.repeat(np.arange(len(connections)), counts)
    nth = np.arange(len(of)) - np.repeat(counts.cumsum() - counts, counts)
    return of, connections["answered"][of] + nth.astype(np.uint32)


def fill(
    records: NDArray[Any], connections: NDArray[Any], requests: NDArray[Any], now_ns: int
) -> None:
    """Fills RECORDS, zeros of struct http_exchange, with what is known at NOW_NS of REQUESTS on
    their CONNECTIONS, all of shape (n,)."""
    for name, its in _OF_CONNECTION.items():
        records[name] = connections[its]
    for name, its in _OF_REQUEST.items():
        records[name] = requests[its]
    records["tls"] = connections["ssl"] > 0
    records["ended_ns"] = now_ns
    records["outcome"] = pb.HTTP_OUTCOME_IN_PROGRESS
    rows = np.arange(len(records))
    is_server = connections["role"] == _SERVER
    ask = connections["lanes"][rows, np.where(is_server, _RECEIVED, _SENT)]
    answer = connections["lanes"][rows, np.where(is_server, _SENT, _RECEIVED)]
    unasked = requests["ended_ns"] == 0
    records["request_body_bytes"][unasked] = ask["body_bytes"][unasked]
    final = (answer["status"] >= _FINAL) | (answer["status"] == _SWITCHING)
    answered = final & (requests["number"] == connections["answered"])
    records["status"][answered] = answer["status"][answered]
    records["first_ns"][answered] = answer["begun_ns"][answered]
    records["response_body_bytes"][answered] = answer["body_bytes"][answered]


def _spilled(spilled: HashMap, wanted: Iterable[tuple[int, int]]) -> Spilled:
    """The requests WANTED, by connection and number, as far as they are there."""
    found: Spilled = {}
    for keys, requests in spilled.read_batches():
        for at, key in _matching(keys, set(wanted)):
            found[key] = requests[at].copy()
    return found


def _matching(
    keys: NDArray[Any], wanted: set[tuple[int, int]]
) -> Iterator[tuple[int, tuple[int, int]]]:
    for at, key in enumerate(zip(keys["sk"].tolist(), keys["number"].tolist(), strict=True)):
        if key in wanted:
            yield at, key
