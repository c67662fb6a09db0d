"""As much of HTTP/2 (RFC 9113) as it takes to count what a client sends. Does no I/O."""

from __future__ import annotations

import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER_BYTES: Final = 9
_LENGTH_BYTES: Final = 3
_HEADERS, _SETTINGS, _GOAWAY = 0x1, 0x4, 0x7
_ENHANCE_YOUR_CALM: Final = 0xB


class NotHttp2Error(ValueError):
    """A client does not begin as HTTP/2 begins."""


class Meter:
    """Follows the frames of one client, and counts the streams that it opens."""

    def __init__(self) -> None:
        self.greeted = False  # whether its preface and the header of its SETTINGS were seen
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
                kind = self._header[_LENGTH_BYTES]
                opened += kind == _HEADERS
                if not self.greeted:
                    if kind != _SETTINGS:
                        raise NotHttp2Error("the connection does not begin with SETTINGS")
                    self.greeted = True
                self._payload_left = int.from_bytes(self._header[:_LENGTH_BYTES], "big")
                self._header.clear()
        return opened


def farewell(reason: str) -> bytes:
    """What a server sends that accepts no stream, and closes: its SETTINGS, and a GOAWAY that says
    why, which clients show."""
    debug = reason.encode("ascii", "replace")
    payload = struct.pack(">II", 0, _ENHANCE_YOUR_CALM) + debug
    return _frame(_SETTINGS, b"") + _frame(_GOAWAY, payload)


def _frame(kind: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(_LENGTH_BYTES, "big") + bytes((kind, 0, 0, 0, 0, 0)) + payload
