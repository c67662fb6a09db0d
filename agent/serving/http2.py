"""As much of HTTP/2 (RFC 9113) as it takes to count what a client sends and which streams are open,
and to check its headers. Does no I/O."""

from __future__ import annotations

import struct
from typing import Final

from coral.agent.serving.headers import HEADERS, HeaderBlocks

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME: Final = struct.Struct(">HBBBI")  # the length in two parts, type, flags, stream
_HEADER_BYTES: Final = _FRAME.size
_DATA, _RST_STREAM, _SETTINGS, _GOAWAY = 0x0, 0x3, 0x4, 0x7
_END_STREAM: Final = 0x1
_STREAM_BITS: Final = 0x7FFF_FFFF  # the first bit is reserved, and ignored
_BYTES_FOR_A_STREAM: Final = 64  # at least, for one that has data and no end
_ENHANCE_YOUR_CALM: Final = 0xB


class NotHttp2Error(ValueError):
    """A client does not begin as HTTP/2 begins."""


class Meter:
    """Follows the frames of one client, and counts what it makes a server spend."""

    def __init__(self) -> None:
        self.greeted = False  # whether its preface and the header of its SETTINGS were seen
        self.unfinished_bytes = 0  # data of requests that have not ended: servers keep it
        self._open: dict[int, int] = {}  # the same by stream, for those that neither end has closed
        self._last_stream = 0
        self._preface_left = PREFACE
        self._header = bytearray()
        self._payload_left = 0
        self._headers = HeaderBlocks()
        self._in_headers = False  # whether the payload is part of them
        self._held = bytearray()  # of a block of headers that has not ended

    @property
    def streams(self) -> int:
        """How many streams the client has opened that neither end has closed. Each costs gRPC about
        22 KiB, even if the client never sends its request or never reads the answer."""
        return len(self._open)

    def close(self, stream: int) -> None:
        """The server has closed STREAM."""
        self.unfinished_bytes -= self._open.pop(stream, 0)

    def feed(self, data: memoryview) -> tuple[memoryview | bytes, float]:
        """The next bytes that the client sent. Returns which bytes a server may get now, and what
        they cost it, in calls. Headers are held until they are whole: when a connection breaks off,
        gRPC makes a call of what it has. Raises `NotHttp2Error` or `MalformedError`."""
        at, end, calls, passed_bytes = 0, len(data), 0.0, 0
        if self._preface_left:
            at = min(end, len(self._preface_left))
            if data[:at] != self._preface_left[:at]:
                raise NotHttp2Error("the connection does not begin with the preface of HTTP/2")
            self._preface_left = self._preface_left[at:]
            passed_bytes = at
        while at < end:
            if self._payload_left:
                step = min(self._payload_left, end - at)
                self._payload_left -= step
                if self._in_headers:
                    calls += self._headers.feed(data[at : at + step])
                at += step
            else:
                step = min(_HEADER_BYTES - len(self._header), end - at)
                self._header += data[at : at + step]
                at += step
                if len(self._header) == _HEADER_BYTES:
                    calls += self._begin_frame(*_FRAME.unpack(self._header))
                    self._header.clear()
            if not self._headers.is_open:
                passed_bytes = at
        return self._pass(data, passed_bytes), calls

    def _pass(self, data: memoryview, passed_bytes: int) -> memoryview | bytes:
        passed: memoryview | bytes = data[:passed_bytes]
        if self._held and passed_bytes:
            passed = bytes(self._held + passed)
            self._held.clear()
        self._held += data[passed_bytes:]
        return passed

    def _begin_frame(self, high: int, low: int, kind: int, flags: int, stream: int) -> float:
        size_bytes = self._payload_left = high << 8 | low
        if not self.greeted:
            if kind != _SETTINGS:
                raise NotHttp2Error("the connection does not begin with SETTINGS")
            self.greeted = True
        stream &= _STREAM_BITS
        # gRPC ignores streams out of order, and those with the numbers of a server's.
        if kind == HEADERS and stream > self._last_stream and stream % 2:
            self._last_stream = stream
            self._open[stream] = 0
        if kind == _RST_STREAM:
            self.close(stream)
        elif stream in self._open:
            before = self._open[stream]
            if kind in (_DATA, HEADERS) and flags & _END_STREAM:
                self._open[stream] = 0
            elif kind == _DATA:
                self._open[stream] = (before or _BYTES_FOR_A_STREAM) + size_bytes
            self.unfinished_bytes += self._open[stream] - before
        self._in_headers = self._headers.begin_frame(kind, flags, stream, size_bytes)
        calls = float(kind == HEADERS)
        return calls if size_bytes or not self._in_headers else calls + self._headers.feed(b"")


class Closings:
    """Follows the frames of a server, and finds the streams that it closes."""

    def __init__(self) -> None:
        self._skip_bytes = 0  # of the payload that has begun
        self._header = bytearray()  # of a frame, if it has begun and is not whole

    @property
    def between_frames(self) -> bool:
        """Whether everything so far is whole frames."""
        return not self._skip_bytes and not self._header

    def feed(self, data: memoryview) -> list[int]:
        """The next bytes that the server sent. Returns the streams that they close."""
        closed = []
        at, end = self._skip_bytes, len(data)
        while at < end:
            if self._header or end - at < _HEADER_BYTES:
                step = min(_HEADER_BYTES - len(self._header), end - at)
                self._header += data[at : at + step]
                at += step
                if len(self._header) < _HEADER_BYTES:
                    break
                high, low, kind, flags, stream = _FRAME.unpack(self._header)
                self._header.clear()
            else:
                high, low, kind, flags, stream = _FRAME.unpack_from(data, at)
                at += _HEADER_BYTES
            at += high << 8 | low
            if kind == _RST_STREAM or (flags & _END_STREAM and kind in (_DATA, HEADERS)):
                closed.append(stream)
        self._skip_bytes = at - end
        return closed


def goaway(reason: str) -> bytes:
    """The bytes of a server that accepts no stream and closes: its SETTINGS, and a GOAWAY with the
    reason, which clients show."""
    debug = reason.encode("ascii", "replace")
    payload = struct.pack(">II", 0, _ENHANCE_YOUR_CALM) + debug
    return _frame(_SETTINGS, b"") + _frame(_GOAWAY, payload)


def _frame(kind: int, payload: bytes) -> bytes:
    high, low = divmod(len(payload), 1 << 8)
    return _FRAME.pack(high, low, kind, 0, 0) + payload
