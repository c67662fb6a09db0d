"""Requests that waited on SSL objects of processes that have ended since: their ends are in no
program's sight where no socket is known, so that user space makes their records, from what the
programs had noted. The C side is exchange_send in http_latency.bpf.c."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import HashMap
from coral.mesh.v1 import ebpf_pb2 as pb

_RECEIVED, _SENT = 0, 1  # as in connection.bpf.h
_SWITCHING_PROTOCOLS, _FIRST_FINAL = 101, 200  # statuses
_OF_REQUEST: Final = ("path_hash", "path_bytes", "method", "version", "path")
_OF_CONNECTION: Final = (
    *("born", "network", "role", "local_port", "remote_port", "local", "remote"),
)


def untold(
    connections: NDArray[Any], spilled: HashMap, record: np.dtype[Any]
) -> list[tuple[int, int, NDArray[Any]]]:
    """The requests that wait on CONNECTIONS, struct connection of shape (n,), which end here:
    outcome unknown, at the last byte that was seen. For each connection the mask of the sessions
    that watched it, their generation, and struct http_exchange of shape (k,), which is RECORD.
    Those of them that SPILLED keeps are removed there. Raises `BpfError`."""
    waiting = (connections["unread"] == 0) & (connections["on_trial"] == 0)
    waiting &= connections["made"] != connections["answered"]
    found = []
    for c in connections[waiting]:
        requests = list(_requests(c, spilled))
        records = np.zeros(len(requests), record)
        for to, request in zip(records, requests, strict=True):
            _fill(to, c, request)
        found.append((int(c["watching"]), int(c["generation"]), records))
    return found


def _requests(c: np.void, spilled: HashMap) -> Iterator[np.void]:
    at_hand = c["requests"]
    for number in range(int(c["answered"]), int(c["made"])):
        request = at_hand[number % len(at_hand)]
        if request["number"] != number:
            key = (c["sk"], number)
            request = spilled.read_one(key)
            spilled.delete([key])
        if request is not None:
            yield request


def _fill(to: np.void, c: np.void, request: np.void) -> None:
    asks = _RECEIVED if c["role"] == pb.HTTP_ROLE_SERVER else _SENT
    ask, answer = c["lanes"][asks], c["lanes"][1 - asks]
    status = int(answer["status"]) if request["number"] == c["answered"] else 0
    if status >= _FIRST_FINAL or status == _SWITCHING_PROTOCOLS:
        to["status"], to["first_ns"] = status, answer["begun_ns"]
        to["response_body_bytes"] = answer["body_bytes"]
    for name in _OF_REQUEST:
        to[name] = request[name]
    for name in _OF_CONNECTION:
        to[name] = c[name]
    whole = request["ended_ns"] != 0
    to["request_body_bytes"] = request["body_bytes"] if whole else ask["body_bytes"]
    to["path_flags"] = request["flags"]
    to["began_ns"], to["asked_ns"] = request["begun_ns"], request["ended_ns"]
    to["ended_ns"] = max(request["begun_ns"], ask["last_ns"], answer["last_ns"])
    to["connection"], to["number"], to["pid"] = c["id"], request["number"], c["tgid"]
    to["outcome"], to["tls"] = pb.HTTP_OUTCOME_UNKNOWN, 1
