"""The HTTP server of /metrics: what it answers, and that nobody holds it up. Real sockets."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest

from coral.agent.serving import http
from coral.agent.serving.http import Headers, HttpServer, Page
from tests.scripted import until

BIG = b"x" * (8 << 20)  # more than the buffers of a connection hold


async def small(_headers: Headers) -> Page:
    return Page(b"small\n")


async def big(_headers: Headers) -> Page:
    return Page(BIG)


async def fails(_headers: Headers) -> Page:
    raise RuntimeError


@contextmanager
def serving() -> Iterator[HttpServer]:
    pages = {"/small": small, "/big": big, "/fails": fails}
    with HttpServer("127.0.0.1", 0, pages) as server:
        yield server


@asynccontextmanager
async def connected(server: HttpServer) -> AsyncIterator[socket.socket]:
    """A client's socket, which sends and reads only what a test has it send and read."""
    with socket.socket() as client:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", server.port))
        yield client


async def read_to_end(client: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    loop, got = asyncio.get_running_loop(), b""
    async with asyncio.timeout(10):
        try:
            while data := await loop.sock_recv(client, 1 << 20):
                got += data
        except ConnectionResetError:
            pass
    return got


async def ask(server: HttpServer, request: bytes) -> bytes:
    """The answer to REQUEST, on a connection of its own."""
    async with connected(server) as client:
        await asyncio.get_running_loop().sock_sendall(client, request)
        return await read_to_end(client)


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    lines = (f"{method} {path} HTTP/1.1", "Host: agent", *headers, "", "")
    return "\r\n".join(lines).encode()


@pytest.mark.parametrize(
    ("request_", "status", "body"),
    [
        (get("/small", "Connection: close"), 200, b"small\n"),
        (get("/small?name=x", "Connection: close"), 200, b"small\n"),
        (get("http://agent/small", "Connection: close"), 200, b"small\n"),
        (get("HTTP://agent:80/small?name=x", "Connection: close"), 200, b"small\n"),
        (get("http://agent", "Connection: close"), 404, None),
        (get("/small", "Connection: close", method="HEAD"), 200, b""),
        (b"GET /small HTTP/1.0\r\n\r\n", 200, b"small\n"),
        (get("/", "Connection: close"), 404, b"There are /small, /big, /fails.\n"),
        (get("/small", "Connection: close", method="PUT"), 405, b"GET and HEAD are served.\n"),
        (get("/fails", "Connection: close"), 500, b"The agent's log says why this failed.\n"),
        (get("/small", "Content-Length: 3") + b"abc", 413, None),
        (get("/small", "Transfer-Encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n", 413, None),
        (b"\x16\x03\x01\x02\x00\x01 this is TLS\r\n\r\n", 400, None),
        (get("/small", f"Long: {'x' * 9000}"), 431, None),
        (b"GET /" + b"x" * 20_000, 431, None),
    ],
)
async def test_each_request_has_its_status(
    request_: bytes, status: int, body: bytes | None
) -> None:
    with serving() as server:
        head, _, got = (await ask(server, request_)).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        if body is not None:
            assert got == body
        await until(lambda: server.connections == 0)


async def test_requests_on_one_connection_are_answered_in_turn_also_if_they_come_at_once() -> None:
    with serving() as server:
        once = get("/small") + get("/none") + get("/small", "Connection: close")
        answers = (await ask(server, once)).split(b"HTTP/1.1 ")[1:]
    assert [int(answer[:3]) for answer in answers] == [200, 404, 200]


async def test_a_request_may_begin_while_another_is_answered_and_end_after_that() -> None:
    loop = asyncio.get_running_loop()
    second = get("/small", "Connection: close")
    with serving() as server:
        async with connected(server) as client:
            await loop.sock_sendall(client, get("/small") + second[:10])
            assert (await loop.sock_recv(client, 1 << 10)).endswith(b"small\n")
            await loop.sock_sendall(client, second[10:])
            assert (await read_to_end(client)).endswith(b"small\n")


async def test_a_client_that_has_shut_its_end_down_gets_its_answer() -> None:
    with serving() as server:
        async with connected(server) as client:
            await asyncio.get_running_loop().sock_sendall(client, get("/big"))
            client.shutdown(socket.SHUT_WR)
            assert (await read_to_end(client)).endswith(BIG)
        await until(lambda: server.connections == 0)


@pytest.mark.parametrize(("descriptors", "most"), [(64, 2), (256, 8), (1024, 32)])
async def test_connections_are_fewer_where_the_process_may_have_few_descriptors(
    descriptors: int, most: int
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving() as server:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, before[1]))
        try:
            assert server.most == most
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_silent_connections_give_way_those_idle_longest_first() -> None:
    with serving() as server:
        async with connected(server) as used:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(used, get("/small"))
            assert (await loop.sock_recv(used, 1 << 10)).startswith(b"HTTP/1.1 200")
            silent = []
            for _ in range(31):
                silent.append(connected(server))
                await silent[-1].__aenter__()
            await until(lambda: server.connections == 32)
            # The one that is used again is not the one idle longest.
            await loop.sock_sendall(used, get("/small"))
            assert (await loop.sock_recv(used, 1 << 10)).startswith(b"HTTP/1.1 200")
            for _ in range(20):
                assert b" 200 " in await ask(server, get("/small", "Connection: close"))
            await loop.sock_sendall(used, get("/small"))
            assert (await loop.sock_recv(used, 1 << 10)).startswith(b"HTTP/1.1 200")
            assert server.connections <= 32
            for each in silent:
                await each.__aexit__(None, None, None)
        await until(lambda: server.connections == 0)


@pytest.mark.timed
async def test_a_slow_request_and_a_slow_reader_have_a_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_REQUEST_S", 0.3)
    monkeypatch.setattr(http, "_ANSWER_S", 0.3)
    loop = asyncio.get_running_loop()
    with serving() as server:
        async with connected(server) as drips, connected(server) as reads_nothing:
            await loop.sock_sendall(reads_nothing, get("/big"))
            began = loop.time()
            for byte in b"GET / HTTP/1.1":
                await loop.sock_sendall(drips, bytes([byte]))
            assert await read_to_end(drips) == b""
            assert 0.2 < loop.time() - began < 2
            await until(lambda: server.connections == 0)
            assert len(await read_to_end(reads_nothing)) < len(BIG)


async def test_new_connections_and_answers_have_a_rate() -> None:
    loop = asyncio.get_running_loop()
    with serving() as server:
        began = loop.time()
        for _ in range(100):
            await ask(server, get("/small", "Connection: close"))
        # The first 64 at once, then 50 a second.
        assert loop.time() - began > (100 - 64 - 1) / 50


@pytest.mark.timed
async def test_requests_that_are_aborted_cost_others_nothing() -> None:
    loop = asyncio.get_running_loop()
    with serving() as server:
        # In 1.2 s, at the rate of new connections: more than four times the rate of answers.
        for _ in range(300):
            async with connected(server) as aborts:
                await loop.sock_sendall(aborts, get("/small"))
        began = loop.time()
        assert b" 200 " in await ask(server, get("/small", "Connection: close"))
        # The turns of those that are still open, and no others.
        assert loop.time() - began < 300 / 200 + 32 / 50


async def test_a_connection_whose_client_has_left_gives_way_before_one_that_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_ANSWERS_PER_S", 1.0)
    loop = asyncio.get_running_loop()
    with serving() as server:
        server._answers.spend(http._BURST + 1.5, loop.time())
        async with connected(server) as waits:
            await loop.sock_sendall(waits, get("/small", "Connection: close"))
            await until(lambda: server.connections == 1)
            for _ in range(60):
                async with connected(server) as leaves:
                    await loop.sock_sendall(leaves, get("/small"))
            assert b" 200 " in await read_to_end(waits)


async def test_without_descriptors_it_tries_again_and_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_TRY_AGAIN_S", 0.1)
    with serving() as server:
        accept = server._socket.accept
        refused: list[bool] = []

        class Exhausted:
            def accept(self) -> object:
                if len(refused) < 3:
                    refused.append(True)
                    raise OSError(24, "Too many open files")
                return accept()

            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

        real = server._socket
        server._socket = Exhausted()  # type: ignore[assignment]
        assert b" 200 " in await ask(server, get("/small", "Connection: close"))
        assert len(refused) == 3
        server._socket = real
