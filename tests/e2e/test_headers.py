"""Headers that no client of gRPC sends: each harms its own connection at most, and leaves no
traceback in the log."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import grpc
import pytest
from hpack import Encoder

from tests.http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PRIORITY,
    Http2,
    frame,
    message,
)
from tests.support import INSECURE, PATIENCE, SERVICE, RunningAgent, running_agent

LIST: Final = f"/{SERVICE}/ListCollectors"
NOT_UTF8: Final = b"/\xe6\xf3"
EVERY_BYTE: Final = bytes(range(256))
Fields = dict[bytes, bytes]
CALL: Final[Fields] = {
    b":method": b"POST", b":scheme": b"http", b":path": LIST.encode(), b":authority": b"agent",
    b"te": b"trailers", b"content-type": b"application/grpc",
}  # fmt: skip
HOSTILE: Final[dict[str, Fields]] = {
    "path-not-utf8": {b":path": NOT_UTF8},
    "path-half-of-a-character": {b":path": LIST.encode() + b"\xc3"},
    "path-surrogate": {b":path": b"/\xed\xa0\x80"},
    "path-utf8": {b":path": "/ä/ö".encode()},
    "path-every-byte": {b":path": EVERY_BYTE},
    "path-controls": {b":path": b"/\0\r\n\x1b[2J\x7f"},
    "path-empty": {b":path": b""},
    "path-long": {b":path": b"/" * 7_000},
    "authority-every-byte": {b":authority": EVERY_BYTE},
    "authority-controls": {b":authority": b"\0\r\n"},
    "method": {b":method": b"\xff"},
    "scheme": {b":scheme": b"\xff"},
    "unknown-pseudo-header": {b":protocol": b"\xff"},
    "status": {b":status": b"x"},
    "key-every-byte": {EVERY_BYTE: b"v"},
    "key-upper-case": {b"KEY": b"v"},
    "key-empty": {b"": b"v"},
    "value-not-utf8": {b"key": b"\xff\xfe"},
    "value-utf8": {b"key": "ä".encode()},
    "value-controls": {b"key": b"\0\r\n\x1b"},
    "token": {b"authorization": b"Bearer \xff"},
    "user-agent": {b"user-agent": b"\xff"},
    "binary": {b"key-bin": b"\0" + EVERY_BYTE},
    "binary-no-base64": {b"key-bin": b"\xff=*"},
    "trace": {b"grpc-trace-bin": EVERY_BYTE},
    "te": {b"te": b"nothing\xff"},
    "timeout-negative": {b"grpc-timeout": b"-1S"},
    "timeout-huge": {b"grpc-timeout": b"9" * 40 + b"H"},
    "timeout-bytes": {b"grpc-timeout": b"\xff"},
    "timeout-nothing": {b"grpc-timeout": b"0n"},
    "encoding-unknown": {b"grpc-encoding": b"zstd"},
    "encoding-bytes": {b"grpc-encoding": b"\xff"},
    "accept-encoding": {b"grpc-accept-encoding": b",,\xff,"},
    "content-type": {b"content-type": b"text/\xff"},
    "message": {b"grpc-message": b"%ff%"},
    "retry": {b"grpc-previous-rpc-attempts": b"many"},
    "huge": {b"key": b"v" * 12_000},
    "huger": {b"key": b"v" * 40_000},
    "many": {b"key%d" % number: b"v" for number in range(500)},
}


@dataclass
class Victim:
    """An agent, and another client on each of its addresses."""

    agent: RunningAgent
    addresses: list[str]
    channels: list[grpc.Channel]

    def assert_unharmed(self) -> None:
        """The other clients' calls succeed. Every line of the log is a record, and none has a
        traceback."""
        for channel in self.channels:
            unary: Any = channel.unary_unary(LIST)
            unary(b"", timeout=60 * PATIENCE)
        assert not [line for line in self.agent.log() if "exception" in line]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """An agent on a unix socket and on TCP, whose peers are not slowed."""
    directory = tmp_path_factory.mktemp("headers")
    limits = {"peer_calls_per_second": 1_000_000, "peer_bytes_per_second": "1GiB"}
    listen = ("--listen", f"unix:{directory}/agent.sock", "--listen", "127.0.0.1:0")
    config = {"auth": INSECURE, "limits": limits}
    with running_agent(directory / "agent", config, *listen) as agent, ExitStack() as stack:
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        found: list[str] = line["grpc"]  # type: ignore[assignment]
        channels = [stack.enter_context(grpc.insecure_channel(address)) for address in found]
        yield Victim(agent, found, channels)


def call(block: bytes, flags: int = 0, cut: int | None = None) -> bytes:
    """The frames of a call, whose headers have a second frame from CUT on."""
    first, rest = block[:cut], b"" if cut is None else block[cut:]
    frames = [frame(HEADERS, flags | (0 if rest else END_HEADERS), 1, first)]
    for at in range(0, len(rest), 16_384):
        ends = END_HEADERS if at + 16_384 >= len(rest) else 0
        frames.append(frame(CONTINUATION, ends, 1, rest[at : at + 16_384]))
    return b"".join([*frames, frame(DATA, END_STREAM, 1, message(b""))])


def send(address: str, sent: bytes, wait_s: float) -> bytes:
    """What the agent answers within WAIT_S seconds, or until it closes."""
    answer = b""
    with Http2(address) as connection, suppress(OSError):
        connection.greet().socket.sendall(sent)
        connection.socket.settimeout(wait_s)
        while part := connection.socket.recv(65_536):
            answer += part
    return answer


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_header_harms_its_own_connection_alone(fields: Fields, victim: Victim) -> None:
    for address, huffman in product(victim.addresses, (False, True)):
        block = Encoder().encode((CALL | fields).items(), huffman=huffman)
        send(address, call(block, cut=16_384 if len(block) > 16_384 else None), 0.02)
        # A client that leaves before its headers end: gRPC makes a call of what it has.
        send(address, call(block, cut=len(block) - 1)[: -(9 + 5 + 9 + 1)], 0.02)
    victim.assert_unharmed()


@pytest.mark.parametrize(
    "sent",
    [
        call(b"\x83\x86\x04\x03" + NOT_UTF8, cut=7),
        call(b"\x83\x86\x44\x01/\x7e\x03" + NOT_UTF8),
        call(b"\x01\x83\x86\x04\x03" + NOT_UTF8 + b"\0", PADDED),
        call(bytes(5) + b"\x83\x86\x04\x03" + NOT_UTF8, PRIORITY),
        call(b"\x83\x86\x04\x03" + NOT_UTF8)[: -(9 + 5)] * 2,
    ],
    ids=["cut", "indexed-name", "padded", "priority", "twice"],
)
def test_a_path_that_is_not_utf8_cannot_be_hidden(sent: bytes, victim: Victim) -> None:
    for address in victim.addresses:
        # gRPC's SETTINGS may come first, and no answer to the call.
        assert HEADERS not in frame_types(send(address, sent, 1.0))
    victim.assert_unharmed()


def frame_types(answer: bytes) -> list[int]:
    types = []
    while len(answer) >= 9:
        types.append(answer[3])
        answer = answer[9 + int.from_bytes(answer[:3], "big") :]
    return types


def test_random_headers_harm_no_other_caller(victim: Victim) -> None:
    chance = random.Random(5)
    kinds = [range(256), range(128), range(32, 127)]
    for turn in range(300):
        fields = dict(CALL)
        for name in chance.sample([*CALL, b"key", b"key-bin", b"grpc-timeout", b"?"], 2):
            text = bytes(chance.choices(chance.choice(kinds), k=chance.randrange(30)))
            fields[text if name == b"?" else name] = text
        block = bytearray(Encoder().encode(fields.items(), huffman=chance.random() < 0.5))
        for _ in range(chance.choice((0, 0, 0, 3))):
            block[chance.randrange(len(block))] = chance.randrange(256)
        sent = call(bytes(block), cut=chance.choice((None, chance.randrange(len(block)))))
        whole = chance.choice((len(sent), chance.randrange(len(sent))))
        send(victim.addresses[turn % 2], sent[:whole], 0.003)
        victim.assert_unharmed()


def test_calls_that_end_while_they_are_answered_leave_no_traceback(victim: Victim) -> None:
    for turn, path in product(range(40), (LIST, "/no/method", "/grpc.health.v1.Health/Check")):
        encoder, sent = Encoder(), b""
        for number in range(30):
            timeout = (b"0n", b"100u", b"1m", b"3m", b"5m")[(turn + number) % 5]
            fields = CALL | {b":path": path.encode(), b"grpc-timeout": timeout}
            sent += frame(HEADERS, END_HEADERS, 2 * number + 1, encoder.encode(fields.items()))
            sent += frame(DATA, END_STREAM, 2 * number + 1, message(b""))
        send(victim.addresses[turn % 2], sent, 0.02)
    victim.assert_unharmed()


def test_grpc_itself_refuses_headers_that_are_too_long(victim: Victim) -> None:
    for channel in victim.channels:
        unary: Any = channel.unary_unary(LIST)
        with pytest.raises(grpc.RpcError) as told:
            unary(b"", metadata=[("key", "v" * 20_000)], timeout=60 * PATIENCE)
        refusal: Any = told.value
        assert refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
