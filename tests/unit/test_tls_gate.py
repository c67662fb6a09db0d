"""The gate with TLS, step by step: real sockets and handshakes, gRPC's end is the test's."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coral.agent.config import ByteCount, Limits
from coral.agent.serving import gate
from coral.agent.serving.counts import ConnectionCounts
from coral.agent.serving.credentials import Source, Sources
from coral.agent.serving.gate import Side
from coral.agent.serving.listening import TcpListener
from coral.agent.serving.rotation import Rotation
from tests.certificates import Authority, distinguished
from tests.http2 import PREFACE, SETTINGS, frame
from tests.scripted import until

LIMITS = Limits(peer_bytes_per_second=ByteCount(1 << 30), peer_calls_per_second=1_000_000)
UNKNOWN = 0x77  # a type of frame that every peer has to ignore, RFC 9113, 5.5
RECORD = 16 << 10


@dataclass
class House:
    """A side of the gate, the sockets that it has dialled, and what its files are made from."""

    directory: Path
    authority: Authority = field(default_factory=Authority)
    limits: Limits = LIMITS
    grpc: list[socket.socket] = field(default_factory=list)
    counts: ConnectionCounts = field(default_factory=ConnectionCounts)

    def __post_init__(self) -> None:
        ca = self.authority.write(self.directory / "ca.crt")
        certificate, key = self.authority.sign("127.0.0.1").write(self.directory, "server")
        sources = Sources(
            Source("certificate", certificate), Source("key", key), Source("ca", ca), "require",
            ("h2",),
        )  # fmt: skip
        self.rotation = Rotation("grpc", sources)
        self.listener = TcpListener("127.0.0.1:0", "127.0.0.1", 0, self.rotation)
        self.side = Side((self.listener,), self._dial, self.limits, self.counts)
        self.rotation.changed = self.side.distrust
        self.address = self.listener.sockets[0].getsockname()

    def _dial(self) -> socket.socket:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("")  # the kernel chooses a name, unix(7)
            listening.listen()
            ours = socket.socket(socket.AF_UNIX)
            ours.bind("")
            ours.connect(listening.getsockname())
            theirs, _ = listening.accept()
        ours.setblocking(False)
        theirs.setblocking(False)
        self.grpc.append(theirs)
        return ours

    def context(
        self, *names: str, days: float = 1, authority: Authority | None = None
    ) -> ssl.SSLContext:
        """A client's, with a certificate for NAMES."""
        subject = distinguished(O="shop", CN="colony")
        pair = (authority or self.authority).sign(*names, subject=subject, days=days)
        certificate, key = pair.write(self.directory, f"client{time.monotonic_ns()}")
        context = ssl.create_default_context(cafile=self.directory / "ca.crt")
        context.load_cert_chain(certificate, key)
        context.set_alpn_protocols(["h2"])
        return context

    @asynccontextmanager
    async def client(
        self, context: ssl.SSLContext
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection that has begun HTTP/2."""
        reader, writer = await asyncio.open_connection(*self.address[:2], ssl=context)
        writer.write(PREFACE + frame(SETTINGS))
        try:
            yield reader, writer
        finally:
            writer.close()

    def again(self) -> None:
        """Reads the files again."""
        assert self.rotation.is_due()
        self.rotation.take(self.rotation.try_to_read())


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    one = House(tmp_path)
    one.side.open()
    yield one
    await one.side.close(0)
    for end in one.grpc:
        end.close()


async def test_an_origin_has_the_names_in_the_certificate(house: House) -> None:
    context = house.context("spiffe://td/ns/x", "colony.example")
    async with house.client(context):
        await until(lambda: bool(house.grpc))
        (connection,) = house.side.connections
    origin = connection.origin
    assert origin.names == (
        "spiffe://td/ns/x", "subject:CN=colony,O=shop", "dns:colony.example",
    )  # fmt: skip
    assert origin.address.endswith(", spiffe://td/ns/x")
    assert origin.certificate
    assert origin.certificate.issuer == "CN=test authority"
    assert origin.certificate.tls_version == "TLSv1.3"
    assert origin.certificate.chain >= house.rotation.current.authorities


async def test_bytes_pass_both_ways_whole_and_in_order(house: House) -> None:
    """Records of every size, with pauses of one side and of the other."""
    loop = asyncio.get_running_loop()
    async with house.client(house.context()) as (reader, writer):
        await until(lambda: bool(house.grpc))
        (grpc,) = house.grpc
        greeting = PREFACE + frame(SETTINGS)
        sent = b"".join(
            frame(UNKNOWN, payload=os.urandom(size))
            for size in (0, 1, RECORD - 9, RECORD, 5000) * 40
        )
        writer.write(sent)
        received = bytearray()
        while len(received) < len(greeting) + len(sent):
            received += await loop.sock_recv(grpc, 100_000)
        assert bytes(received) == greeting + sent
        back = frame(SETTINGS) + b"".join(
            frame(UNKNOWN, payload=os.urandom(RECORD)) for _ in range(400)
        )
        sending = asyncio.ensure_future(loop.sock_sendall(grpc, back))
        # The client does not read: what it is sent waits, at most a read of it in the gate.
        await until(lambda: bool(next(iter(house.side.connections))._to_client.held))
        assert not sending.done()
        assert await reader.readexactly(len(back)) == back
        await sending
        grpc.close()
        assert await reader.read() == b""


async def test_a_removed_authority_ends_its_connections_alone(house: House) -> None:
    other = Authority("other")
    house.authority.write(house.directory / "ca.crt", other)
    house.again()
    async with (
        house.client(house.context("a.example", authority=other)) as (theirs, _),
        house.client(house.context("b.example")) as (_, _),
    ):
        await until(lambda: len(house.grpc) == 2)
        house.authority.write(house.directory / "ca.crt")
        house.again()
        assert await theirs.read() == b""
        assert house.counts.closed["certificate"] == 1
        (left,) = house.side.connections
        assert "dns:b.example" in left.origin.names


async def test_a_handshake_that_began_before_a_removal_is_refused_after_it(house: House) -> None:
    other = Authority("other")
    house.authority.write(house.directory / "ca.crt", other)
    house.again()
    context = house.context(authority=other)
    with socket.create_connection(house.address) as plain:
        plain.setblocking(False)
        await until(lambda: bool(house.side.connections))
        house.authority.write(house.directory / "ca.crt")
        house.again()
        reader, writer = await asyncio.open_connection(
            sock=plain, ssl=context, server_hostname="127.0.0.1"
        )
        assert await reader.read() == b""
        writer.close()
    await until(lambda: house.counts.closed["tls"] == 1)
    assert not house.grpc


async def test_a_connection_ends_with_its_certificate(house: House) -> None:
    context = house.context(days=1 / 24)
    async with house.client(context):
        await until(lambda: bool(house.grpc))
        (connection,) = house.side.connections
        assert connection.overdue(time.monotonic()) == ""
        certificate = connection.origin.certificate
        assert certificate
        object.__setattr__(certificate, "not_after_s", time.time() - 1)
        assert connection.overdue(time.monotonic()) == "certificate"


async def test_those_that_say_nothing_give_way_to_new_ones(tmp_path: Path) -> None:
    limits = Limits(connections=8, connections_per_peer=8)
    house = House(tmp_path, limits=limits)
    house.side.open()
    silent = []
    for _ in range(12):
        silent.append(socket.create_connection(house.address))
        await until(lambda: len(house.side.connections) >= min(4, len(silent)))
        await asyncio.sleep(0)
    await until(lambda: house.counts.closed["handshake"] == 8)
    async with house.client(house.context()):
        await until(lambda: bool(house.grpc))
    for one in silent:
        one.close()
    await house.side.close(0)
    house.grpc[0].close()


async def test_handshakes_beyond_the_rate_wait(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_HANDSHAKES_PER_S", 0.001)
    side = Side((), house._dial, LIMITS, ConnectionCounts())
    now_s = time.monotonic()
    waits = [side.handshake_wait_s(now_s) for _ in range(23)]
    assert waits[:21] == [0.0] * 21
    assert waits[21:] == [pytest.approx(1000.0)] * 2
    assert side.handshake_wait_s(now_s + 1001) == 0.0


async def test_a_port_scan_is_no_failed_handshake(house: House) -> None:
    with socket.create_connection(house.address):
        await until(lambda: bool(house.side.connections))
    await until(lambda: not house.side.connections)
    assert not any(house.counts.closed.values())
