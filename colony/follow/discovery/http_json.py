"""JSON over HTTP from Kubernetes' API server: one answer, or a stream of lines. Answers are bounded
in size and time."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import h11

from coral.wire.settings.files import read_regular

_TIMEOUT_S: Final = 10.0
_MOST_BYTES: Final = 64 << 20
_MOST_LINE_BYTES: Final = 4 << 20
_MOST_TOKEN_BYTES: Final = 64 << 10
_MOST_REASON: Final = 300
_CHUNK: Final = 64 << 10
_OK: Final = 200
_GONE: Final = 410


class HttpError(Exception):
    """The server does not answer as it should; the message is for people."""


class GoneError(HttpError):
    """The server has forgotten the version that was asked for."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server at URL. The files of the token and of the certificates that it is checked against
    are read again at each connection, because they are replaced; an empty path is for none. Without
    TLS, whoever has taken the port would get the token: it is not sent then."""

    url: str
    token_file: str = ""
    ca_file: str = ""

    async def get(self, path: str) -> Mapping[str, Any]:
        """The answer to one request, which has to be an object. Raises `HttpError`."""
        body = bytearray()
        try:
            async with asyncio.timeout(_TIMEOUT_S), self._answer(path) as chunks:
                async for chunk in chunks:
                    body += chunk
                    if len(body) > _MOST_BYTES:
                        raise HttpError(f"{self.url}: more than {_MOST_BYTES >> 20} MiB")
            answer = json.loads(body)
        except (TimeoutError, ValueError, RecursionError) as error:
            raise self._error(error) from error
        if not isinstance(answer, dict):
            raise HttpError(f"{self.url}: the answer is no object")
        return answer

    async def lines(self, path: str, idle_s: float) -> AsyncGenerator[bytes, None]:
        """Each line of an answer that goes on, until the server ends it, or says nothing for
        IDLE_S. Raises `HttpError`."""
        rest = b""
        async with self._answer(path) as chunks:
            while True:
                try:
                    async with asyncio.timeout(idle_s):
                        chunk = await anext(chunks)
                except (StopAsyncIteration, TimeoutError):
                    return
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > _MOST_LINE_BYTES:
                    raise HttpError(f"{self.url}: a line of more than {_MOST_LINE_BYTES} bytes")
                for line in lines:
                    if line.strip():
                        yield line

    @asynccontextmanager
    async def _answer(self, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The body of a successful answer, in pieces."""
        parts = urlsplit(self.url)
        host, is_tls = parts.hostname or "", parts.scheme == "https"
        headers = [("Host", parts.netloc), ("Accept", "application/json"), ("User-Agent", "coral")]
        writer: asyncio.StreamWriter | None = None
        try:
            if self.token_file and is_tls:
                token = read_regular(Path(self.token_file), _MOST_TOKEN_BYTES).decode().strip()
                headers.append(("Authorization", f"Bearer {token}"))
            context = ssl.create_default_context(cafile=self.ca_file or None) if is_tls else None
            async with asyncio.timeout(_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(
                    host, parts.port or (443 if is_tls else 80), ssl=context
                )
                connection = h11.Connection(h11.CLIENT)
                target = parts.path.rstrip("/") + path
                request = h11.Request(method="GET", target=target, headers=headers)
                writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
                events = _events(connection, reader)
                response = await anext(events)
            if not isinstance(response, h11.Response):
                raise HttpError(f"{self.url}: the server ended the connection")
            chunks = (bytes(each.data) async for each in events if isinstance(each, h11.Data))
            if response.status_code != _OK:
                raise await self._refusal(response, chunks)
            yield chunks
        except (OSError, TimeoutError, ValueError, h11.ProtocolError, StopAsyncIteration) as error:
            raise self._error(error) from error
        finally:
            if writer:
                writer.close()
                with suppress(OSError, TimeoutError):
                    async with asyncio.timeout(1.0):
                        await writer.wait_closed()

    async def _refusal(self, response: h11.Response, chunks: AsyncIterator[bytes]) -> HttpError:
        said = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(_TIMEOUT_S):
                async for chunk in chunks:
                    said += chunk
                    if len(said) > _CHUNK:
                        break
        with suppress(ValueError, AttributeError):
            said = str(json.loads(said).get("message", "")).encode()
        text = said.decode(errors="replace").strip()[:_MOST_REASON]
        words = f"{response.status_code} {response.reason.decode()}".strip()
        message = f"{self.url}: {words}{text and f': {text}'}"
        return (GoneError if response.status_code == _GONE else HttpError)(message)

    def _error(self, error: BaseException) -> HttpError:
        words = "it does not answer" if isinstance(error, TimeoutError) else str(error)
        return HttpError(f"{self.url}: {words or type(error).__name__}")


async def _events(
    connection: h11.Connection, reader: asyncio.StreamReader
) -> AsyncIterator[h11.Event]:
    """What the server sends, up to the end of its answer."""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return
        elif isinstance(event, h11.Event):
            yield event
