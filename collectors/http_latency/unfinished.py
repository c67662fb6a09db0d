"""Requests whose end no program has seen: what the state of connections in the programs, struct
connection of connection.bpf.h, says of them. Either their session ends before they do, or their
process has ended without a sign of that on any known socket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

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


class Waiting(NamedTuple):
    """Requests that wait, both of shape (n,)."""

    connections: NDArray[Any]  # those that each waits on, struct connection
    requests: NDArray[Any]  # struct request

    def of_session(self, bit: int, since: int) -> Waiting:
        """Those of the session with this BIT, which began in the generation SINCE."""
        its = is_waiting(self.connections, bit, since)
        return Waiting(self.connections[its], self.requests[its])

    @property
    def last_ns(self) -> NDArray[np.uint64]:
        """When a byte was last seen on the connection, or the request began."""
        lanes = self.connections["lanes"]["last_ns"]
        last: NDArray[np.uint64] = np.maximum(self.requests["begun_ns"], lanes.max(axis=1))
        return last


def waiting_on(connections: NDArray[Any], spilled: HashMap) -> tuple[Waiting, int]:
    """The requests that wait on CONNECTIONS, which all do have some, with those in SPILLED; and how
    many there was no room for. Raises `BpfError`."""
    of, numbers = waiting_numbers(connections)
    requests = connections["requests"][of, numbers % _AT_HAND]
    is_here = requests["number"] == numbers
    if not is_here.all():
        elsewhere = np.flatnonzero(~is_here)
        kept = _spilled(spilled, spilled_keys(connections[of[elsewhere]], numbers[elsewhere]))
        for at in elsewhere.tolist():
            request = kept.get((int(connections["sk"][of[at]]), int(numbers[at])))
            if request is not None:
                requests[at], is_here[at] = request, True
    return Waiting(connections[of[is_here]], requests[is_here]), int((~is_here).sum())


def spilled_keys(connections: NDArray[Any], numbers: NDArray[np.uint32]) -> list[tuple[int, int]]:
    """The keys under which requests with NUMBERS on CONNECTIONS, both of shape (n,), are kept where
    a connection has no room for them."""
    return list(zip(connections["sk"].tolist(), numbers.tolist(), strict=True))


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
            if len(found := found[is_waiting(found, bit, since)]):
                waiting, unknown = waiting_on(found, spilled)
                self._unknown += unknown
                parts.append(self.records_of(waiting, now_ns, pb.HTTP_OUTCOME_IN_PROGRESS))
        self.records = np.concatenate(parts)

    def records_of(
        self,
        waiting: Waiting,
        ended_ns: int | NDArray[np.uint64],
        outcome: pb.HttpOutcome,
    ) -> NDArray[Any]:
        """The records of requests that are over at ENDED_NS, of the monotonic clock, with this
        OUTCOME."""
        records: NDArray[Any] = np.zeros(len(waiting.requests), self.records.dtype)
        exchanges = _exchanges(records)
        fill(exchanges, *waiting)
        exchanges["ended_ns"], exchanges["outcome"] = ended_ns, outcome
        if exchanges is not records:
            self._fill_details(records, waiting.requests)
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


def fill(records: NDArray[Any], connections: NDArray[Any], requests: NDArray[Any]) -> None:
    """Fills RECORDS, zeros of struct http_exchange, with what is known of REQUESTS on their
    CONNECTIONS, all of shape (n,)."""
    for name, its in _OF_CONNECTION.items():
        records[name] = connections[its]
    for name, its in _OF_REQUEST.items():
        records[name] = requests[its]
    records["tls"] = connections["ssl"] > 0
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
