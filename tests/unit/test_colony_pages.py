"""The pages that monitoring reads, among clients that dawdle."""

from __future__ import annotations

import asyncio

from coral.colony.pages import Page, serving


async def said(port: int, request: bytes) -> bytes:
    """All that the server answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def test_a_page_is_answered_however_many_connections_say_nothing() -> None:
    body = b"x" * (8 << 20)  # more than a socket takes of those that do not read
    async with serving(
        "127.0.0.1", 0, {"/healthz": lambda: Page(b"ok\n"), "/big": lambda: Page(body)}
    ) as port:
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        for _, writer in idle[50:]:
            writer.write(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        for _ in range(3):
            answer = await said(port, b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            assert answer.endswith(b"\r\n\r\nok\n")
        assert (await said(port, b"HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n")).endswith(
            b"\r\n\r\n"
        )
        assert (await said(port, b"nonsense\r\n\r\n")).startswith(b"HTTP/1.1 400")
        for _, writer in idle:
            writer.transport.abort()
