"""A process that asks itself over HTTP, and how `http_latency` has to report it."""

from __future__ import annotations

from typing import Final

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.contract import Provocation

_CONNECTIONS: Final = 10
_REQUESTS: Final = 10  # on each
_ASKED_BYTES: Final = 300
_ANSWERED_BYTES: Final = 5000
_STATUS: Final = 201
# Connects to itself, asks and answers again and again.
_TALK: Final = f"""
import socket
ask = b"POST /coral HTTP/1.1\\r\\nHost: doctor\\r\\nContent-Length: {_ASKED_BYTES}\\r\\n\\r\\n"
ask += bytes({_ASKED_BYTES})
answer = b"HTTP/1.1 {_STATUS} Created\\r\\nContent-Length: {_ANSWERED_BYTES}\\r\\n\\r\\n"
answer += bytes({_ANSWERED_BYTES})
with socket.create_server(("127.0.0.1", 0)) as listener:
    for _ in range({_CONNECTIONS}):
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        for _ in range({_REQUESTS}):
            client.sendall(ask)
            server.recv(len(ask), socket.MSG_WAITALL)
            server.sendall(answer)
            client.recv(len(answer), socket.MSG_WAITALL)
        client.close()
        server.close()
"""


def _requests(batch: Batch) -> int:
    """Requests in a batch: those that are complete, with the right method, status and bytes."""
    return sum(map(_in_row, batch.message.http_latency)) + _in_events(batch)


def _in_row(row: pb.HttpLatencyHistogram) -> int:
    wanted = row.count * _ASKED_BYTES, row.count * _ANSWERED_BYTES
    right = (row.request_body_bytes, row.response_body_bytes) == wanted and not row.outcomes
    right = right and (row.method, row.status) == (pb.HTTP_METHOD_POST, _STATUS)
    return row.count if right else 0


def _in_events(batch: Batch) -> int:
    events = batch.events
    if not len(events):
        return 0
    right = events["outcome"] == pb.HTTP_OUTCOME_COMPLETE
    right &= (events["method"] == pb.HTTP_METHOD_POST) & (events["status"] == _STATUS)
    right &= events["request_body_bytes"] == _ASKED_BYTES
    right &= events["response_body_bytes"] == _ANSWERED_BYTES
    return int(right.sum())


PROVOCATION: Final = Provocation(
    things="requests",
    times=2 * _CONNECTIONS * _REQUESTS,  # each is made and served
    code=_TALK,
    count=_requests,
    config={"interval": "100ms"},
)
