"""How to make each collector see something that is known beforehand.

A new collector takes one entry in `PROVOCATIONS`.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb

_CALLS: Final = 1000
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
# Says that it is there, waits for a line, does it, and waits for the end.
_PATIENT: Final = """
import os, sys
print(flush=True)
sys.stdin.readline()
{code}
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Provocation:
    """What a process does, in Python, and how a collector that watches it must tell of it.

    `count` is how many `things` a batch tells of, `times` how many there are to be in all, whatever
    the mode; `config` goes to the collector beside the process and the mode.
    """

    things: str
    times: int
    code: str
    count: Callable[[Batch], int]
    config: Mapping[str, str] = field(default_factory=dict)


def _ends(batch: Batch) -> int:
    """Ends of connections: of figures, those that carried what they should have."""
    sizes = (_SENT_BYTES, _ANSWERED_BYTES)
    carried = (
        (row.role, row.total.bytes_sent, row.total.bytes_received)
        for row in batch.message.tcp_metrics
        if row.state == pb.TCP_STATE_CLOSE
    )
    wanted = ((pb.TCP_ROLE_CLIENT, *sizes), (pb.TCP_ROLE_SERVER, *reversed(sizes)))
    return sum(one in wanted for one in carried) + _closed(batch)


def _closed(batch: Batch) -> int:
    if batch.message.kind != pb.EBPF_COLLECTOR_KIND_TCP_METRICS:
        return 0
    events = batch.events
    ends = events["role"] != pb.TCP_ROLE_LISTENER
    ends &= events["what"] == pb.TcpStateChange.WHAT_STATE
    return int((ends & (events["new_state"] == pb.TCP_STATE_CLOSE)).sum())


PROVOCATIONS: Final[Mapping[int, Provocation]] = {
    pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS: Provocation(
        things="calls of getppid",
        times=_CALLS,
        code=f"for _ in range({_CALLS}): os.getppid()",
        count=lambda batch: (
            sum(row.call_count for row in batch.message.syscall_stats) + len(batch.events)
        ),
        config={"include": "getppid", "interval": "100ms"},
    ),
    pb.EBPF_COLLECTOR_KIND_TCP_METRICS: Provocation(
        things="ends of connections",
        times=2 * _CONNECTIONS,
        code=_TALK,
        count=_ends,
        config={"interval": "100ms"},
    ),
}
# Of a collector without an entry only that it starts and stops can be seen.
UNKNOWN: Final = Provocation("events", 0, "", lambda _: 0)


class Patient:
    """A process that does what it was given once it is told to, and stays until the block is
    left."""

    def __init__(self, code: str) -> None:
        self._code = _PATIENT.format(code=code)

    async def __aenter__(self) -> Self:
        self._process: Process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", self._code, stdin=PIPE, stdout=PIPE
        )
        assert self._process.stdin  # noqa: S101  they were asked for
        assert self._process.stdout  # noqa: S101
        self._stdin = self._process.stdin
        await self._process.stdout.readline()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        await self._process.communicate()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def begin(self) -> None:
        """Tells it to."""
        self._stdin.write(b"\n")
