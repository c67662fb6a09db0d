"""The gate before gRPC, which by itself accepts every connection: here the agent's own listeners
accept, within limits, and relay bytes to gRPC.

TCP and unix sockets have a side of the gate each, with a gRPC server behind it, so that callers of
one cannot use up what the other needs.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import structlog

from coral.agent.caller import Trust
from coral.agent.config import Limits
from coral.agent.rate import Bucket
from coral.agent.serving.certificates import Distrusted
from coral.agent.serving.counts import STALLED, ConnectionCounts
from coral.agent.serving.http2 import goaway
from coral.agent.serving.listening import Listener, Origin
from coral.agent.serving.peer import Peer
from coral.agent.serving.relay import Connection
from coral.agent.serving.tls_session import TlsSession
from coral.agent.serving.upstream import peer_of

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.gate")

_ACCEPTS_AT_ONCE: Final = 16
# A listener's pause after it refused connections, or could not accept one.
_REFUSED_PAUSE_S: Final = 0.02
_EXHAUSTED_PAUSE_S: Final = 0.5
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
# A connection takes three: the client's, and both ends of the one to gRPC. One side may take a
# quarter of all, so that both leave room for sessions. TCP, which every user reaches, may take a
# quarter of what the agent's own files and those of its sessions leave.
_DESCRIPTORS_EACH: Final = 3
_SIDES_PART: Final = 4
_DESCRIPTORS_OF_AGENT: Final = 160  # with those of the hubs that its sessions share
_DESCRIPTORS_OF_SESSION: Final = 16
_MOST_DESCRIPTORS: Final = 1 << 16
_TICK_S: Final = 1.0
# Handshakes of TLS, whoever they are with: an eighth of a CPU with keys of P-256, a quarter with
# RSA's 2048 bits. Those beyond wait, and the calls of others go on.
_HANDSHAKES_PER_S: Final = 200.0
_HANDSHAKES_AT_ONCE: Final = 20.0
_UNGREETED_PART: Final = 2  # of the connections over TLS, those that may not have begun HTTP/2


def use_all_descriptors() -> None:
    """Raises this process's limit of open files as far as it may: services often start with 1,024,
    for the sake of select(2), which the agent does not use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Side:
    """The connections to all LISTENERS of one kind, within LIMITS, counted in COUNTS. DIAL makes a
    connection to the gRPC server behind it."""

    def __init__(
        self,
        listeners: Sequence[Listener],
        dial: Callable[[], socket.socket],
        limits: Limits,
        counts: ConnectionCounts,
    ) -> None:
        self.listeners = listeners
        self.connections: set[Connection] = set()
        self._counts = counts
        self._dial, self._limits = dial, limits
        self._peers: dict[str, Peer] = {}
        self._names: dict[str, Connection] = {}
        self._loop = asyncio.get_running_loop()
        self._pauses: dict[socket.socket, asyncio.TimerHandle] = {}
        self._ticking: asyncio.TimerHandle | None = None
        self._change = asyncio.Event()  # a connection was closed
        self._handshakes = Bucket(_HANDSHAKES_PER_S, _HANDSHAKES_AT_ONCE)

    def open(self) -> None:
        """Accepts from now on."""
        for listener in self.listeners:
            for one in listener.sockets:
                self._accept_from(listener, one)
        self._tick()

    def find(self, name: str) -> Connection | None:
        """The connection that gRPC calls by NAME."""
        return self._names.get(name)

    @property
    def most(self) -> int:
        """How many connections there may be."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors == resource.RLIM_INFINITY:
            return self._limits.connections
        if any(listener.kind == "tcp" for listener in self.listeners):
            sessions = self._limits.concurrent_collectors
            descriptors -= _DESCRIPTORS_OF_AGENT + sessions * _DESCRIPTORS_OF_SESSION
        room = descriptors // _SIDES_PART // _DESCRIPTORS_EACH
        return max(1, min(self._limits.connections, room))

    # Accepting.

    def _accept_from(self, listener: Listener, one: socket.socket) -> None:
        self._pauses.pop(one, None)
        self._loop.add_reader(one, self._accept, listener, one)

    def _pause(self, listener: Listener, one: socket.socket, pause_s: float) -> None:
        self._loop.remove_reader(one)
        self._pauses[one] = self._loop.call_later(pause_s, self._accept_from, listener, one)

    def _accept(self, listener: Listener, one: socket.socket) -> None:
        all_let_in = True
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                client, _ = one.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._refused("descriptors", listener.address, "", str(error.strerror))
                    self._pause(listener, one, _EXHAUSTED_PAUSE_S)
                    return
                # An error of the network that the new connection already has, accept(2).
                all_let_in = False
                break
            all_let_in &= self._let_in(listener, client)
        if not all_let_in:
            self._pause(listener, one, _REFUSED_PAUSE_S)

    def _let_in(self, listener: Listener, client: socket.socket) -> bool:
        try:
            client.setblocking(False)
            if client.family != socket.AF_UNIX:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            origin = listener.origin(client)
        except OSError:  # it is gone already
            client.close()
            return True
        peer = self._peer(origin)
        if refusal := self._refusal(origin, peer):
            limit, why = refusal
            self._refused(limit, origin.address, origin.principal, why)
            if not listener.tls:
                with suppress(OSError):
                    client.send(goaway(why))
            client.close()
            return False
        tls = None
        if listener.tls:
            self._make_room()
            tls = TlsSession(listener.tls)
        self.connections.add(Connection(client, origin, peer, self._limits, self, tls=tls))
        self._counts.open = len(self.connections)
        return True

    def _peer(self, origin: Origin) -> Peer:
        if origin.trust is Trust.OWNER:  # one program of root's does not slow another down
            return Peer(self._limits)
        peer = self._peers.get(origin.principal)
        if not peer:
            peer = self._peers[origin.principal] = Peer(self._limits)
        return peer

    def _refusal(self, origin: Origin, peer: Peer) -> tuple[str, str] | None:
        each = self._limits.connections_per_peer
        if peer.connections >= each:
            why = f"limits.connections_per_peer is {each}, and {origin.principal} has as many"
            return "connections_per_peer", why
        if len(self.connections) >= self.most:
            why = f"limits.connections is {self._limits.connections}"
            if self.most < self._limits.connections:
                why += f", of which the agent's open files leave {self.most}"
            return "connections", f"{why}; all are in use"
        return None

    def _make_room(self) -> None:
        """Over a network, connections that say nothing come from as many addresses as somebody
        likes: when they are half of all, the oldest gives way."""
        waiting = [one for one in self.connections if not one.greeted]
        if len(waiting) >= max(1, self.most // _UNGREETED_PART):
            min(waiting, key=lambda one: one.since_s).close("handshake")

    def _refused(self, limit: str, address: str, principal: str, why: str) -> None:
        self._counts.refused[limit] += 1
        log.warning("connection refused", peer=address, principal=principal, code=limit, reason=why)

    # `Keeper`, for connections.

    def dial(self, connection: Connection) -> socket.socket:
        """A new connection to gRPC for CONNECTION's bytes. Raises OSError."""
        dialled = self._dial()
        connection.name = peer_of(dialled)
        self._names[connection.name] = connection
        return dialled

    def closed(self, connection: Connection, reason: str) -> None:
        """CONNECTION is closed."""
        self.connections.discard(connection)
        self._counts.open = len(self.connections)
        self._change.set()
        if self._names.get(connection.name) is connection:
            del self._names[connection.name]
        if reason:
            self._counts.closed[reason] += 1
        if reason not in ("", STALLED):  # the log has it from those that decided it
            origin = connection.origin
            log.warning(
                "connection closed", peer=origin.address, principal=origin.principal, code=reason,
                **({"reason": connection.detail} if connection.detail else {}),
            )  # fmt: skip

    def throttle(self) -> None:
        """A connection has to wait."""
        self._counts.throttled += 1

    def handshake_wait_s(self, now_s: float) -> float:
        """How long a handshake has to wait for those of others; if not at all, it begins."""
        wait_s = self._handshakes.wait_s(now_s)
        if not wait_s:
            self._handshakes.spend(1, now_s)
        return wait_s

    def distrust(self, distrusted: Distrusted) -> None:
        """Closes the connections whose certificates are DISTRUSTED. Their clients come back with
        others."""
        for connection in tuple(self.connections):
            certificate = connection.origin.certificate
            if certificate and (why := distrusted.reason(certificate)):
                connection.detail = why
                connection.close("certificate")

    # Time.

    def _tick(self) -> None:
        # First: what fails below must not end the ticks.
        self._ticking = self._loop.call_later(_TICK_S, self._tick)
        now_s = time.monotonic()
        for connection in tuple(self.connections):
            if reason := connection.overdue(now_s):
                connection.close(reason)
        for key, peer in tuple(self._peers.items()):
            if peer.is_forgettable(now_s):
                del self._peers[key]

    def stop_accepting(self) -> None:
        """Refuses new connections from now on; those that stand are left. Safe to call twice."""
        for pause in self._pauses.values():
            pause.cancel()
        self._pauses.clear()
        for listener in self.listeners:
            for one in listener.sockets:
                if one.fileno() >= 0:
                    self._loop.remove_reader(one)
            listener.close()

    async def _until_empty(self) -> None:
        while self.connections:
            self._change.clear()
            await self._change.wait()

    async def close(self, grace_s: float) -> None:
        """Stops accepting, leaves clients GRACE_S seconds to read what was sent to them after gRPC
        has closed its connections, and then closes all that is left, whatever they do."""
        self.stop_accepting()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._until_empty()
        if self._ticking:
            self._ticking.cancel()
        for connection in tuple(self.connections):
            connection.close()
