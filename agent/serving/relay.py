"""One client's connection: its bytes to gRPC and back, in order, with back-pressure both ways.

What one side does not take is held, at most one read, and the other side rests until it is gone: so
the only queues are the kernel's and gRPC's.
"""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final, Protocol

from coral.agent.config import Limits
from coral.agent.rate import Bucket
from coral.agent.serving.headers import MalformedError
from coral.agent.serving.http2 import Closings, Meter, NotHttp2Error, goaway
from coral.agent.serving.listening import Origin
from coral.agent.serving.tls_end import READ_BYTES, PlaintextError, TlsEnd

# Requests are small, and each read may take its peer over the rate; streams are large.
_READ_FROM_CLIENT_BYTES: Final = 4 << 10
_READ_FROM_SERVER_BYTES: Final = 128 << 10
# For a client that does not read the rest of a connection that has been closed.
_LINGER_S: Final = 2.0
AGE_GRACE_S: Final = 5.0
"""How long gRPC lets calls go on after it has told a client that its connection is too old."""
# gRPC ends a connection that is idle or too old by itself, at up to 1.1 times the limit: it varies
# the time, so that clients do not all come back at once. After this, the client ignores that.
_GRPC_JITTER: Final = 1.1
_MARGIN_S: Final = 10.0
_CALLS_FOR_A_CONNECTION: Final = 1  # which costs gRPC about as much as a call
_CALLS_FOR_AN_ACCEPT: Final = 0.2  # even if nothing comes of it
_CALLS_FOR_A_HANDSHAKE: Final = 2  # of TLS: 0.5 ms with keys of P-256, 1.2 with RSA's 2048 bits
_CALLS_AT_ONCE: Final = 0.2  # of those of a second
_UNFINISHED_BYTES: Final = 16 << 20  # of one peer's requests, which gRPC keeps until they end

# Every connection reads into it; nothing stays in it after a read.
_SCRATCH: Final = memoryview(bytearray(_READ_FROM_SERVER_BYTES))
_SCRATCH_FOR_CLIENT: Final = _SCRATCH[:_READ_FROM_CLIENT_BYTES]
_SCRATCH_FOR_TLS: Final = _SCRATCH[:READ_BYTES]
_NEEDS_TLS: Final = "this address needs TLS"
# gRPC gives up at this, and its error has the status; at a GOAWAY it would try again at once.
_NEEDS_TLS_PAGE: Final = (
    b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nThis address needs TLS.\n"
)


class Peer:
    """The connections of one peer: their number, and the rates at which they may send together."""

    def __init__(self, limits: Limits) -> None:
        self.connections = 0
        self.unfinished_bytes = 0  # of requests that have not ended
        self.streams = 0  # that are open
        bytes_per_s, calls_per_s = limits.peer_bytes_per_second, limits.peer_calls_per_second
        self._bytes = Bucket(bytes_per_s, bytes_per_s)
        self._calls = Bucket(calls_per_s, calls_per_s * _CALLS_AT_ONCE)

    def spend(self, size_bytes: int, calls: float, now_s: float) -> None:
        """Charges bytes and calls that were received."""
        self._bytes.spend(size_bytes, now_s)
        self._calls.spend(calls, now_s)

    def wait_s(self, now_s: float) -> float:
        """How long it has to wait before it may send more, in seconds."""
        return max(self._bytes.wait_s(now_s), self._calls.wait_s(now_s))

    def is_forgettable(self, now_s: float) -> bool:
        """Whether it has no connection and owes nothing."""
        return not self.connections and self._bytes.is_full(now_s) and self._calls.is_full(now_s)


class Keeper(Protocol):
    """The owner of connections, which it is informed of."""

    def dial(self, connection: Connection) -> socket.socket:
        """A new connection to gRPC for CONNECTION's bytes. Raises OSError."""

    def closed(self, connection: Connection, reason: str) -> None:
        """CONNECTION is closed; REASON is empty where one of its ends wanted that."""

    def throttle(self) -> None:
        """A connection has to wait, because its peer has sent too fast."""

    def handshake_wait_s(self, now_s: float) -> float:
        """How long a handshake of TLS has to wait for those of others; if not at all, it begins."""


