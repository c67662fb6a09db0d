"""A small HTTP/1.1 server on the event loop, for pages that monitoring reads: GET and HEAD alone.

Nobody can hold it up: connections are bounded in number, those idle longest are closed first, and
each has a deadline to send a request and to read the answer. New connections and answers that cost
something have a rate, so that callers in a loop do not take the loop from others. It knows nothing
of what it serves; h11 knows the protocol.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import select
import socket
import ssl
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Protocol, Self, cast

import h11
import structlog

from coral.agent.rate import Bucket

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.http")

_MOST_CONNECTIONS: Final = 32
_DESCRIPTORS_FOR_EACH: Final = 32  # where the process may have few, the rest needs them more
_MOST_REQUEST_BYTES: Final = 8 << 10
_REQUEST_S: Final = 5.0  # from the connection, or the first byte of a further request, to its end
_IDLE_S: Final = 120.0  # between requests: Prometheus keeps its connection
_ANSWER_S: Final = 10.0  # for the reader to take the answer
_BACKLOG: Final = 1024
_ACCEPTED_PER_S: Final = 200.0
_ANSWERS_PER_S: Final = 50.0
_BURST: Final = 64
_TRY_AGAIN_S: Final = 1.0
_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Guard(Protocol):
    """Decides who may read pages."""

    @property
    def context(self) -> ssl.SSLContext | None:
        """What new connections are encrypted with; None: they are not."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What every answer has, too."""

    async def refusal(self, headers: Headers, certificate: Mapping[str, Any]) -> Page | None:
        """The answer to a request with HEADERS that may not have the page, from a client with
        CERTIFICATE, as Python's ssl has it."""


Headers = Mapping[bytes, bytes]
Handler = Callable[[Headers], Awaitable[Page]]


