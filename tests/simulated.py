"""Simulated agents: each on a port of its own, with sessions whose batches were recorded from a
real one and are told again and again, with numbers and times of their own.

    python -P -m tests.simulated RECORDING DIRECTORY AGENTS INTERVAL_S

serves AGENTS agents until it is ended, each with one session for each entry of RECORDING: a batch
that `record` has written, or a directory of batches with equally many rows, which take turns.
DIRECTORY gets `agents`, for `agents.file` of a colony. A session that began is as old as the file
`began` says, so that agents outlive their process.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from coral.client import AgentClient
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.encoding import fields

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["EbpfService"]
_REPLAYED: Final = 40
"""How many batches a session keeps for those that resume."""
SERVICES: Final = 50
"""Each agent watches one of so many services, in turn."""

Context = grpc.aio.ServicerContext[Any, Any]


async def record(client: AgentClient, collector_id: str, rows: int, path: Path) -> int:
    """Writes the first batch of a session, in columns, that has ROWS rows or more to PATH; how many
    it has."""
    async with client.subscribe(collector_id, columns=True) as stream:
        async for batch in stream:
            if batch.count >= rows:
                request = pb.EbpfEventStreamRequest(
                    collector_id=collector_id,
                    after_seq=batch.first_seq - 1,
                    summaries=pb.EbpfEventStreamRequest.SUMMARIES_COLUMNS,
                )
                call = client.stream_call(request)
                wire = await call.read()
                call.cancel()
                assert isinstance(wire, bytes)
                path.write_bytes(wire)  # noqa: ASYNC240  a small file
                return batch.count
    raise AssertionError("the session ended before it had so many rows")


@dataclass(frozen=True)
class Template:
    """A batch that was recorded. `columns` are its rows, with which an agent begins a batch; `rest`
    is what else is the same whoever tells it."""

    kind: pb.EbpfCollectorKind
    rows: int
    columns: bytes
    rest: bytes

    @classmethod
    def read(cls, path: Path) -> Template:
        """That of one file."""
        wire = path.read_bytes()
        there_are = fields(wire)
        next(there_are)
        _, end, _ = next(there_are)
        message = pb.EbpfEventBatch.FromString(wire[end:])
        rows, kind = message.count, message.kind
        own = ("collector_id", "agent_id", "first_seq", "last_seq", "produced", "account")
        for name in (*own, "interval_start_ns", "interval_end_ns"):
            message.ClearField(name)
        return cls(kind, rows, wire[:end], message.SerializeToString())


@dataclass
class Session:
    """Batch number k tells of the events k * rows + 1 to (k + 1) * rows, and is there from
    `began_s` + (k + 1) * `interval_s` on."""

    collector_id: str
    agent_id: str
    service: str
    templates: Sequence[Template]
    first: int  # of the templates, for batch 0
    interval_s: float
    began_s: float
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        (self.rows,) = {template.rows for template in self.templates}

    @property
    def info(self) -> pb.CollectorInfo:
        info = pb.CollectorInfo(
            collector_id=self.collector_id,
            service_name=self.service,
            kind=self.templates[0].kind,
            produced=self.last(time.time()) * self.rows,
            config={"scope": "host", "interval": f"{self.interval_s:g}s"},
            continuous=True,
        )
        info.started_at.FromNanoseconds(int(self.began_s * 1e9))
        return info

    def last(self, now_s: float) -> int:
        """How many batches there are."""
        return int((now_s - self.began_s) / self.interval_s)

    def batch(self, number: int, evicted: int) -> bytes:
        """Batch NUMBER, of a stream that lost EVICTED events before its first one."""
        end_ns = int((self.began_s + (number + 1) * self.interval_s) * 1e9)
        last_seq = (number + 1) * self.rows
        own = pb.EbpfEventBatch(
            collector_id=self.collector_id,
            agent_id=self.agent_id,
            first_seq=number * self.rows + 1,
            last_seq=last_seq,
            produced=last_seq,
            interval_start_ns=end_ns - int(self.interval_s * 1e9),
            interval_end_ns=end_ns,
        )
        if evicted:
            own.account.lost.add(stage=pb.Loss.STAGE_REPLAY_EVICTED, count=evicted)
        template = self.templates[(self.first + number) % len(self.templates)]
        # One message after the other is the wire form of both in one.
        return template.columns + own.SerializeToString() + template.rest

    async def stream(self, after_seq: int) -> AsyncIterator[bytes]:
        """What a stream that resumes there is sent."""
        rows, number = self.rows, after_seq // self.rows
        assert after_seq % rows == 0
        oldest = max(number, self.last(time.time()) - _REPLAYED)
        evicted, number = (oldest - number) * rows, oldest
        while True:
            while number < self.last(time.time()):
                yield self.batch(number, evicted)
                number += 1
            due_s = self.began_s + (number + 1) * self.interval_s
            await asyncio.sleep(max(due_s - time.time(), 0.001))


class Simulated:
    """One agent."""

    def __init__(self, agent_id: str, sessions: Iterable[Session]) -> None:
        self.agent_id = agent_id
        self.port = 0
        self._sessions = {session.collector_id: session for session in sessions}

    async def start(self, port: int) -> grpc.aio.Server:
        """Listens on PORT, or on any."""
        server = grpc.aio.server()
        scripts = {
            "GetCapabilities": self.capabilities,
            "ListCollectors": self.collectors,
            "WatchCollectors": self.watch,
            "StreamEventBatches": self.stream,
        }
        handlers = {name: _handler(name, script) for name, script in scripts.items()}
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),)
        )
        self.port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        return server

    async def capabilities(self, _request: object, _context: Context) -> pb.EbpfCapabilities:
        return pb.EbpfCapabilities(agent_id=self.agent_id, agent_version="simulated")

    async def collectors(self, _request: object, _context: Context) -> pb.ListCollectorsResponse:
        infos = [session.info for session in self._sessions.values()]
        return pb.ListCollectorsResponse(collectors=infos)

    async def watch(self, _request: object, _context: Context) -> AsyncIterator[pb.CollectorChange]:
        for session in self._sessions.values():
            what = pb.CollectorChange.WHAT_PRESENT
            yield pb.CollectorChange(what=what, collector=session.info)
        yield pb.CollectorChange(what=pb.CollectorChange.WHAT_SYNCED)
        await asyncio.Event().wait()

    async def stream(
        self, request: pb.EbpfEventStreamRequest, context: Context
    ) -> AsyncIterator[bytes]:
        # As a real agent: whoever has the headers knows that the stream stands.
        await context.send_initial_metadata(())
        async for wire in self._sessions[request.collector_id].stream(request.after_seq):
            yield wire


def _handler(name: str, script: Any) -> grpc.RpcMethodHandler[Any, Any]:
    method = _SERVICE.methods_by_name[name]
    make: Any = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    handler: grpc.RpcMethodHandler[Any, Any] = make(
        script,
        request_deserializer=getattr(pb, method.input_type.name).FromString,
        response_serializer=lambda it: it if isinstance(it, bytes) else it.SerializeToString(),
    )
    return handler


async def serve(recording: Path, directory: Path, count: int, interval_s: float) -> None:
    """Serves until it is cancelled."""
    began, ports = directory / "began", directory / "agents"
    if not began.exists():
        began.write_text(str(time.time()))
    began_s = float(began.read_text())
    known = [int(line.rpartition(":")[2]) for line in _lines(ports)] or [0] * count
    entries = [_templates(path) for path in sorted(recording.iterdir())]  # noqa: ASYNC240
    agents, servers = [], []
    for number, port in enumerate(known):
        name, service = f"node-{number:04}", f"service-{number % SERVICES:02}"
        from_s = began_s + interval_s * number / count
        sessions = [
            Session(f"{name}-{which}", name, service, templates, number, interval_s, from_s)
            for which, templates in enumerate(entries)
        ]
        agents.append(Simulated(name, sessions))
        servers.append(await agents[-1].start(port))
    if not ports.exists():
        unfinished = directory / ".agents"
        unfinished.write_text("".join(f"127.0.0.1:{agent.port}\n" for agent in agents))
        unfinished.rename(ports)
    print("ready", flush=True)
    await asyncio.Event().wait()


def _templates(path: Path) -> Sequence[Template]:
    return [Template.read(it) for it in (sorted(path.iterdir()) if path.is_dir() else [path])]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    _, recording_, directory_, count_, interval_s_ = sys.argv
    asyncio.run(serve(Path(recording_), Path(directory_), int(count_), float(interval_s_)))