class _Sink:
    """A socket that is written to. While it does not take everything, its source is paused."""

    def __init__(
        self,
        sink: socket.socket | TlsEnd,
        pause: Callable[[], None],
        resume: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        self.held = b""
        self._loop = asyncio.get_running_loop()
        self._socket = sink
        self._pause, self._resume, self._failed = pause, resume, failed

    def send(self, data: memoryview | bytes) -> None:
        """Sends DATA, and holds what the socket does not take. Never called while it holds."""
        sent = self._send(data)
        if sent < len(data):
            self.held = bytes(data[sent:])
            self._pause()
            self._loop.add_writer(self._socket, self._flush)

    def _flush(self) -> None:
        self.held = self.held[self._send(self.held) :]
        if not self.held and self._socket.fileno() >= 0:
            self._loop.remove_writer(self._socket)
            self._resume()

    def _send(self, data: memoryview | bytes) -> int:
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:  # its other end is gone, and with it the need to hold anything
            self._failed()
            return len(data)


class Connection:
    """A client that was accepted from ORIGIN. gRPC learns of it when it has greeted: `name` is then
    what gRPC takes for its address."""

    def __init__(
        self,
        client: socket.socket | TlsEnd,
        origin: Origin,
        peer: Peer,
        limits: Limits,
        keeper: Keeper,
    ) -> None:
        self.origin, self.peer, self.name = origin, peer, ""
        self.closed = False
        self.detail = ""
        """More than a reason why it was closed, for the log."""
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._shaking = client if isinstance(client, TlsEnd) else None
        self._scratch = _SCRATCH_FOR_TLS if self._shaking else _SCRATCH_FOR_CLIENT
        self._server: socket.socket | None = None
        self._limits, self._keeper = limits, keeper
        self._meter = Meter()
        self._closings = Closings()
        self._unfinished_bytes = self._streams = 0  # this connection's part of its peer's
        self._reason = ""  # why it closes, while the client may still read that
        self._early = bytearray()  # what came before gRPC was dialled
        self.since_s = self._active_at_s = time.monotonic()
        self._left_at_s: float | None = None  # when gRPC closed its end
        self._rest: asyncio.TimerHandle | None = None
        self._to_server: _Sink | None = None
        self._to_client = _Sink(client, self._pause_server, self._resume_server, self.close)
        peer.connections += 1
        peer.spend(0, _CALLS_FOR_AN_ACCEPT, self.since_s)
        self._read_client_by(self._begin_tls if self._shaking else self._from_client)

    @property
    def greeted(self) -> bool:
        """Whether the client has begun HTTP/2."""
        return self._meter.greeted

    def overdue(self, now_s: float) -> str:
        """Why the connection has to be closed by now; empty where it need not be."""
        limits = self._limits
        not_read = self._rest or (self._to_server and self._to_server.held)
        # uvloop calls no reader for a socket that was reset, and one that has to wait has none.
        if _hung_up(self._client, select.POLLRDHUP if not_read else 0):
            self.close()
            return ""
        held = self._left_at_s is None and self._to_client.held
        if held and self._server and _hung_up(self._server):
            self._left_at_s = now_s
        if self._left_at_s is not None:
            return "unread" if now_s > self._left_at_s + _LINGER_S else ""
        if self.origin.certificate and time.time() > self.origin.certificate.not_after_s:
            return "certificate"
        if not self._meter.greeted:
            return "handshake" if now_s > self.since_s + limits.connection_handshake else ""
        if now_s > self._active_at_s + _GRPC_JITTER * limits.connection_idle + _MARGIN_S:
            return "idle"
        age_s = _GRPC_JITTER * limits.connection_age + AGE_GRACE_S + _MARGIN_S
        return "age" if now_s > self.since_s + age_s else ""

    def close(self, reason: str = "") -> None:
        """Closes both ends at once, whatever is being written. Safe to call twice."""
        if self.closed:
            return
        self.closed = True
        if self._rest:
            self._rest.cancel()
        self._forget(self._client)
        if self._server:
            self._forget(self._server)
        self._count(0, 0)
        self.peer.connections -= 1
        self._keeper.closed(self, self._reason or reason)

    def _forget(self, end: socket.socket | TlsEnd) -> None:
        self._loop.remove_reader(end)
        self._loop.remove_writer(end)
        end.close()

    # The handshake of TLS, if there is one.

    def _begin_tls(self) -> None:
        """The client has sent something: waits for its turn. The connection's deadline stands."""
        now_s = time.monotonic()
        if self._has_to_wait(now_s, self._begin_tls):
            return
        if wait_s := self._keeper.handshake_wait_s(now_s):
            self._pause_client()
            self._rest = self._loop.call_later(wait_s, self._read_client_by, self._begin_tls)
            return
        self.peer.spend(0, _CALLS_FOR_A_HANDSHAKE, now_s)
        self._read_client_by(self._shake)
        self._shake()

    def _shake(self) -> None:
        assert self._shaking  # noqa: S101  nothing else calls it
        try:
            over = self._shaking.shake()
            certificate = self._shaking.certificate() if over else None
        except PlaintextError:
            self._shaking.send_raw(_NEEDS_TLS_PAGE)
            self._give_up(_NEEDS_TLS)
            return
        except ssl.SSLError as error:
            self._give_up(_words(error))
            return
        except OSError:
            self.close()
            return
        if not over:
            if self._shaking.is_writing:
                self._loop.add_writer(self._shaking, self._shake)
            else:
                self._loop.remove_writer(self._shaking)
            return
        if certificate:
            address, names = self.origin.address, certificate.names
            self.origin = replace(
                self.origin,
                address=f"{address}, {names[0]}" if names else address,
                names=names,
                certificate=certificate,
            )
        self._loop.remove_writer(self._shaking)
        self._shaking = None
        self._read_client()

    def _give_up(self, why: str) -> None:
        """The client is let read why: an alert that OpenSSL has sent, or a page."""
        self._reason, self.detail = "tls", why
        self._leave()

    # From the client to gRPC.

    def _read_client(self) -> None:
        self._read_client_by(self._from_client)

    def _read_client_by(self, reader: Callable[[], None]) -> None:
        self._rest = None
        self._loop.add_reader(self._client, reader)

    def _pause_client(self) -> None:
        self._loop.remove_reader(self._client)

    def _has_to_wait(self, now_s: float, reader: Callable[[], None]) -> bool:
        """Whether the peer has sent too fast; READER then reads the client again in time."""
        wait_s = self.peer.wait_s(now_s)
        if not wait_s:
            return False
        self._keeper.throttle()
        self._pause_client()
        self._rest = self._loop.call_later(wait_s, self._read_client_by, reader)
        return True

    def _from_client(self) -> None:
        now_s = time.monotonic()
        if self._has_to_wait(now_s, self._from_client):
            return
        data = _read(self._client, self._scratch)
        if data is None:
            return
        if not data:
            self.close()
            return
        self._active_at_s = now_s
        try:
            passed, calls = self._meter.feed(data)
        except NotHttp2Error:
            self.close("not_http2")
            return
        except MalformedError as error:
            self.peer.spend(len(data), error.calls, now_s)
            self.close("malformed")
            return
        self.peer.spend(len(data), calls, now_s)
        self._count(self._meter.unfinished_bytes, self._meter.streams)
        if self.peer.unfinished_bytes > _UNFINISHED_BYTES:
            self.close("unfinished")
        elif self.peer.streams > self._limits.http2_streams_per_peer:
            self._refuse_streams()
        elif self._to_server:
            self._to_server.send(passed)
        else:
            self._early += passed
            if self._meter.greeted:
                self._dial(now_s)

    def _count(self, unfinished_bytes: int, streams: int) -> None:
        self.peer.unfinished_bytes += unfinished_bytes - self._unfinished_bytes
        self.peer.streams += streams - self._streams
        self._unfinished_bytes, self._streams = unfinished_bytes, streams

    def _refuse_streams(self) -> None:
        """Closes the connection, and informs the client of the limit if it reads."""
        self._reason = "http2_streams_per_peer"
        most, whose = self._limits.http2_streams_per_peer, self.origin.principal
        if self._closings.between_frames and not self._to_client.held:
            self._to_client.send(
                goaway(f"limits.http2_streams_per_peer is {most}, and {whose} has as many")
            )
        self._count(0, 0)
        self._leave()

    def _dial(self, now_s: float) -> None:
        self.peer.spend(0, _CALLS_FOR_A_CONNECTION, now_s)
        try:
            server = self._server = self._keeper.dial(self)
        except OSError:
            self.close("unreachable")
            return
        self._to_server = _Sink(server, self._pause_client, self._read_client, _ignore)
        self._resume_server()
        early, self._early = bytes(self._early), bytearray()
        self._to_server.send(early)

    # From gRPC to the client.

    def _pause_server(self) -> None:
        if self._server:
            self._loop.remove_reader(self._server)

    def _resume_server(self) -> None:
        if self._server:
            self._loop.add_reader(self._server, self._from_server)

    def _from_server(self) -> None:
        data = _read(self._server, _SCRATCH) if self._server else None
        if data is None:
            return
        if data:
            self._active_at_s = time.monotonic()
            for stream in self._closings.feed(data):
                self._meter.close(stream)
            self._count(self._meter.unfinished_bytes, self._meter.streams)
            self._to_client.send(data)
        else:
            self._leave()

    def _leave(self) -> None:
        """Everything that is to be sent has been passed on. A close with unread bytes of the
        client's would reset the connection, and with it what the client has not read."""
        if self.closed:
            return
        self._left_at_s = self._left_at_s or time.monotonic()
        if self._rest:
            self._rest.cancel()
        if self._server:
            self._forget(self._server)
            self._server = None
        with suppress(OSError):
            self._client.shutdown(socket.SHUT_WR)
        self._loop.add_reader(self._client, self._discard)

    def _discard(self) -> None:
        now_s = time.monotonic()
        if self._has_to_wait(now_s, self._discard):
            return
        data = _read(self._client, _SCRATCH)
        if data is None:
            return
        self.peer.spend(len(data), 0, now_s)
        if not data:
            self.close()


def _words(error: ssl.SSLError) -> str:
    """Why a handshake failed."""
    verify = getattr(error, "verify_message", "")
    return verify or (error.reason or str(error)).lower().replace("_", " ")


def _hung_up(end: socket.socket | TlsEnd, events: int = 0) -> bool:
    """Whether the other end is gone, without reading what it has sent."""
    poll = select.poll()
    poll.register(end, events)
    return bool(poll.poll(0))


def _ignore() -> None:
    """gRPC has closed its end; what it sent before is still to be read."""


def _read(source: socket.socket | TlsEnd, scratch: memoryview) -> memoryview | None:
    """The next bytes of SOURCE, in SCRATCH; empty at its end, None where there is nothing yet."""
    try:
        return scratch[: source.recv_into(scratch)]
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:
        return scratch[:0]
