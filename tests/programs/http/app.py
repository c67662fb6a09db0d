"""An ASGI application, for uvicorn: the files below $SITE, and an echo.

GET and HEAD answer with a file and its length, or with 304 to `If-Modified-Since`; POST sends the
body back, in chunks, as it comes.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SITE = Path(os.environ.get("SITE", "."))


async def app(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        answer = echo if scope["method"] == "POST" else a_file
        await answer(scope, receive, send)


async def echo(_scope: Message, receive: Receive, send: Send) -> None:
    await begin(send, 200)
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
        await send({"type": "http.response.body", "body": message["body"], "more_body": more})


async def a_file(scope: Message, _receive: Receive, send: Send) -> None:
    path = SITE / scope["path"].lstrip("/")
    if b"if-modified-since" in dict(scope["headers"]):
        await begin(send, 304)
    elif not path.is_file():
        await begin(send, 404, 0)
    else:
        body = path.read_bytes()
        await begin(send, 200, len(body))
        await send({"type": "http.response.body", "body": body})
        return
    await send({"type": "http.response.body"})


async def begin(send: Send, status: int, length: int | None = None) -> None:
    headers = [] if length is None else [(b"content-length", b"%d" % length)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
