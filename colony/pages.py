"""A small HTTP/1.1 server for pages that monitoring reads: GET and HEAD alone, one request a
connection, few connections at a time, each with a deadline; the oldest gives way to a new one, so
that clients which dawdle keep nobody out. It knows nothing of what it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11

_MOST_CONNECTIONS: Final = 32
_DEADLINE_S: Final = 10.0
_MOST_REQUEST_BYTES: Final = 8 << 10


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = "text/plain; charset=utf-8"


Pages = Mapping[str, Callable[[], Page]]
"""What makes each page, by its path. It runs on the loop."""


@asynccontextmanager
async def serving(host: str, port: int, pages: Pages) -> AsyncIterator[int]:
    """Serves PAGES for the duration of the block; the port. Raises OSError."""
    open_: dict[asyncio.Task[None], None] = {}  # in the order in which they came

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task  # noqa: S101  asyncio makes one for each connection
        open_[task] = None
        if len(open_) > _MOST_CONNECTIONS:
            next(iter(open_)).cancel()
        try:
            with suppress(OSError, TimeoutError, h11.ProtocolError):
                async with asyncio.timeout(_DEADLINE_S):
                    await _answer(reader, writer, pages)
                    writer.close()
                    await writer.wait_closed()
        finally:
            open_.pop(task, None)
            writer.transport.abort()

    server = await asyncio.start_server(connected, host, port, limit=_MOST_REQUEST_BYTES)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in tuple(open_):
            task.cancel()
        await server.wait_closed()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pages: Pages) -> None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_REQUEST_BYTES)
    try:
        while (event := connection.next_event()) is h11.NEED_DATA:
            connection.receive_data(await reader.read(_MOST_REQUEST_BYTES))
        if not isinstance(event, h11.Request):
            return
        page = _page(event, pages)
    except h11.RemoteProtocolError:
        page = Page(b"this is no request\n", HTTPStatus.BAD_REQUEST)
    response = h11.Response(
        status_code=page.status,
        headers=[
            ("Content-Type", page.content_type),
            ("Content-Length", str(len(page.body))),
            ("Connection", "close"),
        ],
    )
    writer.write(connection.send(response) or b"")
    writer.write(connection.send(h11.Data(data=page.body)) or b"")
    await writer.drain()


def _page(request: h11.Request, pages: Pages) -> Page:
    if request.method not in (b"GET", b"HEAD"):
        return Page(b"only GET is accepted\n", HTTPStatus.METHOD_NOT_ALLOWED)
    path = request.target.decode().partition("?")[0]
    make = pages.get(path)
    if make is None:
        return Page(f"there are {', '.join(pages)}\n".encode(), HTTPStatus.NOT_FOUND)
    return make()
