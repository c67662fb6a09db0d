"""The agent's end of one TLS connection: bytes in, bytes out. Does no I/O.

OpenSSL gets no socket, only what was read: on a socket of its own it would go on for as long as a
client sends records without data, such as key updates, and nobody else would have a turn. What is
trusted is decided by a `Rotation`.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any, Final

from coral.agent.serving.certificates import Certificate, certificate_of
from coral.agent.serving.rotation import Rotation

OPENED_BYTES: Final = 64 << 10
"""Room for what `open` may return: the data of a record that had begun, RFC 8446, 5.1, and of as
many bytes as are given to it, if those are at most 40 KiB."""
_HANDSHAKE: Final = 0x16  # the first byte of TLS, RFC 8446, 5.1


class PlaintextError(Exception):
    """The client does not speak TLS."""


class TlsSession:
    """A connection, with the credentials that ROTATION has at its beginning."""

    def __init__(self, rotation: Rotation) -> None:
        self.is_open = False
        """Whether the handshake is over."""
        self.ended = False
        """Whether the client has said that it sends no more."""
        self._rotation = rotation
        self._credentials = rotation.current
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = self._credentials.context.wrap_bio(
            self._incoming, self._outgoing, server_side=True
        )
        self._has_begun = False

    def shake(self, data: memoryview) -> bool:
        """Goes on with the handshake, with the DATA that the client has sent; whether it is over.
        `to_send` has the answer, also where this raises SSLError. Raises `PlaintextError` where
        the first byte is not one of TLS."""
        if not self._has_begun and data[0] != _HANDSHAKE:
            raise PlaintextError
        self._has_begun = True
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        self.is_open = True
        return True

    def certificate(self) -> Certificate | None:
        """The client's, after the handshake, if it has sent one. Raises SSLError where it is
        trusted no more since the handshake began."""
        found = self._tls.getpeercert()
        if not found:
            return None
        certificate = certificate_of(found, self._tls.version() or "", _verified_chain(self._tls))
        if why := self._rotation.current.distrusted_since(self._credentials).reason(certificate):
            raise ssl.SSLError(0, why)
        return certificate

    def open(self, data: memoryview, into: memoryview) -> memoryview:
        """Decrypts DATA into INTO, of `OPENED_BYTES`; returns the part of it that was filled, which
        may be empty. Raises SSLError."""
        self._incoming.write(data)
        size_bytes = 0
        with suppress(ssl.SSLWantReadError):
            while count := self._tls.read(len(into), into[size_bytes:]):  # of one record
                size_bytes += int(count)
            self.ended = True
        return into[:size_bytes]

    def seal(self, data: memoryview | bytes) -> bytes:
        """DATA, encrypted, after what else is to be sent."""
        left, done = memoryview(data), 0
        while done < len(left):  # OpenSSL takes one record at a time
            done += self._tls.write(left[done:])
        return self._outgoing.read()

    def to_send(self) -> bytes:
        """What has to be sent for the sake of TLS itself: handshakes, alerts, key updates."""
        return self._outgoing.read() if self._outgoing.pending else b""

    def close(self) -> bytes:
        """The bytes that tell the client that nothing was cut off, RFC 8446, 6.1."""
        with suppress(ssl.SSLError, ValueError):
            self._tls.unwrap()
        return self.to_send()


def _verified_chain(connection: ssl.SSLObject) -> list[bytes]:
    """The client's certificate and those that it was verified by, in DER."""
    if hasattr(connection, "get_verified_chain"):  # Python 3.13
        return list(connection.get_verified_chain())
    inner: Any = connection._sslobj  # type: ignore[attr-defined]  # noqa: SLF001  3.10 to 3.12
    return [ssl.PEM_cert_to_DER_cert(each.public_bytes()) for each in inner.get_verified_chain()]
