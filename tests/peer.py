"""A gRPC server that speaks the contract by a script, for what a real agent seldom does: it goes
away, is restarted, sends numbers that do not add up. And a proxy that cuts connections."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from coral.mesh.v1 import ebpf_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["EbpfService"]
Context = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def peer(address: str, **scripts: Callable[..., Any]) -> AsyncIterator[str]:
    """A server at ADDRESS whose methods are SCRIPTS by the names of the RPCs, coroutine functions
    or asynchronous generators of (request, context); the address with its port. Leaving the block
    cuts all connections."""
    server = grpc.aio.server()
    handlers = {name: _handler(name, script) for name, script in scripts.items()}
    handler = grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield address if address.startswith("unix:") else f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


def _handler(name: str, script: Callable[..., Any]) -> grpc.RpcMethodHandler[Any, Any]:
    method = SERVICE.methods_by_name[name]
    request: Any = getattr(pb, method.input_type.name)
    make: Any = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    handler: grpc.RpcMethodHandler[Any, Any] = make(
        script, request_deserializer=request.FromString, response_serializer=_bytes
    )
    return handler


def _bytes(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


@dataclass
class Session:
    """What became of the events of a session: FATES[i] of event number i + 1 is "" for one that is
    delivered, "filtered", or the stage of a loss. Batches cover BATCH numbers each."""

    fates: Sequence[str]
    batch: int = 7
    lost_in_kernel: int = 0
    after: list[int] = field(default_factory=list)  # what each call asked for

    def messages(self, after_seq: int) -> list[pb.EbpfEventBatch]:
        """What a call that resumes after that number is sent, to the end."""
        self.after.append(after_seq)
        account = pb.StreamAccount()
        made: list[pb.EbpfEventBatch] = []
        for first in range(after_seq, len(self.fates), self.batch):
            numbers = range(first, min(first + self.batch, len(self.fates)))
            rows = [n + 1 for n in numbers if not self.fates[n]]
            for fate in (self.fates[n] for n in numbers):
                self._count(account, fate)
            made.append(batch(first + 1, numbers[-1] + 1, rows, account))
        end = batch(len(self.fates) + 1, len(self.fates), (), account)
        end.end.reason = pb.SessionEnd.REASON_EXPIRED
        end.end.produced = len(self.fates)
        made.append(end)
        for message in made:
            message.produced = len(self.fates)
            message.lost_in_kernel.add(stage=pb.Loss.STAGE_KERNEL_BUFFER, count=self.lost_in_kernel)
        return made

    def _count(self, account: pb.StreamAccount, fate: str) -> None:
        if fate == "filtered":
            account.filtered += 1
        elif fate:
            stage = pb.Loss.Stage.Value(f"STAGE_{fate.upper()}")
            for loss in account.lost:
                if loss.stage == stage:
                    loss.count += 1
                    return
            account.lost.add(stage=stage, count=1)

    async def stream(
        self, request: pb.EbpfEventStreamRequest, _context: Context
    ) -> AsyncIterator[pb.EbpfEventBatch]:
        """A script of StreamEventBatches."""
        for message in self.messages(request.after_seq):
            yield message


def batch(
    first: int, last: int, rows: Sequence[int], account: pb.StreamAccount | None = None
) -> pb.EbpfEventBatch:
    """A batch whose rows end at ROWS ns, which are their numbers too."""
    return pb.EbpfEventBatch(
        kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
        first_seq=first,
        last_seq=last,
        count=len(rows),
        produced=last,
        syscall_calls=[pb.SyscallCall(ended_ns=number) for number in rows],
        account=account,
    )


@asynccontextmanager
async def cutting_proxy(
    target: str, seed: int, cut_after_s: tuple[float, float], longer_by: float = 1.0
) -> AsyncIterator[str]:
    """A proxy on loopback for TARGET (`unix:PATH` or `HOST:PORT`) that cuts each connection, in the
    middle of whatever passes, a random time after it was accepted. Its address. With LONGER_BY over
    1, each lives longer than the one before by that factor: however slow the machine, one of them
    lives long enough for some progress."""
    chance, scale = random.Random(seed), 1.0
    tasks: set[asyncio.Task[None]] = set()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal scale
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        lives_s = chance.uniform(*cut_after_s) * scale
        scale *= longer_by
        upward = await _connect(target)
        ways = [
            asyncio.create_task(_pump(reader, upward[1])),
            asyncio.create_task(_pump(upward[0], writer)),
        ]
        try:
            await asyncio.wait(ways, timeout=lives_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in (writer, upward[1]):
                end.transport.abort()
            tasks.discard(task)

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    try:
        yield "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _connect(target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if target.startswith("unix:"):
        return await asyncio.open_unix_connection(target.removeprefix("unix:"))
    host, _, port = target.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
