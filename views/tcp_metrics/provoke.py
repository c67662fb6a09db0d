"""A process that talks to itself over TCP, and how `tcp_metrics` has to report it."""

from __future__ import annotations

from typing import Final

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.contract import Provocation

_CONNECTIONS: Final = 100
_SENT_BYTES: Final = 3000
_ANSWERED_BYTES: Final = 500
# Connects to itself, sends, answers, closes, again and again.
_TALK: Final = f"""
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    for _ in range({_CONNECTIONS}):
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        client.sendall(bytes({_SENT_BYTES}))
        server.recv({_SENT_BYTES}, socket.MSG_WAITALL)
        server.sendall(bytes({_ANSWERED_BYTES}))
        client.recv({_ANSWERED_BYTES}, socket.MSG_WAITALL)
        client.close()
        server.close()
"""


def _ends(batch: Batch) -> int:
    """Ends of connections in a batch. In summaries only those count that carried the right
    bytes."""
    sizes = (_SENT_BYTES, _ANSWERED_BYTES)
    carried = (
        (row.role, row.total.bytes_sent, row.total.bytes_received)
        for row in batch.message.tcp_metrics
        if row.state == pb.TCP_STATE_CLOSE
    )
    wanted = ((pb.TCP_ROLE_CLIENT, *sizes), (pb.TCP_ROLE_SERVER, *reversed(sizes)))
    return sum(one in wanted for one in carried) + _closed(batch)


def _closed(batch: Batch) -> int:
    """Ends of connections among single events."""
    if not len(batch.events):
        return 0
    events = batch.events
    ends = events["role"] != pb.TCP_ROLE_LISTENER
    ends &= events["what"] == pb.TcpStateChange.WHAT_STATE
    return int((ends & (events["new_state"] == pb.TCP_STATE_CLOSE)).sum())


PROVOCATION: Final = Provocation(
    things="ends of connections",
    times=2 * _CONNECTIONS,
    code=_TALK,
    count=_ends,
    config={"interval": "100ms"},
)
