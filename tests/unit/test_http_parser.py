"""What the parser of http_latency makes of conversations, however their bytes are cut. It is the C
that the kernel runs, compiled for this machine."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.http_parser import (
    PATH_CUT,
    PATH_QUERIED,
    Answer,
    Exchange,
    Outcome,
    Part,
    Role,
    Talk,
    Unread,
    fuzzer,
)
from tests.support import PATIENCE

FUZZED_IN_A_TEST: Final = 20_000
FUZZED_AT_LENGTH: Final = 1_000_000
PIPELINE: Final = 32
PATH_BYTES: Final = 256

COMPLETE, UPGRADED, UNKNOWN = Outcome.COMPLETE, Outcome.UPGRADED, Outcome.UNKNOWN
BY_CLIENT, BY_SERVER = Outcome.ABORTED_BY_CLIENT, Outcome.ABORTED_BY_SERVER

GET: Final = b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n"
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
EVIL: Final = b"GET /evil HTTP/1.1\r\nHost: h\r\n\r\n"
EVIL_ANSWER: Final = b"HTTP/1.1 500 Evil\r\nContent-Length: 0\r\n\r\n"


def ask(content: bytes) -> Part:
    return Part(True, content)


def answer(content: bytes) -> Part:
    return Part(False, content)


class Seen(NamedTuple):
    """What a case expects of one exchange."""

    method: str
    path: bytes
    status: int
    outcome: Outcome = COMPLETE
    request_body_bytes: int = 0
    response_body_bytes: int = 0

    @classmethod
    def of(cls, one: Exchange) -> Seen:
        return cls(
            one.method, one.path, one.status, one.outcome,
            one.request_body_bytes, one.response_body_bytes,
        )  # fmt: skip


GOT_OK: Final = Seen("GET", b"/a", 200, response_body_bytes=2)


@dataclass(frozen=True)
class Case:
    name: str
    parts: Sequence[Part]
    seen: Sequence[Seen]
    unread: Unread = Unread.NONE
    closed_by_server: bool | None = field(default=None, kw_only=True)
    """Who ends the connection after the parts; nobody if None."""


def talked(case: Case, role: Role, cut: tuple[int, int] | None = None, most: int = 0) -> Answer:
    """The answer to CASE, with one of its parts cut at an offset, or all in pieces of MOST bytes."""
    talk = Talk(role)
    if most:
        talk.feed_all(case.parts, most)
    for number, part in enumerate(() if most else case.parts):
        talk.feed(part, cut[1:] if cut and cut[0] == number else ())
    if case.closed_by_server is not None:
        talk.end(by_server=case.closed_by_server)
    return talk.answer()


def request(line: bytes, *headers: bytes, body: bytes = b"") -> Part:
    return ask(b"\r\n".join((line, b"Host: h", *headers, b"", body)))


def response(line: bytes, *headers: bytes, body: bytes = b"") -> Part:
    return answer(b"\r\n".join((line, b"Server: s", *headers, b"", body)))


def post(*headers: bytes, body: bytes = b"") -> Part:
    return request(b"POST /p HTTP/1.1", *headers, body=body)


def ok(*headers: bytes, body: bytes = b"") -> Part:
    return response(b"HTTP/1.1 200 OK", *headers, body=body)


def posted(length: int, outcome: Outcome = COMPLETE, status: int = 200) -> Seen:
    answered = 2 if status == 200 else 0
    return Seen("POST", b"/p", status, outcome, length, answered)


NO_CONTENT: Final = response(b"HTTP/1.1 204 No Content")
BAD: Final = response(b"HTTP/1.1 400 Bad Request", b"Content-Length: 0")
CHUNKED: Final = b"Transfer-Encoding: chunked"

PLAIN: Final = [
    Case("keep-alive", [ask(GET), answer(OK), ask(GET), answer(OK)], [GOT_OK, GOT_OK]),
    Case("a line and its headers in pieces",
         [ask(b"GET /a HT"), ask(b"TP/1.1\r"), ask(b"\nHost: h\r\n"), ask(b"\r\n"),
          answer(b"HTTP/1.1 2"), answer(b"00 OK\r\nContent-Le"), answer(b"ngth: 2\r\n\r\no"),
          answer(b"k")],
         [GOT_OK]),
    Case("pipelined",
         [ask(b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % i for i in range(5))),
          answer(b"".join(b"HTTP/1.1 20%d \r\nContent-Length: %d\r\n\r\n%b" % (i, i, b"x" * i)
                          for i in range(4))),
          answer(b"HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n")],
         [*(Seen("GET", b"/%d" % i, 200 + i, response_body_bytes=i) for i in range(4)),
          Seen("GET", b"/4", 500)]),
    Case("empty lines before a request", [ask(b"\r\n\r\n\n" + GET), answer(OK)], [GOT_OK]),
    Case("an empty line after a body",
         [ask(post(b"Content-Length: 2", body=b"hi\r\n").content + GET), NO_CONTENT, answer(OK)],
         [posted(2)._replace(status=204, response_body_bytes=0), GOT_OK]),
    Case("HTTP/1.0", [ask(b"GET /a HTTP/1.0\r\n\r\n"),
                      answer(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok")], [GOT_OK]),
    Case("bare line feeds",
         [ask(b"POST /p HTTP/1.1\nTransfer-Encoding: chunked\n\n3\nabc\n0\nA: b\n\n"),
          answer(b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok")],
         [posted(3)]),
    Case("a status line without reason",
         [ask(GET), answer(b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok"),
          ask(GET), answer(b"HTTP/1.1 200\nContent-Length: 2\n\nok"),
          ask(GET), answer(b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok")],
         [GOT_OK] * 3),
    Case("no answer yet", [ask(GET), ask(GET[:-1])], []),
    Case("only half an answer", [ask(GET), answer(OK[:-1])], []),
    Case("an answer that nobody asked for", [answer(b"HTTP/1.1 408 Timeout\r\n\r\n")], []),
]  # fmt: skip

STATUSES: Final = [
    Case("100 Continue",
         [post(b"Expect: 100-continue", b"Content-Length: 3"),
          answer(b"HTTP/1.1 100 Continue\r\n\r\n"), ask(b"abc"), ok(b"Content-Length: 2", body=b"ok")],
         [posted(3)]),
    Case("expected, and refused",
         [post(b"Expect: 100-continue", b"Content-Length: 3"),
          response(b"HTTP/1.1 417 No", b"Content-Length: 0"), ask(b"abc"), ask(GET), answer(OK)],
         [Seen("POST", b"/p", 417), GOT_OK]),
    Case("103 Early Hints, several times",
         [ask(GET), answer(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
          answer(b"HTTP/1.1 102 Processing\r\nContent-Length: 7\r\n\r\nHTTP/1.1 100 \r\n\r\n"),
          answer(OK), ask(GET), answer(OK)],
         [GOT_OK, GOT_OK]),
    Case("101 Switching Protocols",
         [request(b"GET /ws HTTP/1.1", b"Upgrade: websocket", b"Connection: Upgrade"),
          response(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket", body=b"\x81\x02hi"),
          ask(b"\x81\x02hi"), ask(EVIL), answer(EVIL_ANSWER)],
         [Seen("GET", b"/ws", 101, UPGRADED)], Unread.UPGRADED),
    Case("101 before other answers", [ask(GET + EVIL), answer(b"HTTP/1.1 101 Up\r\n\r\n" + OK)],
         [GOT_OK._replace(status=101, outcome=UPGRADED, response_body_bytes=0),
          Seen("GET", b"/evil", 0, UNKNOWN)], Unread.UPGRADED),
    Case("CONNECT",
         [ask(b"CONNECT h:443 HTTP/1.1\r\nHost: h:443\r\n\r\n"),
          response(b"HTTP/1.1 200 Connection established", b"Content-Length: 10"),
          ask(b"\x16\x03\x01"), ask(EVIL), answer(EVIL_ANSWER)],
         [Seen("CONNECT", b"", 200, UPGRADED)], Unread.UPGRADED),
    Case("CONNECT, refused",
         [ask(b"CONNECT [::1]:443 HTTP/1.1\r\n\r\n"),
          response(b"HTTP/1.1 407 No", b"Content-Length: 2", body=b"no"), ask(GET), answer(OK)],
         [Seen("CONNECT", b"", 407, response_body_bytes=2), GOT_OK]),
    Case("HEAD", [request(b"HEAD /a HTTP/1.1"), ok(b"Content-Length: 999"), ask(GET), answer(OK)],
         [Seen("HEAD", b"/a", 200), GOT_OK]),
    Case("HEAD of chunks", [request(b"HEAD /a HTTP/1.1"), ok(CHUNKED), ask(GET), answer(OK)],
         [Seen("HEAD", b"/a", 200), GOT_OK]),
    Case("HEAD without a length", [request(b"HEAD /a HTTP/1.1"), ok(), ask(GET), answer(OK)],
         [Seen("HEAD", b"/a", 200), GOT_OK]),
    Case("pipelined HEAD and GET",
         [ask(b"HEAD /h HTTP/1.1\r\n\r\n" + GET), answer(b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n"),
          answer(OK)],
         [Seen("HEAD", b"/h", 200), GOT_OK]),
    Case("204 and 304 with what looks like a body",
         [ask(GET), response(b"HTTP/1.1 204 No Content", CHUNKED), ask(GET),
          response(b"HTTP/1.1 304 Not Modified", b"Content-Length: 999"), ask(GET), answer(OK)],
         [GOT_OK._replace(status=204, response_body_bytes=0),
          GOT_OK._replace(status=304, response_body_bytes=0), GOT_OK]),
    Case("statuses that nobody registered",
         [ask(GET), response(b"HTTP/1.1 999 What", b"Content-Length: 0")],
         [GOT_OK._replace(status=999, response_body_bytes=0)]),
    Case("an answer before the request's body is whole",
         [post(b"Content-Length: 10", body=b"12345"), BAD, ask(b"67890"), ask(GET), answer(OK)],
         [Seen("POST", b"/p", 400, request_body_bytes=5), GOT_OK]),
    Case("an answer before the request's head is whole",
         [ask(b"GET /a?b HTTP/1.0\r\nX: "), response(b"HTTP/1.1 431 Long", b"Content-Length: 0"),
          ask(b"y\r\nContent-Length: 2\r\n\r\nhi"), ask(GET), answer(OK)],
         [Seen("GET", b"/a", 431), GOT_OK]),
    Case("an answer in the middle of the target",
         [ask(b"PUT /long"), response(b"HTTP/1.1 414 Long", b"Content-Length: 0")],
         [Seen("PUT", b"/long", 414)]),
    Case("an answer in the middle of the method",
         [ask(b"PU"), response(b"HTTP/1.1 408 Late", b"Connection: close")], [],
         closed_by_server=True),
    Case("an answer whose hook ran before that of its request",
         [ask(GET), answer(OK), answer(OK), ask(GET), ask(EVIL), answer(EVIL_ANSWER)],
         [GOT_OK, GOT_OK, Seen("GET", b"/evil", 500)]),
]  # fmt: skip

TARGETS: Final = [
    Case("absolute form",
         [ask(b"GET http://h:80/a?b=http://c/ HTTP/1.1\r\n\r\nGET http://h HTTP/1.1\r\n\r\n"
              b"GET http://h?q HTTP/1.1\r\n\r\nGET https://u:p@[::1]:8/x/y HTTP/1.1\r\n\r\n"),
          answer(OK * 4)],
         [GOT_OK._replace(path=path) for path in (b"/a", b"/", b"/", b"/x/y")]),
    Case("OPTIONS *", [request(b"OPTIONS * HTTP/1.1"), answer(OK)],
         [GOT_OK._replace(method="OPTIONS", path=b"*")]),
    Case("a target that is none", [request(b"GET index.html HTTP/1.1"), BAD],
         [Seen("GET", b"", 400)]),
    Case("queries are not copied",
         [ask(b"GET /a?/b?c=%20 HTTP/1.1\r\n\r\nGET /a? HTTP/1.1\r\n\r\n"), answer(OK * 2)],
         [GOT_OK, GOT_OK]),
    Case("characters beyond ASCII", [ask("GET /é/日 HTTP/1.1\r\n\r\n".encode()), answer(OK)],
         [GOT_OK._replace(path="/é/日".encode())]),
    Case("all methods",
         [ask(b"".join(b"%s /a HTTP/1.1\r\n\r\n" % method for method in (
             b"GET", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH"))), answer(OK * 7)],
         [GOT_OK._replace(method=method)
          for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH")]),
    Case("other methods",
         [ask(b"".join(b"%s /a HTTP/1.1\r\n\r\n" % method for method in (
             b"get", b"Get", b"GETS", b"GE", b"PROPFIND", b"M-SEARCH", b"VERSION-CONTROL",
             b"UPDATEREDIRECTREF", b"X_Y", b"1", b"!#$%&'*+-.^_`|~", b"AGET", b"XXXXXXXXGET"))),
          answer(OK * 13)],
         [GOT_OK._replace(method="_OTHER")] * 13),
    Case("a path that fits", [ask(b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * (PATH_BYTES - 1))), answer(OK)],
         [GOT_OK._replace(path=b"/" + b"x" * (PATH_BYTES - 1))]),
    Case("a long path", [ask(b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * 5000)), answer(OK)],
         [GOT_OK._replace(path=b"/" + b"x" * (PATH_BYTES - 1))]),
    Case("a long query", [ask(b"GET /a?%s HTTP/1.1\r\n\r\n" % (b"x" * 5000)), answer(OK)],
         [GOT_OK]),
    Case("a space in the target", [ask(b"GET /a b HTTP/1.1\r\n\r\n"), BAD], [], Unread.OTHER),
]  # fmt: skip

BODIES: Final = [
    Case("a length", [post(b"Content-Length: 5", body=b"hello"), ok(b"content-LENGTH:2", body=b"ok")],
         [posted(5)]),
    Case("leading zeros and spaces",
         [post(b"Content-Length: \t 0000000000000000000005 \t", body=b"hello"), answer(OK)],
         [posted(5)]),
    Case("equal lengths",
         [post(b"Content-Length: 5", b"X: y", b"content-length: 05", body=b"hello"), answer(OK),
          post(b"Content-Length: 5, 5,5", body=b"hello"), answer(OK)],
         [posted(5), posted(5)]),
    *(Case(f"a length that is none: {value!r}",
           [post(b"Content-Length:" + value, body=EVIL), BAD, ask(GET)],
           [Seen("POST", b"/p", 400, request_body_bytes=len(EVIL))], Unread.JOINED)
      for value in (b" +5", b" -5", b"", b" ", b" 5 5", b" 0x5", b" 5;", b"5,", b" 5, 6", b" 5.0",
                    b" 99999999999999999999", b" 5\r 5", b" 5\0", b" \xb5", b" 5\r\n 5", b"\r\n 5")),
    Case("different lengths",
         [post(b"Content-Length: 5", b"Content-Length: 6", body=EVIL), BAD, ask(EVIL)],
         [Seen("POST", b"/p", 400, request_body_bytes=len(EVIL))], Unread.JOINED),
    Case("different lengths of an answer",
         [ask(GET), ok(b"Content-Length: 5", b"Content-Length: 6", body=EVIL_ANSWER), ask(EVIL)],
         [GOT_OK._replace(outcome=UNKNOWN, response_body_bytes=0)], Unread.JOINED),
    Case("different lengths of no body",
         [request(b"HEAD /a HTTP/1.1"), ok(b"Content-Length: 5", b"Content-Length: 6"), ask(GET),
          answer(OK)],
         [Seen("HEAD", b"/a", 200), GOT_OK]),
    Case("space before the colon",
         [post(b"Content-Length : 5", body=EVIL), BAD, ask(EVIL)],
         [Seen("POST", b"/p", 400, request_body_bytes=len(EVIL))], Unread.JOINED),
    Case("names that only look like it",
         [request(b"GET /a HTTP/1.1", b"Content-Length-X: 5", b"X-Content-Length: 5",
                  b"content-lengths: 5", b"Content-Lengt: 5", b"Content\rLength: 5", b"Content-Type: 5",
                  b"Content_Length: 5", b"Transfer-Encodings: chunked", b"Transfer-Encodin: chunked",
                  b"TE: chunked", b"C: 5", b"t: chunked", b"Content-Length", b": 5", b"Content-Length\0: 5",
                  b"\0: 5", b" Content-Length: 5", b"\x03ontent-Length: 5"),
          answer(OK), ask(GET), answer(OK)],
         [GOT_OK, GOT_OK]),
    Case("lines that go on in the next",
         [request(b"GET /a HTTP/1.1", b"X: y", b" Content-Length: 5", b"\tTransfer-Encoding: chunked"),
          answer(OK), ask(GET), answer(OK)],
         [GOT_OK, GOT_OK]),
    Case("chunks, extensions and trailers",
         [post(CHUNKED, body=b"5\r\nhello\r\n00A ; x=\"y;\r\r\nEVIL /evi\n\r\n"
               b"0;last\r\nContent-Length: 9\r\nTransfer-Encoding: x\r\n\r\n"),
          ok(b"transfer-encoding:\tChunked\t", body=b"1\r\no\r\n1\nk\n000\r\n\r\n"), ask(GET), answer(OK)],
         [posted(15), GOT_OK]),
    Case("chunks and a length",
         [post(b"Content-Length: 3", CHUNKED, body=b"5\r\nhello\r\n0\r\n\r\n"), answer(OK),
          post(CHUNKED, b"Content-Length: 3", body=b"5\r\nhello\r\n0\r\n\r\n"), answer(OK)],
         [posted(5), posted(5)]),
    Case("several codings",
         [post(b"Transfer-Encoding: gzip,\t,chunked", body=b"1\r\nx\r\n0\r\n\r\n"), answer(OK),
          post(b"Transfer-Encoding: gzip", CHUNKED, body=b"1\r\nx\r\n0\r\n\r\n"), answer(OK)],
         [posted(1), posted(1)]),
    *(Case(f"codings that do not end with chunked: {value!r}",
           [post(b"Transfer-Encoding:" + value, body=EVIL), BAD, ask(GET)],
           [Seen("POST", b"/p", 400, request_body_bytes=len(EVIL))], Unread.JOINED)
      for value in (b" gzip", b"chunked, gzip", b" xchunked", b" abcdefghchunked", b" chunked;q=1", b"",
                    b" chunked\r\nTransfer-Encoding: gzip", b" chunked\r\n x", b"\r\n chunked", b" \"chunked\"")),
    Case("an answer coded otherwise ends with the connection",
         [ask(GET), ok(b"Transfer-Encoding: gzip", b"Content-Length: 1", body=EVIL_ANSWER)],
         [GOT_OK._replace(response_body_bytes=len(EVIL_ANSWER))], closed_by_server=True),
    Case("an answer that ends with the connection",
         [ask(GET), response(b"HTTP/1.0 200 OK", body=EVIL_ANSWER), answer(b"more")],
         [GOT_OK._replace(response_body_bytes=len(EVIL_ANSWER) + 4)], closed_by_server=True),
    Case("an answer that the client ends",
         [ask(GET), response(b"HTTP/1.0 200 OK", body=b"more")],
         [GOT_OK._replace(outcome=BY_CLIENT, response_body_bytes=4)], closed_by_server=False),
    Case("an answer that stops", [ask(GET), ok(b"Content-Length: 9", body=b"12345")],
         [GOT_OK._replace(outcome=BY_SERVER, response_body_bytes=5)], closed_by_server=True),
    Case("no answer", [ask(GET), ask(GET)],
         [GOT_OK._replace(status=0, outcome=BY_SERVER, response_body_bytes=0)] * 2,
         closed_by_server=True),
    Case("only an interim answer", [ask(GET), answer(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 2")],
         [GOT_OK._replace(status=0, outcome=BY_CLIENT, response_body_bytes=0)],
         closed_by_server=False),
    Case("nobody asked, and then nobody answered",
         [answer(b"HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\nHTTP/1.1 5"), ask(GET)],
         [GOT_OK._replace(status=0, outcome=BY_SERVER, response_body_bytes=0)],
         closed_by_server=True),
    Case("bodies that look like HTTP",
         [post(b"Content-Length: %d" % len(EVIL * 40), body=EVIL * 40),
          ok(b"Content-Length: %d" % len(EVIL_ANSWER * 40), body=EVIL_ANSWER * 40),
          post(CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVIL), EVIL)),
          ok(CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(EVIL_ANSWER), EVIL_ANSWER))],
         [Seen("POST", b"/p", 200, COMPLETE, len(EVIL * 40), len(EVIL_ANSWER * 40)),
          Seen("POST", b"/p", 200, COMPLETE, len(EVIL), len(EVIL_ANSWER))]),
    Case("headers that look like HTTP",
         [request(b"GET /a HTTP/1.1", b"X: GET /evil HTTP/1.1", b"Content-Length: 0"), answer(OK)],
         [GOT_OK]),
    Case("long headers",
         [request(b"GET /a HTTP/1.1", b"Cookie: " + b"c" * 8192, b"n" * 8192 + b": x"),
          ok(b"Set-Cookie: " + b"c" * 8192, b"Content-Length: 2", body=b"ok"), ask(GET), answer(OK)],
         [GOT_OK, GOT_OK]),
    Case("many headers",
         [request(b"GET /a HTTP/1.1", *(b"X-%d: %d" % (i, i) for i in range(300))),
          ok(*(b"Y-%d:" % i for i in range(300)), b"Content-Length: 2", body=b"ok")],
         [GOT_OK]),
]  # fmt: skip

OTHERS: Final = [
    *(Case(f"not HTTP: {name}", [ask(first), answer(second), ask(EVIL), answer(EVIL_ANSWER)], [],
           Unread.OTHER)
      for name, first, second in (
          ("redis", b"*1\r\n$4\r\nPING\r\n", b"+PONG\r\n"),
          ("redis, inline", b"GET key\r\n", b"$-1\r\n"),
          ("memcached", b"get key\r\n", b"END\r\n"),
          ("memcached, a value", b"set key 0 0 5\r\nhello\r\n", b"STORED\r\n"),
          ("RTSP", b"OPTIONS rtsp://h/a RTSP/1.0\r\n\r\n", b"RTSP/1.0 200 OK\r\n\r\n"),
          ("SIP", b"INVITE sip:a@h SIP/2.0\r\n\r\n", b"SIP/2.0 200 OK\r\n\r\n"),
          ("HTTP/0.9", b"GET /a\r\n", b"<html>"),
          ("HTTP/1.2", b"GET /a HTTP/1.2\r\n\r\n", b"HTTP/1.2 200 OK\r\n\r\n"),
          ("a lower-case version", b"GET /a http/1.1\r\n\r\n", b"http/1.1 200 OK\r\n\r\n"),
          ("PostgreSQL", b"\0\0\0\x08\x04\xd2\x16/", b"N"),
          ("text", b"hello world, how are you?\n", b"fine\n"),
          ("zeros", bytes(40), bytes(40)),
          ("a NUL in the target", b"GET /a\0b HTTP/1.1\r\n\r\n", b"no"),
          ("a NUL in the method", b"G\0T /a HTTP/1.1\r\n\r\n", b"no"),
          ("TLS after a letter", b"G\x16", b"no"),
      )),
    Case("not HTTP: SMTP, where the server speaks first",
         [ask(b"220 mail.h ESMTP Postfix\r\n"), answer(b"EHLO h\r\n"), answer(EVIL)], [],
         Unread.OTHER),
    Case("TLS", [ask(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"), answer(b"\x16\x03\x03\0\x7a")], [],
         Unread.TLS),
    Case("HTTP/2", [ask(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04"), answer(b"\0\0\x12\x04")], [],
         Unread.HTTP2),
    Case("a version that changes",
         [ask(GET), answer(OK), ask(b"GET /b HTTP/1.1 \r\n\r\n"), ask(GET), answer(OK)], [GOT_OK],
         Unread.JOINED),
    Case("an answer that is none", [ask(GET), answer(b"hello\r\n"), answer(OK)],
         [GOT_OK._replace(status=0, outcome=UNKNOWN, response_body_bytes=0)], Unread.JOINED),
    Case("an answer of HTTP/2", [ask(GET), answer(b"HTTP/2 200\r\n\r\n"), answer(OK)],
         [GOT_OK._replace(status=0, outcome=UNKNOWN, response_body_bytes=0)], Unread.JOINED),
    Case("a status that is none", [ask(GET), answer(b"HTTP/1.1 099 Low\r\n\r\n"), answer(OK)],
         [GOT_OK._replace(status=0, outcome=UNKNOWN, response_body_bytes=0)], Unread.JOINED),
    Case("chunks that are none",
         [post(CHUNKED, body=b"5\r\nhello\r\nx\r\n"), answer(OK), ask(GET), answer(OK)],
         [posted(5, UNKNOWN, 0)], Unread.JOINED),
    Case("a chunk without an end",
         [post(CHUNKED, body=b"5\r\nhelloworld\r\n"), answer(OK)], [posted(5, UNKNOWN, 0)],
         Unread.JOINED),
    Case("a chunk that is too large",
         [ask(GET), ok(CHUNKED, body=b"fffffffffffffffff\r\n")],
         [GOT_OK._replace(outcome=UNKNOWN, response_body_bytes=0)], Unread.JOINED),
    Case("as many requests as are kept wait",
         [ask(GET * PIPELINE), answer(OK * PIPELINE), ask(GET), answer(OK)],
         [GOT_OK] * (PIPELINE + 1)),
    Case("more requests wait than are kept",
         [ask(GET * (PIPELINE + 1)), answer(OK * (PIPELINE + 1)), ask(GET), answer(OK)],
         [GOT_OK._replace(status=0, outcome=UNKNOWN, response_body_bytes=0)] * PIPELINE,
         Unread.BEHIND),
]  # fmt: skip

CASES: Final = [*PLAIN, *STATUSES, *TARGETS, *BODIES, *OTHERS]


@pytest.mark.parametrize("role", list(Role), ids=["client", "server"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_exchange_is_seen_once_however_its_bytes_are_cut(case: Case, role: Role) -> None:
    whole = talked(case, role)
    assert [Seen.of(one) for one in whole.exchanges] == list(case.seen)
    assert whole.unread is case.unread
    assert [one.number for one in whole.exchanges] == list(range(len(case.seen)))
    assert talked(case, role, most=1) == whole
    for number, part in enumerate(case.parts):
        for offset in range(1, len(part.content)):
            assert talked(case, role, (number, offset)) == whole, (number, offset)


# What is said of an exchange besides


def only(parts: Sequence[Part], *, by_server: bool | None = None) -> Exchange:
    talk = Talk()
    for part in parts:
        talk.feed(part)
    if by_server is not None:
        talk.end(by_server=by_server)
    (one,) = talk.answer().exchanges
    return one


def times(one: Exchange) -> tuple[int, int, int, int]:
    return one.began, one.asked, one.first, one.ended


def test_the_times_are_those_of_first_and_last_bytes() -> None:
    asked, answered = post(b"Content-Length: 2", body=b"hi").content, OK
    parts = [ask(b"\r\n"), *(ask(asked[i : i + 1]) for i in range(len(asked)))]
    parts += [answer(answered[i : i + 1]) for i in range(len(answered))]
    begun, whole = 2, 1 + len(asked)
    assert times(only(parts)) == (begun, whole, whole + 1, whole + len(answered))


def test_interim_answers_are_not_the_first_byte() -> None:
    early = answer(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    assert times(only([ask(GET), early, early, answer(OK[:1]), answer(OK[1:])])) == (1, 1, 4, 5)


def test_a_request_that_was_answered_early_has_no_last_byte() -> None:
    parts = [post(b"Content-Length: 2", body=b"h"), answer(OK), ask(b"i")]
    assert times(only(parts)) == (1, 0, 2, 2)
    assert times(only([ask(GET[:-2]), answer(OK), ask(b"\r\n")])) == (1, 0, 2, 2)


def test_an_answer_whose_hook_ran_first_took_no_time() -> None:
    assert times(only([answer(OK), ask(GET[:5]), ask(GET[5:])])) == (2, 3, 2, 3)


def test_an_answer_that_ends_with_the_connection_ended_with_its_last_byte() -> None:
    parts = [ask(GET), answer(b"HTTP/1.0 200 OK\r\n\r\n"), answer(b"ab")]
    assert times(only(parts, by_server=True)) == (1, 1, 2, 3)


def fnv_1a(characters: bytes) -> int:
    value = 0xCBF29CE484222325
    for character in characters:
        value = (value ^ character) * 0x100000001B3 % (1 << 64)
    return value


@pytest.mark.parametrize("length", [1, PATH_BYTES, PATH_BYTES + 1, 5000])
def test_a_path_is_told_apart_by_all_of_it(length: int) -> None:
    path = b"/" + b"x" * (length - 1)
    one = only([ask(b"GET " + path + b"?query HTTP/1.1\r\n\r\n"), answer(OK)])
    assert (one.path, one.path_hash) == (path[:PATH_BYTES], fnv_1a(path))
    assert one.path_flags == PATH_QUERIED | (PATH_CUT if length > PATH_BYTES else 0)


def test_a_path_that_was_answered_before_its_end_is_marked() -> None:
    assert only([ask(b"GET /long"), answer(OK)]).path_flags == PATH_CUT
    assert only([ask(b"GET /long "), answer(OK)]).path_flags == 0
    assert only([ask(b"GET /long?que"), answer(OK)]).path_flags == PATH_QUERIED


@pytest.mark.parametrize("version", [0, 1])
def test_the_version_is_the_requests(version: int) -> None:
    assert only([ask(b"GET / HTTP/1.%d\r\n\r\n" % version), answer(OK)]).version == version


def test_bytes_of_bodies_count_although_nobody_sees_them() -> None:
    talk = Talk()
    talk.feed(post(b"Content-Length: 1000000000000"))
    talk.unseen(1_000_000_000_000, is_request=True)
    talk.feed(ok(CHUNKED, body=b"64\r\nseen"))
    talk.unseen(96, is_request=False)
    talk.feed(answer(b"\r\n0\r\n\r\n"))
    (one,) = talk.answer().exchanges
    assert Seen.of(one) == Seen("POST", b"/p", 200, COMPLETE, 1_000_000_000_000, 100)


@pytest.mark.parametrize(("head", "length"), [(b"GET ", 1), (b"", 1), (GET, 1), (GET, 100)])
def test_bytes_of_heads_that_nobody_sees_lose_track(head: bytes, length: int) -> None:
    talk = Talk()
    talk.feed(ask(head))
    talk.unseen(length, is_request=True)
    talk.feed(answer(OK))
    found = talk.answer()
    assert [(one.status, one.outcome) for one in found.exchanges] == (
        [(0, UNKNOWN)] if head == GET else []
    )
    assert found.unread is Unread.JOINED


def test_what_was_on_trial_is_an_exchange_once_it_is_answered() -> None:
    talk = Talk(on_trial=True)
    talk.feed(ask(GET + GET))
    talk.feed(answer(OK + OK))
    assert [Seen.of(one) for one in talk.answer().exchanges] == [GOT_OK, GOT_OK]


@pytest.mark.parametrize("after", [answer(b"hello\r\n"), ask(b"\0"), answer(b"HTTP/1.1 2x")])
def test_what_was_on_trial_is_none_where_something_else_follows(after: Part) -> None:
    talk = Talk(on_trial=True)
    talk.feed(ask(GET + GET + GET))
    talk.feed(after)
    talk.end(by_server=True)
    assert talk.answer()[:2] == ((), Unread.JOINED)


# h11 reads the same


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
            head.method.decode(), head.target, final.status_code, COMPLETE, len(body), len(content)
        )


def path_of(target: bytes) -> bytes:
    """The path of a target that begins with it or with an authority, as much as is kept of it."""
    path = target.partition(b"?")[0]
    if b"://" in target.partition(b"?")[0][:8]:
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
    command = [fuzzer(), str(first), str(conversations)]
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
