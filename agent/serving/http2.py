"""As much of HTTP/2 (RFC 9113) as it takes to count what a client sends. Does no I/O."""

from __future__ import annotations

import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME: Final = struct.Struct(">HBBBI")  # the length in two parts, type, flags, stream
_HEADER_BYTES: Final = _FRAME.size
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _GOAWAY = 0x0, 0x1, 0x3, 0x4, 0x7
_END_STREAM: Final = 0x1
_BYTES_FOR_A_STREAM: Final = 64  # at least, for one that has data and no end
_ENHANCE_YOUR_CALM: Final = 0xB


class NotHttp2Error(ValueError):
    """A client does not begin as HTTP/2 begins."""


class Meter:
    """Follows the frames of one client, and counts what it makes a server spend."""

    def __init__(self) -> None:
        self.greeted = False  # whether its preface and the header of its SETTINGS were seen
        self.unfinished_bytes = 0  # data of streams that have not ended: servers keep it
        self._unfinished: dict[int, int] = {}  # the same by stream
        self._preface_left = PREFACE
        self._header = bytearray()
        self._payload_left = 0

    def feed(self, data: memoryview) -> int:
        """The next bytes that the client sent; returns how many streams they open. Raises
        `NotHttp2Error`."""
        at, end, opened = 0, len(data), 0
        if self._preface_left:
            at = min(end, len(self._preface_left))
            if data[:at] != self._preface_left[:at]:
                raise NotHttp2Error("the connection does not begin with the preface of HTTP/2")
            self._preface_left = self._preface_left[at:]
        while at < end:
            if self._payload_left:
                step = min(self._payload_left, end - at)
                self._payload_left -= step
                at += step
                continue
            missing = _HEADER_BYTES - len(self._header)
            self._header += data[at : at + missing]
            at += missing
            if len(self._header) == _HEADER_BYTES:
                opened += self._begin_frame(*_FRAME.unpack(self._header))
                self._header.clear()
        return opened

    def _begin_frame(self, high: int, low: int, kind: int, flags: int, stream: int) -> bool:
        size_bytes = self._payload_left = high << 8 | low
        if not self.greeted:
            if kind != _SETTINGS:
                raise NotHttp2Error("the connection does not begin with SETTINGS")
            self.greeted = True
        if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            self.unfinished_bytes -= self._unfinished.pop(stream, 0)
        elif kind == _DATA:
            before = self._unfinished.get(stream, 0)
            self._unfinished[stream] = (before or _BYTES_FOR_A_STREAM) + size_bytes
            self.unfinished_bytes += self._unfinished[stream] - before
        return kind == _HEADERS


def goaway(reason: str) -> bytes:
    """The bytes of a server that accepts no stream and closes: its SETTINGS, and a GOAWAY with the
    reason, which clients show."""
    debug = reason.encode("ascii", "replace")
    payload = struct.pack(">II", 0, _ENHANCE_YOUR_CALM) + debug
    return _frame(_SETTINGS, b"") + _frame(_GOAWAY, payload)


def _frame(kind: int, payload: bytes) -> bytes:
    high, low = divmod(len(payload), 1 << 8)
    return _FRAME.pack(high, low, kind, 0, 0) + payload
