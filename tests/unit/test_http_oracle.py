"""The parser of http_latency beside h11, which nobody here wrote, and under random bytes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.http_parser import (
    EVIL,
    EVIL_ANSWER,
    PATH_BYTES,
    Outcome,
    Part,
    Role,
    Seen,
    Talk,
    Unread,
    answer,
    ask,
    fuzzer,
)
from tests.support import PATIENCE

FUZZED_IN_A_TEST: Final = 10_000
FUZZED_AT_LENGTH: Final = 1_000_000

TOKENS: Final = st.text("ABCXYZabcxyz019-_.!~", min_size=1, max_size=12).map(str.encode)
METHODS: Final = st.sampled_from(
    [b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS"]
)
VALUES: Final = st.text(' :;,=/"GETHP1.chunked\t', max_size=30).map(
    lambda text: text.strip().encode()
)
BYTES: Final = st.binary(max_size=40) | st.just(EVIL) | st.just(EVIL_ANSWER) | st.just(b"x" * 700)
SPACES: Final = st.sampled_from([b"", b" ", b"\t", b"  "])
ENDS: Final = st.sampled_from([b"\r\n", b"\r\n", b"\n"])
FRAMING: Final = {b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"}


@st.composite
def in_some_case(draw: st.DrawFn, name: bytes) -> bytes:
    return draw(st.sampled_from([name, name.lower(), name.upper(), name.swapcase()]))


@st.composite
def header_lines(draw: st.DrawFn, end: bytes) -> bytes:
    """Headers that do not matter, some of which go on in the next line."""
    names = draw(st.lists(TOKENS.filter(lambda name: name.lower() not in FRAMING), max_size=4))
    lines = []
    for name in names:
        lines.append(name + b":" + draw(SPACES) + draw(VALUES) + draw(SPACES) + end)
        if draw(st.booleans()):
            lines.append(b" Content-Length: 7" + end)
    return b"".join(lines)


@st.composite
def chunked(draw: st.DrawFn, end: bytes) -> bytes:
    """Chunks, of which h11 wants whole line ends, and trailers with END."""
    pieces = draw(st.lists(BYTES.filter(bool), max_size=4))
    extension = draw(st.sampled_from([b"", b"", b";a", b';a="b" ']))
    spelled = draw(st.sampled_from([b"%x", b"%X", b"00%x"]))
    chunks = b"".join(
        spelled % len(piece) + extension + b"\r\n" + piece + b"\r\n" for piece in pieces
    )
    return chunks + b"0" + extension + b"\r\n" + draw(header_lines(end)) + end


@st.composite
def framed(draw: st.DrawFn, line: bytes, *, has_body: bool = True) -> bytes:
    """A message that begins with LINE; what its headers say of its body is also said where it has
    none."""
    end = draw(ENDS)
    kind = draw(st.sampled_from(["none", "length", "chunked"]))
    head = line + end + b"Host: h" + end + draw(header_lines(end))
    body = b""
    if kind == "length":
        body = draw(BYTES)
        length = b"%d" % len(body)
        name = draw(in_some_case(b"Content-Length"))
        head += name + b":" + draw(SPACES) + length + draw(SPACES) + end
        if draw(st.booleans()):
            head += b"Content-Length: " + length + b"," + length + end
    elif kind == "chunked":
        body = draw(chunked(end))
        coding = draw(in_some_case(b"chunked"))
        head += draw(in_some_case(b"Transfer-Encoding")) + b":" + draw(SPACES) + coding + end
    elif line.startswith(b"HTTP/"):
        head += b"Content-Length: 0" + end
    head += draw(header_lines(end)) + end
    return head + body if has_body else head


class Spoken(NamedTuple):
    """One exchange in bytes."""

    request: bytes
    response: bytes


@st.composite
def exchanges(draw: st.DrawFn) -> Spoken:
    method = draw(METHODS | TOKENS)
    path = draw(st.text("/abc.%2-:@*", max_size=300).map(lambda text: ("/" + text).encode()))
    query = draw(st.sampled_from([b"", b"?", b"?q=/a?b", b"?" + b"q" * 700]))
    host = draw(st.sampled_from([b"", b"", b"http://h", b"https://[::1]:8"]))
    asked = draw(framed(method + b" " + host + path + query + b" HTTP/1.1"))
    status = draw(st.sampled_from([200, 201, 204, 206, 301, 304, 404, 418, 500, 599]))
    reason = draw(st.sampled_from([b"", b" ", b" OK", b" Not really HTTP/1.1 200 OK"]))
    has_body = method != b"HEAD" and status not in (204, 304)
    answered = draw(framed(b"HTTP/1.1 %d" % status + reason, has_body=has_body))
    interim = draw(st.sampled_from([b"", b"", b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n"]))
    empty_lines = draw(st.sampled_from([b"", b"", b"\r\n", b"\n"]))
    return Spoken(empty_lines + asked, interim + answered)


def read_by_h11(connection: h11.Connection) -> tuple[h11.Event, bytes, bytes]:
    """The head of the next message, its body, and what follows."""
    body = b""
    head: h11.Event | None = None
    while True:
        event = connection.next_event()
        match event:
            case h11.Request() | h11.Response():
                head = event
            case h11.Data():
                body += event.data
            case h11.EndOfMessage():
                assert head is not None
                return head, body, connection.trailing_data[0]
            case h11.InformationalResponse():
                continue
            case _:
                raise AssertionError(event)


def seen_by_h11(asked: bytes, answered: bytes) -> Iterator[Seen]:
    """What h11 reads in the bytes of both sides of a connection."""
    while asked := asked.lstrip(b"\r\n"):  # which h11 does not skip
        server = h11.Connection(h11.SERVER)
        server.receive_data(asked)
        head, body, asked = read_by_h11(server)
        assert isinstance(head, h11.Request)
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=head.method, target=head.target, headers=[("Host", "h")]))
        client.send(h11.EndOfMessage())
        client.receive_data(answered)
        final, content, answered = read_by_h11(client)
        assert isinstance(final, h11.Response)
        yield Seen(
            head.method.decode(),
            head.target,
            final.status_code,
            Outcome.COMPLETE,
            len(body),
            len(content),
        )


def path_of(target: bytes) -> bytes:
    """The path of a target that begins with it or with an authority, as much as is kept of it."""
    path = target.partition(b"?")[0]
    if not path.startswith(b"/"):
        path = b"/" + path.split(b"/", 3)[3]
    return path[:PATH_BYTES]


NAMED: Final = {"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"}


@given(
    st.lists(exchanges(), min_size=1, max_size=5), st.integers(1, 5),
    st.sampled_from([0, 1, 7, 50, 600]), st.integers(1), st.sampled_from(list(Role)),
)  # fmt: skip
def test_h11_reads_the_same(
    spoken: list[Spoken], pipelined: int, most_bytes: int, seed: int, role: Role
) -> None:
    asked, answered = b"".join(o.request for o in spoken), b"".join(o.response for o in spoken)
    expected = [
        one._replace(method=one.method if one.method in NAMED else "_OTHER", path=path_of(one.path))
        for one in seen_by_h11(asked, answered)
    ]
    assert len(expected) == len(spoken)
    parts = []
    for i in range(0, len(spoken), pipelined):
        parts.append(ask(b"".join(one.request for one in spoken[i : i + pipelined])))
        parts.append(answer(b"".join(one.response for one in spoken[i : i + pipelined])))
    talk = Talk(role)
    talk.feed_all(parts, most_bytes, seed % (1 << 64))
    found = talk.answer()
    assert [Seen.of(one) for one in found.exchanges] == expected
    assert found.unread is Unread.NONE


# Anything at all


@given(
    st.lists(st.tuples(st.booleans(), st.binary(max_size=60) | exchanges().map(b"".join))),
    st.integers(1, 50), st.integers(1), st.sampled_from(list(Role)), st.booleans(),
)  # fmt: skip
def test_any_bytes_have_one_answer(
    pieces: list[tuple[bool, bytes]], most_bytes: int, seed: int, role: Role, on_trial: bool
) -> None:
    parts = [Part(*piece) for piece in pieces]
    answers = []
    for most in (0, most_bytes, 1):
        talk = Talk(role, on_trial=on_trial)
        talk.feed_all(parts, most, seed % (1 << 64))
        answers.append(talk.answer())
    assert answers[0] == answers[1] == answers[2]


def fuzz(conversations: int, first: int) -> None:
    """Random conversations, with address and undefined-behaviour sanitizers; each three times,
    whole, in random pieces, and byte by byte."""
    command: list[str | Path] = [fuzzer(), str(first), str(conversations)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100 * PATIENCE, check=False
    )
    assert done.returncode == 0, f"{done.stderr[-2000:]} (first seed {first})"
    figures = json.loads(done.stdout)
    assert figures["conversations"] == conversations
    assert figures["turns"] < figures["bytes"]
    _, *outcomes = figures["outcomes"]
    assert all(outcomes), figures


def test_random_conversations_have_one_answer() -> None:
    fuzz(FUZZED_IN_A_TEST, 1)


@pytest.mark.soak
@pytest.mark.timeout(110 * PATIENCE)
def test_a_million_random_conversations_have_one_answer() -> None:
    first = int.from_bytes(os.urandom(4))
    fuzz(FUZZED_AT_LENGTH, first)
