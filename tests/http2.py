"""A client of HTTP/2 that keeps to no rule but the formats of frames (RFC 9113) and of headers (RFC
7541): what an unkind caller of gRPC would use."""

from __future__ import annotations

import socket
import struct
from typing import Final, Self

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 0x1, 0x1, 0x4
_FIRST_DYNAMIC: Final = 62
_LITERAL: Final = 0x40  # with incremental indexing, and a new name


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """One frame."""
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload


def message(payload: bytes) -> bytes:
    """A message of gRPC, not compressed."""
    return b"\0" + len(payload).to_bytes(4, "big") + payload


class Http2:
    """One connection, to HOST:PORT or unix:PATH."""

    def __init__(self, address: str) -> None:
        if address.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            self.socket = socket.create_connection((host, int(port)))
        self._next_stream = 1
        self._tables: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def greet(self, *, window_bytes: int | None = None) -> Self:
        """The preface and the first SETTINGS, with the window that streams begin with."""
        settings = b"" if window_bytes is None else struct.pack(">HI", 4, window_bytes)
        self.socket.sendall(PREFACE + frame(SETTINGS, payload=settings))
        return self

    def wait_for_headers(self, streams: int) -> None:
        """Reads until the answers to that many streams have begun."""
        self.socket.settimeout(10)
        received = b""
        while streams:
            received += self.socket.recv(65_536)
            while len(received) >= (size := 9 + int.from_bytes(received[:3], "big")):
                streams -= received[3] == HEADERS
                received = received[size:]

    def begin(self, path: str, payload: bytes | None = b"", *, end: bool = True) -> bytes:
        """The frames of a call of PATH with one request, or with none where PAYLOAD is None."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self.stream = stream
        last = END_STREAM if end else 0
        head = END_HEADERS | (last if payload is None else 0)
        frames = frame(HEADERS, head, stream, self._headers(path))
        if payload is not None:
            frames += frame(DATA, last, stream, message(payload))
        return frames

    def begin_and_reset(self, path: str) -> bytes:
        """The frames of a call that is reset at once."""
        opened = self.begin(path, None, end=False)
        return opened + frame(RST_STREAM, 0, self.stream, (8).to_bytes(4, "big"))

    def _headers(self, path: str) -> bytes:
        """In full for the first call of PATH on this connection, then as indices. One PATH only."""
        headers = (
            (":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "agent"),
            ("te", "trailers"), ("content-type", "application/grpc"),
        )  # fmt: skip
        if path in self._tables:
            return self._tables[path]
        self._tables[path] = bytes(0x80 | _FIRST_DYNAMIC + at for at in range(len(headers)))[::-1]
        return b"".join(
            bytes((_LITERAL, len(name))) + name.encode() + bytes((len(value),)) + value.encode()
            for name, value in headers
        )

    def received(self, timeout_s: float = 10.0) -> bytes:
        """Everything until the other end closes."""
        self.socket.settimeout(timeout_s)
        chunks = []
        while chunk := self.socket.recv(65_536):
            chunks.append(chunk)
        return b"".join(chunks)