class HttpServer:
    """Serves PAGES by path at an address. Use it as a context manager."""

    def __init__(
        self, host: str, port: int, pages: Mapping[str, Handler], guard: Guard | None = None
    ) -> None:
        """Binds the address. Raises OSError."""
        self.pages = pages
        self.guard = guard
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self._socket = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
        except OSError:
            self._socket.close()
            raise
        self.port = int(self._socket.getsockname()[1])
        self._loop = asyncio.get_running_loop()
        self._accepting: asyncio.TimerHandle | None = None
        self._accepts = Bucket(_ACCEPTED_PER_S, _BURST)
        self._answers = Bucket(_ANSWERS_PER_S, _BURST)
        self._turn = asyncio.Lock()  # its waiters are a queue, which a closed connection leaves
        self._connections: OrderedDict[_Connection, None] = OrderedDict()  # idle longest first
        self._handshakes: set[asyncio.Task[object]] = set()

    def __enter__(self) -> Self:
        self._socket.listen(_BACKLOG)
        self._accept_later(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._accepting:
            self._accepting.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for connection in tuple(self._connections):
            connection.abort()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    @property
    def most(self) -> int:
        """How many there may be."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors == resource.RLIM_INFINITY:
            return _MOST_CONNECTIONS
        return min(_MOST_CONNECTIONS, max(2, descriptors // _DESCRIPTORS_FOR_EACH))

    def _accept_later(self, wait_s: float) -> None:
        self._loop.remove_reader(self._socket)
        self._accepting = self._loop.call_later(
            wait_s, self._loop.add_reader, self._socket, self._accept
        )

    def _accept(self) -> None:
        """Accepts one connection; the loop calls again while there are more."""
        try:
            accepted, _ = self._socket.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._make_room(len(self._connections) // 2)
                self._accept_later(_TRY_AGAIN_S)
            return  # the client has left again
        self._make_room(self.most - 1)
        now_s = self._loop.time()
        self._accepts.spend(1, now_s)
        if wait_s := self._accepts.wait_s(now_s):
            self._accept_later(wait_s)
        accepted.setblocking(False)
        connection = _Connection(self, self._loop)
        self._connections[connection] = None
        context = self.guard.context if self.guard else None
        task = self._loop.create_task(
            self._loop.connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=context,
                ssl_handshake_timeout=_REQUEST_S if context else None,
                ssl_shutdown_timeout=_REQUEST_S if context else None,
            )
        )
        if context:
            connection.handshake = task
        self._handshakes.add(task)
        task.add_done_callback(self._on_accepted)

    def _on_accepted(self, task: asyncio.Task[object]) -> None:
        self._handshakes.discard(task)
        if not task.cancelled() and task.exception():  # the client has left; nothing to be told
            return

    def _make_room(self, most: int) -> None:
        """Closes connections until MOST are left: first those that have been idle longest, then
        those whose client has closed its end."""
        while len(self._connections) > most:
            idle = (c for c in self._connections if not c.answering)
            abandoned = (c for c in self._connections if c.client_has_closed())
            next(chain(idle, abandoned, self._connections)).abort()

    def used(self, connection: _Connection) -> None:
        """CONNECTION has sent a request: it is idle from now on."""
        if connection in self._connections:
            self._connections.move_to_end(connection)

    def left(self, connection: _Connection) -> None:
        """CONNECTION is closed."""
        self._connections.pop(connection, None)

    async def answer(self, request: h11.Request, certificate: Mapping[str, Any]) -> Page:
        """The page for REQUEST, when it is its turn, of a client with CERTIFICATE. A request that
        is cancelled before then has cost others nothing."""
        async with self._turn:
            if wait_s := self._answers.wait_s(self._loop.time()):
                await asyncio.sleep(wait_s)
            self._answers.spend(1, self._loop.time())
        refused = self.guard and await self.guard.refusal(dict(request.headers), certificate)
        if refused:
            return refused
        path = _path(request.target.decode("ascii", "replace"))
        handler = self.pages.get(path)
        if handler is None:
            return Page(f"There are {', '.join(self.pages)}.\n".encode(), 404)
        if request.method not in (b"GET", b"HEAD"):
            return Page(b"GET and HEAD are served.\n", 405, {"Allow": "GET, HEAD"})
        try:
            return await handler(dict(request.headers))
        except Exception:
            log.exception("page failed unexpectedly", path=path)
            return Page(b"The agent's log says why this failed.\n", 500)


def _path(target: str) -> str:
    """The path of a request's TARGET, which may be a whole URL, RFC 9112, 3.2.2."""
    path = target.partition("?")[0]
    if path.lower().startswith(("http://", "https://")):
        path = "/" + "".join(path.split("/", 3)[3:])
    return path


class _Connection(asyncio.Protocol):
    """One connection: a request, its answer, and again."""

    def __init__(self, server: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self.answering = False
        self.handshake: asyncio.Task[object] | None = None
        """Of TLS; until it is over, there is no transport."""
        self._server = server
        self._loop = loop
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MOST_REQUEST_BYTES)
        self._request: h11.Request | None = None
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._aborted = self._idle = self._last = False
        self._early = b""
        self._request_bytes = 0
        self._drained = asyncio.Event()
        self._drained.set()
        self._deadline = loop.call_later(_REQUEST_S, self.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is of a class of its own
        self._transport.set_write_buffer_limits(0)  # an answer is taken when all of it is
        if self._aborted:
            self._transport.abort()

    def connection_lost(self, _error: Exception | None) -> None:
        """It is closed."""
        self._deadline.cancel()
        self._server.left(self)
        self._drained.set()
        if self._task:
            self._task.cancel()

    def client_has_closed(self) -> bool:
        """Whether the client has closed its end, at least to send. Nothing is read meanwhile that
        would tell."""
        if not self._transport:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket"), select.POLLRDHUP)
        return bool(poll.poll(0))

    def abort(self) -> None:
        """Closes it at once."""
        self._aborted = True
        self._deadline.cancel()
        self._server.left(self)
        if self._transport:
            self._transport.abort()
        elif self.handshake:
            self.handshake.cancel()

    def pause_writing(self) -> None:
        """The reader has not taken all yet."""
        self._drained.clear()

    def resume_writing(self) -> None:
        """The reader has taken all."""
        self._drained.set()

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        if self.answering:  # it was sent before reading was paused
            self._early += data
            return
        if self._idle:
            self._idle = False
            self._limit(_REQUEST_S)
        self._request_bytes += len(data)
        try:
            if self._request_bytes > _MOST_REQUEST_BYTES:
                raise h11.RemoteProtocolError(
                    f"a request of more than {_MOST_REQUEST_BYTES} bytes is not accepted", 431
                )
            if data:  # h11 takes nothing for the end
                self._http.receive_data(data)
            self._read()
        except h11.RemoteProtocolError as error:
            self._last = True
            self._start(Page(f"{error}\n".encode(), error.error_status_hint))

    def eof_received(self) -> bool:
        """The client sends no more, but may still read."""
        self._last = True
        return self.answering and not self.handshake  # TLS is closed in both directions

    def _limit(self, within_s: float) -> None:
        self._deadline.cancel()
        self._deadline = self._loop.call_later(within_s, self.abort)

    def _read(self) -> None:
        """Reads to the end of a request. Raises RemoteProtocolError."""
        while not self.answering:
            event = self._http.next_event()
            if isinstance(event, h11.Request):
                self._request = event
            elif isinstance(event, h11.Data):
                raise h11.RemoteProtocolError("a request with a body is not accepted", 413)
            elif isinstance(event, h11.EndOfMessage):
                self._start(None)
                return
            else:
                return  # more is to come

    def _start(self, page: Page | None) -> None:
        """Answers with PAGE, or with the one that was asked for."""
        if self._task is None and self._transport:
            self._transport.pause_reading()
            self._server.used(self)
            self.answering = True
            self._limit(_ANSWER_S)
            self._task = self._loop.create_task(self._answer(page))

    async def _answer(self, page: Page | None) -> None:
        assert self._transport  # noqa: S101  it is open
        if page is None:
            assert self._request  # noqa: S101  it is read
            certificate = self._transport.get_extra_info("peercert") or {}
            page = await self._server.answer(self._request, certificate)
        self._send(page)
        await self._drained.wait()
        self.answering, self._task, self._request = False, None, None
        if self._last or set(self._http.states.values()) != {h11.DONE}:
            self._limit(_REQUEST_S)
            self._transport.close()
            return
        self._http.start_next_cycle()
        self._idle = True
        self._limit(_IDLE_S)
        self._server.used(self)
        self._transport.resume_reading()
        self._request_bytes, early, self._early = 0, self._early, b""
        if early or self._http.trailing_data[0]:
            self.data_received(early)

    def _send(self, page: Page) -> None:
        assert self._transport  # noqa: S101  it is open
        headers = {
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(len(page.body)),
            **(self._server.guard.headers if self._server.guard else {}),
            **page.headers,
        }
        if self._last:
            headers["Connection"] = "close"
        response = h11.Response(status_code=page.status, headers=list(headers.items()))
        is_head = self._request is not None and self._request.method == b"HEAD"
        events = (response, *(() if is_head else (h11.Data(page.body),)), h11.EndOfMessage())
        self._transport.writelines([self._http.send(event) or b"" for event in events])
