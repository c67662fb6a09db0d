"""The headers that gRPC may get, and those that end their connection before gRPC gets them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest
from hpack import Encoder
from hypothesis import given
from hypothesis import strategies as st

from coral.agent.serving.headers import MalformedError
from coral.agent.serving.http2 import Meter
from tests.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    SETTINGS,
    frame,
)

NOT_UTF8 = b"/\xe6\xf3"
CALL = [
    (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a.B/C"), (b":authority", b"agent"),
    (b"te", b"trailers"), (b"content-type", b"application/grpc"), (b"grpc-timeout", b"10S"),
]  # fmt: skip


def fed(*frames: bytes, step: int = 1 << 14) -> float:
    """What FRAMES cost that a client sends first, STEP bytes at a time, in calls. Checks that all
    of it is passed on."""
    meter, sent = Meter(), PREFACE + frame(SETTINGS) + b"".join(frames)
    fed = [meter.feed(part) for part in parts(sent, step)]
    assert b"".join(passed for passed, _ in fed) == sent
    return sum(calls for _, calls in fed)


def parts(sent: bytes, step: int) -> Iterator[memoryview]:
    return (memoryview(sent)[at : at + step] for at in range(0, len(sent), step))


def headers(block: bytes, flags: int = END_HEADERS, stream: int = 1) -> bytes:
    return frame(HEADERS, flags, stream, block)


def literal(name: bytes, value: bytes, first: int = 0) -> bytes:
    """A field with a new name, RFC 7541, 6.2."""
    return bytes((first, len(name))) + name + bytes((len(value),)) + value


@pytest.mark.parametrize("huffman", [False, True])
@pytest.mark.parametrize(
    "field",
    [
        (b":path", NOT_UTF8),
        (b":path", "/ä".encode()),
        (b":authority", b"\xff"),
        (b"name", b"\x80"),
        (b"n\xe4me", b"value"),
        (b"n\xe4me-bin", b"value"),
    ],
)
def test_a_header_that_is_not_ascii_is_malformed(
    field: tuple[bytes, bytes], *, huffman: bool
) -> None:
    sent = headers(Encoder().encode([*CALL, field], huffman=huffman))
    for step in (1, 7, len(sent)):
        with pytest.raises(MalformedError, match="not ASCII"):
            fed(sent, step=step)


@pytest.mark.parametrize(
    "block",
    [
        b"\x04\x03" + NOT_UTF8,  # the name is in the table that every connection has
        b"\x44\x03" + NOT_UTF8,
        b"\x14\x03" + NOT_UTF8,
        # The name is in the table of this connection.
        literal(b":path", b"/", 0x40) + b"\x7e\x03" + NOT_UTF8,
        literal(b":path", b"/", 0x40) + literal(b"x", b"y", 0x40) + b"\x0f\x30\x03" + NOT_UTF8,
        b"\x20\x3f\xe1\x1f" + b"\x04\x03" + NOT_UTF8,  # after updates of the table's size
    ],
)
def test_a_path_that_is_not_utf8_is_found_however_it_is_written(block: bytes) -> None:
    with pytest.raises(MalformedError, match="not ASCII"):
        fed(headers(block))


@pytest.mark.parametrize("step", [1, 7, 1 << 14])
def test_nothing_of_a_block_is_passed_on_before_its_end(step: int) -> None:
    block = Encoder().encode(CALL, huffman=False)
    before = PREFACE + frame(SETTINGS)
    first = headers(block[:50], 0)
    last = frame(CONTINUATION, END_HEADERS, 1, block[50:])
    after = frame(DATA, 0, 1, b"\0" * 9)
    meter = Meter()
    begun = b"".join(meter.feed(part)[0] for part in parts(before + first + last[:-1], step))
    assert begun.startswith(before)
    assert len(begun) < len(before) + 9  # of the first frame's own header, what came alone
    rest = b"".join(meter.feed(part)[0] for part in parts(last[-1:] + after, step))
    assert begun + rest == before + first + last + after


@pytest.mark.parametrize("cut", [0, 1, 8, 30])
def test_blocks_are_put_together_from_their_frames(cut: int) -> None:
    good, bad = (
        Encoder().encode([*CALL, (b"name", value)], huffman=False) for value in (b"v", b"\xff")
    )
    middle = frame(CONTINUATION, 0, 1)
    assert fed(
        headers(good[:cut], 0), middle, frame(CONTINUATION, END_HEADERS, 1, good[cut:])
    ) == pytest.approx(1 + len(good) / 64)
    with pytest.raises(MalformedError, match="not ASCII"):
        fed(headers(bad[:cut], 0), middle, frame(CONTINUATION, END_HEADERS, 1, bad[cut:]))
    priority = bytes(5)
    assert fed(headers(priority + good, END_HEADERS | PRIORITY)) > 1
    with pytest.raises(MalformedError, match="not ASCII"):
        fed(headers(priority + bad, END_HEADERS | PRIORITY))


@pytest.mark.parametrize(
    "value", [b"", b"plain", bytes(range(128)), pytest.param(b"a" * 15_000, id="long")]
)
def test_ascii_passes_and_so_does_anything_in_binary_headers(value: bytes) -> None:
    fields = [*CALL, (b"name", value), (b"name-bin", b"\0" + value + b"\xff\xfe")]
    assert fed(headers(Encoder().encode(fields))) > 1


def test_a_block_without_new_fields_costs_nothing_to_check() -> None:
    encoder = Encoder()
    first, again = encoder.encode(CALL), encoder.encode(CALL)
    assert fed(headers(first), headers(again, stream=3), headers(b"", stream=5)) == pytest.approx(
        3 + len(first) / 64
    )


@pytest.mark.parametrize(
    "frames",
    [
        (headers(b"\x01" + b"\x83" * 4 + b"\0", END_HEADERS | PADDED),),
        (headers(b"\0" * 4, END_HEADERS | PRIORITY),),
        (headers(b"\x83", 0), frame(DATA, 0, 1)),
        (headers(b"\x83", 0), frame(PING, 0, 0, bytes(8))),
        (headers(b"\x83", 0), headers(b"\x83", stream=3)),
        (headers(b"\x83", 0), frame(CONTINUATION, END_HEADERS, 3, b"\x83")),
        (frame(CONTINUATION, END_HEADERS, 1, b"\x83"),),
        (headers(b"\x83"), frame(CONTINUATION, END_HEADERS, 1, b"\x83")),
        (headers(b"\x83" * 16_384, 0), frame(CONTINUATION, 0, 1, b"\x83" * 16_384)),
        (headers(b"\x83", 0), *[frame(CONTINUATION, 0, 1)] * 4000),
    ],
    ids=[
        "padded", "no-priority", "data", "ping", "headers", "other-stream", "no-headers", "after",
        "long", "many-frames",
    ],
)  # fmt: skip
def test_frames_in_which_headers_could_be_hidden_are_malformed(frames: tuple[bytes, ...]) -> None:
    with pytest.raises(MalformedError):
        fed(*frames)


@pytest.mark.parametrize(
    "block",
    [
        literal(b"a", b"b", 0x40) + b"\xbe" * 1000,  # 34 bytes each, of one
        literal(b"a", b"") * 1000,
        b"\x3f\xe2\x1f\x04\x01/",  # a table of 4,097 bytes
        b"\x04\x7f\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x04\x05/",
        b"\x80\x04\x01/",
        b"\x04\x84\xff\xff\xff\xff",  # the end of a Huffman-coded string
    ],
)
def test_a_block_that_cannot_be_decoded_is_malformed_and_charged(block: bytes) -> None:
    with pytest.raises(MalformedError, match="cannot be decoded") as told:
        fed(headers(block))
    assert told.value.calls == len(block) / 64


@given(block=st.binary(max_size=200), step=st.integers(1, 50))
def test_no_block_does_more_than_end_its_connection(block: bytes, step: int) -> None:
    with suppress(MalformedError):
        assert fed(headers(block), step=step) <= 1 + len(block) / 64
