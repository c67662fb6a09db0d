"""Which headers reach gRPC. Does no I/O.

grpc.aio decodes headers as UTF-8: a `:path` that is not UTF-8 ends the task that takes the calls of
all clients, and any other such text is logged with a traceback. gRPC over HTTP/2 allows neither:
headers are ASCII, except the values of those whose names end in `-bin`.
"""

from __future__ import annotations

from typing import Final

from hpack import Decoder, HPACKError

# RFC 9113, 6.2 and 6.10.
HEADERS, _CONTINUATION = 0x1, 0x9
_END_HEADERS, _PADDED, _PRIORITY = 0x4, 0x8, 0x20
_FRAME_HEADER_BYTES, _PRIORITY_BYTES = 9, 5
_INDEXED: Final = 0x80  # the first bit of a field that is in the table already, RFC 7541, 6.1
# Of one block, as sent and as decoded. gRPC refuses much smaller ones, and says so.
_MOST_BLOCK_BYTES: Final = 32 << 10
# Each byte may be a field, and decoding one takes a few microseconds.
_DECODED_BYTES_FOR_A_CALL: Final = 64


class MalformedError(ValueError):
    """A client sent headers that gRPC must not get. CALLS is what decoding them cost."""

    def __init__(self, what: str, calls: float = 0.0) -> None:
        super().__init__(what)
        self.calls = calls


class HeaderBlocks:
    """The header blocks of one client (RFC 7541), in the order in which it sends them."""

    def __init__(self) -> None:
        self._decoder = Decoder(max_header_list_size=_MOST_BLOCK_BYTES)
        self._block = bytearray()
        self._block_bytes = 0  # with the headers of its frames, which may be many
        self._stream: int | None = None  # of the block that has not ended
        self._is_last = False  # whether the block ends with the present frame
        self._missing_bytes = 0  # of the present frame
        self._priority_bytes = 0  # before the block's first field

    @property
    def is_open(self) -> bool:
        """Whether a block was begun that has not ended."""
        return self._stream is not None

    def begin_frame(self, kind: int, flags: int, stream: int, size_bytes: int) -> bool:
        """The next frame of the client, of any KIND; returns whether it is part of a block. Raises
        `MalformedError`."""
        if self._stream != (stream if kind == _CONTINUATION else None):
            raise MalformedError("a block of headers is interrupted, or was not begun")
        if kind == HEADERS:
            self._block_bytes = 0
            self._priority_bytes = _PRIORITY_BYTES if flags & _PRIORITY else 0
            # gRPC ignores the flag of padding, and would read the padding as fields.
            if flags & _PADDED or size_bytes < self._priority_bytes:
                raise MalformedError("headers are padded, or too short for their priority")
        elif kind != _CONTINUATION:
            return False
        self._block_bytes += _FRAME_HEADER_BYTES + size_bytes
        if self._block_bytes > _MOST_BLOCK_BYTES:
            raise MalformedError(f"headers are longer than {_MOST_BLOCK_BYTES} bytes")
        self._stream, self._missing_bytes = stream, size_bytes
        self._is_last = bool(flags & _END_HEADERS)
        return True

    def feed(self, part: memoryview | bytes) -> float:
        """The next PART of the present frame; returns what decoding cost, in calls. Raises
        `MalformedError` where the block ends, if gRPC must not get it."""
        self._block += part
        self._missing_bytes -= len(part)
        if self._missing_bytes or not self._is_last:
            return 0.0
        block = bytes(self._block[self._priority_bytes :])
        self._block.clear()
        self._stream = None
        return self._check(block)

    def _check(self, block: bytes) -> float:
        # Most calls repeat the fields of an earlier one. Those were checked when they were added to
        # the table, and such a block does not change it.
        if not block or min(block) >= _INDEXED:
            return 0.0
        calls = len(block) / _DECODED_BYTES_FOR_A_CALL
        try:
            fields = self._decoder.decode(block, raw=True)
        except HPACKError as error:
            raise MalformedError("headers cannot be decoded", calls) from error
        for name, value in fields:
            if not (name.isascii() and (value.isascii() or name.endswith(b"-bin"))):
                raise MalformedError("a header is not ASCII", calls)
        return calls
