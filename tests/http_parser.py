"""The parser of http_latency in user space: its C, compiled for this machine
(tests/programs/parser/http_parser.c), and conversations to feed it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from tests.support import ROOT, built

SOURCE: Final = ROOT / "tests/programs/parser/http_parser.c"
_PROGRAMS: Final = ROOT / "bpf/programs/http_latency"
PARSER: Final = tuple(_PROGRAMS.glob("*.bpf.h"))
FLAGS: Final = (
    *("-O2", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-sign-compare"),
    "-fno-strict-aliasing",  # the parser reads characters a word at a time, as the kernel does
)
# Words are read wherever they lie, which both processors that the agent runs on can do.
SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize=alignment")
FUZZER_FLAGS: Final = (*FLAGS, *SANITIZERS, "-fno-sanitize-recover=all")

METHODS: Final = (
    *("", "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"),
    "_OTHER",
)
PATH_CUT, PATH_QUERIED, QUERY_CUT, HOST_CUT, TRACE_SEEN, HAS_TRACE = 1, 2, 4, 8, 16, 32
PATH_BYTES: Final = 256
HOST_BYTES: Final = 64
PIPELINE: Final = 256


class Role(IntEnum):
    CLIENT = 1
    SERVER = 2


class Want(IntFlag):
    """What is copied of a request where a session wants it."""

    NOTHING = 0
    QUERY = 1
    TRACE = 2
    HOST = 4


class Outcome(IntEnum):
    COMPLETE = 1
    ABORTED_BY_CLIENT = 2
    ABORTED_BY_SERVER = 3
    UPGRADED = 4
    UNKNOWN = 5


class Unread(IntEnum):
    NONE = 0
    JOINED = 1
    TLS = 2
    HTTP2 = 3
    OTHER = 4
    UPGRADED = 5
    BEHIND = 6


class Part(NamedTuple):
    """Bytes of one operation: of the client, or of the server."""

    is_request: bool
    content: bytes


class Exchange(NamedTuple):
    """What the parser said of one. Times are the numbers of the parts, from 1."""

    method: str
    path: bytes
    status: int
    outcome: Outcome
    request_body_bytes: int
    response_body_bytes: int
    began: int
    asked: int
    first: int
    ended: int
    version: int
    path_flags: int
    path_hash: int
    number: int
    query: bytes = b""
    host: bytes = b""
    trace: str = ""
    """Trace and parent, as in the header."""


class Answer(NamedTuple):
    """What the parser said of a conversation."""

    exchanges: tuple[Exchange, ...]
    unread: Unread
    state: tuple[int, ...]
    """Where the next bytes lie."""


GET: Final = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
EVIL: Final = b"GET /evil HTTP/1.1\r\nHost: h\r\n\r\n"
EVIL_ANSWER: Final = b"HTTP/1.1 500 Evil\r\nContent-Length: 0\r\n\r\n"
CHUNKED: Final = b"Transfer-Encoding: chunked"


def ask(content: bytes) -> Part:
    return Part(True, content)


def answer(content: bytes) -> Part:
    return Part(False, content)


class Seen(NamedTuple):
    """Of an exchange, what does not depend on times."""

    method: str
    path: bytes
    status: int
    outcome: Outcome = Outcome.COMPLETE
    request_body_bytes: int = 0
    response_body_bytes: int = 0

    @classmethod
    def of(cls, one: Exchange) -> Seen:
        return cls(
            one.method, one.path, one.status, one.outcome,
            one.request_body_bytes, one.response_body_bytes,
        )  # fmt: skip


GOT_OK: Final = Seen("GET", b"/a", 200, response_body_bytes=2)


def request(line: bytes, *headers: bytes, body: bytes = b"") -> Part:
    return ask(b"\r\n".join((line, b"Host: h", *headers, b"", body)))


def response(line: bytes, *headers: bytes, body: bytes = b"") -> Part:
    return answer(b"\r\n".join((line, b"Server: s", *headers, b"", body)))


def post(*headers: bytes, body: bytes = b"") -> Part:
    return request(b"POST /p HTTP/1.1", *headers, body=body)


def ok(*headers: bytes, body: bytes = b"") -> Part:
    return response(b"HTTP/1.1 200 OK", *headers, body=body)


class _Exchange(ctypes.Structure):
    _fields_ = (
        ("began_ns", ctypes.c_uint64),
        ("asked_ns", ctypes.c_uint64),
        ("first_ns", ctypes.c_uint64),
        ("ended_ns", ctypes.c_uint64),
        ("request_body_bytes", ctypes.c_uint64),
        ("response_body_bytes", ctypes.c_uint64),
        ("path_hash", ctypes.c_uint64),
        ("number", ctypes.c_uint32),
        ("status", ctypes.c_uint16),
        ("path_bytes", ctypes.c_uint16),
        ("method", ctypes.c_uint8),
        ("version", ctypes.c_uint8),
        ("outcome", ctypes.c_uint8),
        ("path_flags", ctypes.c_uint8),
        ("host_bytes", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8),
        ("query_bytes", ctypes.c_uint16),
        ("path", ctypes.c_uint8 * PATH_BYTES),
        ("host", ctypes.c_uint8 * HOST_BYTES),
        ("trace", ctypes.c_uint64 * 2),
        ("parent", ctypes.c_uint64),
    )


class _Part(ctypes.Structure):
    _fields_ = (
        ("content", ctypes.c_char_p),
        ("length", ctypes.c_uint32),
        ("direction", ctypes.c_uint32),
    )


_STATE_WORDS: Final = 12


def fuzzer() -> Path:
    """The program that compares answers, compiled with sanitizers."""
    return built(
        "http_parser.sanitized",
        [SOURCE, *PARSER],
        lambda output: ["cc", *FUZZER_FLAGS, SOURCE, "-o", output],
    )


@cache
def _library() -> ctypes.CDLL:
    path = built(
        "http_parser.so",
        [SOURCE, *PARSER],
        lambda output: ["cc", *FLAGS, "-shared", "-fPIC", SOURCE, "-o", output],
    )
    library = ctypes.CDLL(str(path))
    pointer, u64, u32 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    library.talk_bytes.restype = u32
    library.talk_begin.argtypes = (pointer, ctypes.c_uint8, ctypes.c_bool)
    library.talk_want.argtypes = (pointer, u32)
    library.talk_feed.argtypes = (pointer, u32, ctypes.c_char_p, u64, u64)
    library.talk_feed_parts.argtypes = (pointer, pointer, u32, u32, pointer)
    library.talk_unseen.argtypes = (pointer, u32, u64, u64)
    library.talk_end.argtypes = (pointer, ctypes.c_bool, u64)
    library.talk_exchanges.argtypes = (pointer, ctypes.POINTER(u32))
    library.talk_exchanges.restype = ctypes.POINTER(_Exchange)
    library.talk_state.argtypes = (pointer, ctypes.POINTER(u64))
    return library


class Talk:
    """One connection, as ROLE sees it; ON_TRIAL if it was joined in its middle."""

    def __init__(
        self,
        role: Role = Role.SERVER,
        *,
        on_trial: bool = False,
        wants: Want = Want.NOTHING,
    ) -> None:
        self._c = _library()
        self._role = role
        self._memory = ctypes.create_string_buffer(self._c.talk_bytes())
        self._now = 0
        self._c.talk_begin(self._memory, role, on_trial)
        self.want(wants)

    def want(self, wants: Want) -> None:
        """Copies WANTS from the next request on."""
        self._c.talk_want(self._memory, wants)

    def _direction(self, *, is_request: bool) -> int:
        return int(is_request == (self._role is Role.CLIENT))  # 1: sent

    def feed(self, part: Part, cuts: Sequence[int] = ()) -> None:
        """Feeds PART, in pieces that end at CUTS."""
        self._now += 1
        direction = self._direction(is_request=part.is_request)
        start = 0
        for end in (*cuts, len(part.content)):
            piece = part.content[start:end]
            self._c.talk_feed(self._memory, direction, piece, len(piece), self._now)
            start = end

    def feed_all(self, parts: Sequence[Part], most_bytes: int, seed: int = 1) -> None:
        """Feeds PARTS in pieces of at most MOST_BYTES, of random lengths; 0 is whole."""
        self._now += len(parts)
        array = (_Part * len(parts))(
            *(
                _Part(part.content, len(part.content), self._direction(is_request=part.is_request))
                for part in parts
            )
        )
        number = ctypes.c_uint64(seed or 1)
        self._c.talk_feed_parts(self._memory, array, len(parts), most_bytes, ctypes.byref(number))

    def unseen(self, length: int, *, is_request: bool) -> None:
        """LENGTH bytes pass that no one sees."""
        self._now += 1
        direction = self._direction(is_request=is_request)
        self._c.talk_unseen(self._memory, direction, length, self._now)

    def end(self, *, by_server: bool) -> None:
        """The connection is over."""
        self._now += 1
        self._c.talk_end(self._memory, by_server, self._now)

    def answer(self) -> Answer:
        """What the parser has said so far."""
        count = ctypes.c_uint32()
        found = self._c.talk_exchanges(self._memory, ctypes.byref(count))
        state = (ctypes.c_uint64 * _STATE_WORDS)()
        self._c.talk_state(self._memory, state)
        return Answer(
            tuple(_read(found[i]) for i in range(count.value)), Unread(state[0]), tuple(state)
        )


def _read(one: _Exchange) -> Exchange:
    has_trace = one.path_flags & HAS_TRACE
    return Exchange(
        method=METHODS[one.method],
        path=bytes(one.path[: one.path_bytes]),
        status=one.status,
        outcome=Outcome(one.outcome),
        request_body_bytes=one.request_body_bytes,
        response_body_bytes=one.response_body_bytes,
        began=one.began_ns,
        asked=one.asked_ns,
        first=one.first_ns,
        ended=one.ended_ns,
        version=one.version,
        path_flags=one.path_flags,
        path_hash=one.path_hash,
        number=one.number,
        query=bytes(one.path[one.path_bytes : one.path_bytes + one.query_bytes]),
        host=bytes(one.host[: one.host_bytes]),
        trace=f"{one.trace[0]:016x}{one.trace[1]:016x}-{one.parent:016x}" if has_trace else "",
    )
