"""A client's socket with TLS on it, which reads and writes like a socket that does not block.

The handshake is a step at a time, whenever the client has sent something. It knows nothing of
gRPC; what is trusted is decided by a `Rotation`.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import Any, Final

from coral.agent.serving.certificates import Certificate, certificate_of
from coral.agent.serving.rotation import Rotation

READ_BYTES: Final = 16 << 10
"""The data of one record, RFC 8446, 5.1. A reader that takes as much leaves nothing behind in
OpenSSL, where no event would tell of it: it reads record by record."""
_HANDSHAKE: Final = 0x16  # the first byte of TLS, RFC 8446, 5.1


class PlaintextError(OSError):
    """The client does not speak TLS."""


class TlsEnd:
    """The accepted socket CLIENT, with the credentials that ROTATION has now."""

    def __init__(self, client: socket.socket, rotation: Rotation) -> None:
        """Takes over CLIENT. Raises OSError where it is gone."""
        self._rotation = rotation
        self._credentials = rotation.current
        self._socket = self._credentials.context.wrap_socket(
            client, server_side=True, do_handshake_on_connect=False
        )
        self._is_raw = self._has_begun = False
        self.is_writing = False
        """Whether the handshake goes on when the socket can be written."""

    def fileno(self) -> int:
        """As of a socket."""
        return self._socket.fileno()

    def shake(self) -> bool:
        """Goes on with the handshake; whether it is over. Raises `PlaintextError`, and SSLError
        with the reason, of which the client was informed by an alert."""
        if not self._speaks_tls():
            return False
        self.is_writing = False
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:
            self.is_writing = True
            return False
        return True

    def _speaks_tls(self) -> bool:
        """Whether something has come. Raises ConnectionResetError where the client has left,
        and `PlaintextError` where what came does not begin as TLS."""
        if self._has_begun:
            return True
        try:
            first = socket.socket.recv(self._socket, 1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        if not first:
            raise ConnectionResetError("the client has left")
        if first[0] != _HANDSHAKE:
            raise PlaintextError("the client does not speak TLS")
        self._has_begun = True
        return True

    def certificate(self) -> Certificate | None:
        """The client's, after the handshake, if it has sent one. Raises SSLError where it was
        verified by an authority that is trusted no more."""
        found = self._socket.getpeercert()
        if not found:
            return None
        version = self._socket.version() or ""
        certificate = certificate_of(found, version, _verified_chain(self._socket))
        removed = self._credentials.authorities - self._rotation.current.authorities
        if certificate.chain & removed:
            raise ssl.SSLError("the authority that signed the certificate is trusted no more")
        return certificate

    def recv_into(self, buffer: memoryview) -> int:
        """As of a socket that does not block."""
        if self._is_raw:
            return socket.socket.recv_into(self._socket, buffer)
        try:
            return self._socket.recv_into(buffer)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            raise BlockingIOError from error

    def send(self, data: memoryview | bytes) -> int:
        """As of a socket that does not block. What it did not take has to be sent next, the same
        bytes and all of them: a part of them is in a record already."""
        left, sent = memoryview(data), 0
        try:
            while sent < len(data):  # OpenSSL takes one record at a time
                sent += self._socket.send(left[sent:])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            if not sent:
                raise BlockingIOError from error
        return sent

    def send_raw(self, data: bytes) -> None:
        """Sends DATA without TLS, to a client that does not speak it."""
        with suppress(OSError):
            socket.socket.send(self._socket, data)

    def shutdown(self, how: int) -> None:
        """As of a socket. What comes from now on is read as it is. Raises OSError."""
        self._is_raw = True
        with suppress(OSError, ValueError):
            self._socket.unwrap()  # tells the client that nothing was cut off, RFC 8446, 6.1
        socket.socket.shutdown(self._socket, how)

    def close(self) -> None:
        """As of a socket."""
        self._socket.close()


def _verified_chain(connection: ssl.SSLSocket) -> list[bytes]:
    """The client's certificate and those that it was verified by, in DER."""
    if hasattr(connection, "get_verified_chain"):  # Python 3.13
        return list(connection.get_verified_chain())
    inner: Any = connection._sslobj  # type: ignore[attr-defined]  # noqa: SLF001  3.10 to 3.12
    return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in inner.get_verified_chain()]
