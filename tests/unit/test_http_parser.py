"""What the parser of http_latency makes of conversations, however their bytes are cut. It is the C
that the kernel runs, compiled for this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import pytest

from tests.http_parser import (
    CHUNKED,
    EVIL,
    EVIL_ANSWER,
    GET,
    GOT_OK,
    OK,
    PATH_BYTES,
    Answer,
    Outcome,
    Part,
    Role,
    Seen,
    Talk,
    Unread,
    answer,
    ask,
    ok,
    post,
    request,
    response,
)

COMPLETE, UPGRADED, UNKNOWN = Outcome.COMPLETE, Outcome.UPGRADED, Outcome.UNKNOWN
BY_CLIENT, BY_SERVER = Outcome.ABORTED_BY_CLIENT, Outcome.ABORTED_BY_SERVER


@dataclass(frozen=True)
class Case:
    name: str
    parts: Sequence[Part]
    seen: Sequence[Seen]
    unread: Unread = Unread.NONE
    closed_by_server: bool | None = field(default=None, kw_only=True)
    """Who ends the connection after the parts; nobody if None."""


def talked(case: Case, role: Role, cut: tuple[int, int] | None = None, most: int = 0) -> Answer:
    """The answer to CASE, with one part cut at an offset, or all in pieces of MOST bytes."""
    talk = Talk(role)
    if most:
        talk.feed_all(case.parts, most)
    for number, part in enumerate(() if most else case.parts):
        talk.feed(part, cut[1:] if cut and cut[0] == number else ())
    if case.closed_by_server is not None:
        talk.end(by_server=case.closed_by_server)
    return talk.answer()


def posted(length: int, outcome: Outcome = COMPLETE, status: int = 200) -> Seen:
    answered = 2 if status == 200 else 0
    return Seen("POST", b"/p", status, outcome, length, answered)


NO_CONTENT: Final = response(b"HTTP/1.1 204 No Content")
BAD: Final = response(b"HTTP/1.1 400 Bad Request", b"Content-Length: 0")

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
          answer(b"HTTP/1.1 100 Continue\r\n\r\n"), ask(b"abc"), answer(OK)],
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
    Case("CONNECT, and a tunnel that is used before it is there",
         [ask(b"CONNECT h:443 HTTP/1.1\r\n\r\n\x16\x03\x01"), ask(EVIL),
          response(b"HTTP/1.1 200 Connection established"), answer(EVIL_ANSWER)],
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
         [ask(b"HEAD /h HTTP/1.1\r\n\r\n" + GET),
          answer(b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n"), answer(OK)],
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
    Case("a path that fits",
         [ask(b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * (PATH_BYTES - 1))), answer(OK)],
         [GOT_OK._replace(path=b"/" + b"x" * (PATH_BYTES - 1))]),
    Case("a long path", [ask(b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * 5000)), answer(OK)],
         [GOT_OK._replace(path=b"/" + b"x" * (PATH_BYTES - 1))]),
    Case("a long query", [ask(b"GET /a?%s HTTP/1.1\r\n\r\n" % (b"x" * 5000)), answer(OK)],
         [GOT_OK]),
    Case("a space in the target", [ask(b"GET /a b HTTP/1.1\r\n\r\n"), BAD], [], Unread.OTHER),
]  # fmt: skip

BODIES: Final = [
    Case("a length",
         [post(b"Content-Length: 5", body=b"hello"), ok(b"content-LENGTH:2", body=b"ok")],
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
                    b" 99999999999999999999", b" 5\r 5", b" 5\0", b" \xb5", b" 5\r\n 5",
                    b"\r\n 5")),
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
                  b"content-lengths: 5", b"Content-Lengt: 5", b"Content\rLength: 5",
                  b"Content-Type: 5", b"Content_Length: 5", b"Transfer-Encodings: chunked",
                  b"Transfer-Encodin: chunked", b"TE: chunked", b"C: 5", b"t: chunked",
                  b"Content-Length", b": 5", b"Content-Length\0: 5", b"\0: 5",
                  b" Content-Length: 5", b"\x03ontent-Length: 5"),
          answer(OK), ask(GET), answer(OK)],
         [GOT_OK, GOT_OK]),
    Case("lines that go on in the next",
         [request(b"GET /a HTTP/1.1", b"X: y", b" Content-Length: 5", b"\t" + CHUNKED),
          answer(OK), ask(GET), answer(OK)],
         [GOT_OK, GOT_OK]),
    Case("chunks, extensions and trailers",
         [post(CHUNKED, body=b"5\r\nhello\r\n00A ; x=\"y;\r\r\nEVIL /evi\n\r\n"
               b"0;last\r\nContent-Length: 9\r\nTransfer-Encoding: x\r\n\r\n"),
          ok(b"transfer-encoding:\tChunked\t", body=b"1\r\no\r\n1\nk\n000\r\n\r\n"), ask(GET),
          answer(OK)],
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
      for value in (b" gzip", b"chunked, gzip", b" xchunked", b" abcdefghchunked", b"",
                    b" chunked;q=1", b" chunked\r\nTransfer-Encoding: gzip", b" chunked\r\n x",
                    b"\r\n chunked", b' "chunked"')),
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
          ok(b"Set-Cookie: " + b"c" * 8192, b"Content-Length: 2", body=b"ok"), ask(GET),
          answer(OK)],
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
    Case("TLS",
         [ask(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03"), answer(b"\x16\x03\x03\0\x7a")], [],
         Unread.TLS),
    Case("HTTP/2",
         [ask(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04"), answer(b"\0\0\x12\x04")], [],
         Unread.HTTP2),
    Case("HTTP/2, where the server speaks first",
         [ask(b"\0\0\x12\x04\0\0\0\0\0" + bytes(18)),
          answer(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")], [],
         Unread.HTTP2),
    Case("frames of HTTP/2 that are no settings",
         [ask(b"\0\0\x12\x04\x01\0\0\0\0"), answer(b"no")], [], Unread.OTHER),
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
         [posted(5)], Unread.JOINED),
    Case("a chunk without an end",
         [post(CHUNKED, body=b"5\r\nhelloworld\r\n"), answer(OK)], [posted(5)], Unread.JOINED),
    Case("more than a length said",
         [post(b"Content-Length: 5", body=b"hello!\0!"), answer(OK), BAD],
         [posted(5)], Unread.JOINED),
    Case("pipelined requests and then none",
         [ask(GET + GET + b"\x16\x03\x01"), answer(OK), ask(EVIL), answer(OK)], [GOT_OK, GOT_OK],
         Unread.JOINED),
    Case("a chunk that is too large",
         [ask(GET), ok(CHUNKED, body=b"fffffffffffffffff\r\n")],
         [GOT_OK._replace(outcome=UNKNOWN, response_body_bytes=0)], Unread.JOINED),
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
