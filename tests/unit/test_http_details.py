"""What the parser of http_latency copies of the head of a request where a session wants it: the
query, the host, and the ids of a trace."""

from __future__ import annotations

from typing import Final

import pytest

from tests.http_parser import (
    GET,
    HAS_TRACE,
    HOST_BYTES,
    HOST_CUT,
    OK,
    PATH_BYTES,
    PATH_CUT,
    PATH_QUERIED,
    QUERY_CUT,
    Exchange,
    Role,
    Talk,
    Want,
    answer,
    ask,
)

ALL: Final = Want.QUERY | Want.TRACE | Want.HOST
TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7"
HEADER: Final = f"00-{TRACE}-01"


def seen(
    head: bytes,
    wants: Want = ALL,
    cut: int = 0,
    role: Role = Role.SERVER,
    *,
    bytewise: bool = False,
) -> Exchange:
    """The one exchange of a request with HEAD, cut at an offset or everywhere, and answered."""
    talk = Talk(role, wants=wants)
    cuts = range(1, len(head)) if bytewise else [cut] if cut else []
    talk.feed(ask(head), cuts)
    talk.feed(answer(OK))
    (one,) = talk.answer().exchanges
    return one


def get(target: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join((b"GET " + target + b" HTTP/1.1", *headers, b"", b""))


FULL: Final = get(
    b"/orders/7?user=a&b=%20c",
    b"Transfer-encodings: none",
    b"Content-Length: 0",
    b"Host: shop.example:8080",
    b"Accept: */*",
    b"Trace-parent: x",
    b"TraceParent: " + HEADER.encode(),
    b"Content-Length: 0",
)


def test_all_details_are_the_same_wherever_the_head_is_cut() -> None:
    whole = seen(FULL)
    assert whole.path == b"/orders/7"
    assert whole.query == b"user=a&b=%20c"
    assert whole.host == b"shop.example:8080"
    assert whole.trace == TRACE
    assert whole.path_hash == seen(get(b"/orders/7"), Want.NOTHING).path_hash
    for role in Role:
        assert seen(FULL, role=role) == whole
        assert seen(FULL, role=role, bytewise=True) == whole
        for cut in range(1, len(FULL)):
            assert seen(FULL, cut=cut, role=role) == whole, cut


@pytest.mark.parametrize("wants", [Want(n) for n in range(8)])
def test_nothing_is_copied_that_nobody_wants(wants: Want) -> None:
    for bytewise in (False, True):
        one = seen(FULL, wants, bytewise=bytewise)
        assert one.query == (b"user=a&b=%20c" if wants & Want.QUERY else b"")
        assert one.host == (b"shop.example:8080" if wants & Want.HOST else b"")
        assert one.trace == (TRACE if wants & Want.TRACE else "")
        assert one.path_flags & PATH_QUERIED


def test_a_request_has_no_detail_of_another_one() -> None:
    talk = Talk(wants=ALL)
    for head in (FULL, GET, FULL, GET.replace(b"Host: h\r\n", b"")):
        talk.feed(ask(head))
    talk.feed(answer(OK * 4))
    talk.want(Want.NOTHING)
    talk.feed(ask(FULL))
    talk.feed(answer(OK))
    full, short = (b"user=a&b=%20c", b"shop.example:8080", TRACE), (b"", b"h", "")
    found = [(one.query, one.host, one.trace) for one in talk.answer().exchanges]
    assert found == [full, short, full, (b"", b"", ""), (b"", b"", "")]


# Queries


@pytest.mark.parametrize(
    ("path", "query", "kept", "cut"),
    [
        (b"/", b"", b"", False),
        (b"/", b"?a=?", b"?a=?", False),
        (b"/", b"q" * (PATH_BYTES - 1), b"q" * (PATH_BYTES - 1), False),
        (b"/", b"q" * PATH_BYTES, b"q" * (PATH_BYTES - 1), True),
        (b"/" * PATH_BYTES, b"", b"", False),
        (b"/" * PATH_BYTES, b"q", b"", True),
        (b"/" * (PATH_BYTES + 9), b"q" * 2000, b"", True),
    ],
)
def test_a_query_has_the_room_that_the_path_leaves(
    path: bytes, query: bytes, kept: bytes, cut: bool
) -> None:
    for bytewise in (False, True):
        one = seen(get(path + b"?" + query), bytewise=bytewise)
        assert (one.path, one.query) == (path[:PATH_BYTES], kept)
        assert bool(one.path_flags & QUERY_CUT) == cut
        assert bool(one.path_flags & PATH_CUT) == (len(path) > PATH_BYTES)


def test_details_of_a_head_that_was_answered_before_its_end_are_marked() -> None:
    for head, query, host, flags in (
        (b"GET /a?lon", b"lon", b"", QUERY_CUT | PATH_QUERIED),
        (b"GET /a?long ", b"long", b"", PATH_QUERIED),
        (b"GET /a HTTP/1.1\r\nHost: sho", b"", b"sho", HOST_CUT),
        (b"GET /a HTTP/1.1\r\nHost: shop\r", b"", b"shop", 0),
    ):
        talk = Talk(wants=ALL)
        talk.feed(ask(head))
        talk.feed(answer(OK))
        talk.feed(ask(b"gest\r\n\r\n"))
        talk.feed(ask(GET))
        talk.feed(answer(OK))
        early, *_ = talk.answer().exchanges
        assert (early.query, early.host, early.path_flags) == (query, host, flags)


# Hosts


@pytest.mark.parametrize(
    ("head", "host"),
    [
        (get(b"/", b"Host: a"), b"a"),
        (get(b"/", b"HOST:a.example  "), b"a.example"),
        (get(b"/", b"host:\t[::1]:80"), b"[::1]:80"),
        (get(b"/", b"Host:"), b""),
        (get(b"/", b"Host: ", b"X: y"), b""),
        (get(b"/", b"Hosts: a", b"Ho: b", b"X-Host: c"), b""),
        (get(b"/", b"Host: a", b"Host: b"), b"a"),
        (get(b"http://a.example:81/b", b"Host: other"), b"a.example:81"),
        (get(b"http://a.example?q", b"Host: other"), b"a.example"),
        (get(b"http://a.example"), b"a.example"),
        (get(b"http://user:secret@a/b"), b"a"),
        (get(b"http://" + b"u" * 100 + b"@a/b"), b"a"),
        (get(b"https:/odd/secret", b"Host: a"), b"a"),
        (b"CONNECT a.example:443 HTTP/1.1\r\nHost: other\r\n\r\n", b"a.example:443"),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", b"a"),
        (b"GET / HTTP/1.1\nHost: a\n\n", b"a"),
    ],
)
def test_the_host_is_that_of_the_target_or_of_the_header(head: bytes, host: bytes) -> None:
    for bytewise in (False, True):
        one = seen(head, Want.HOST, bytewise=bytewise)
        assert (one.host, one.path_flags & HOST_CUT) == (host, 0)
        assert one._replace(host=b"") == seen(head, Want.NOTHING)


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\nHost: %b\r\n\r\n", b"GET http://%b/ HTTP/1.1\r\n\r\n"]
)
@pytest.mark.parametrize("length", [HOST_BYTES - 1, HOST_BYTES, HOST_BYTES + 1, 3000])
def test_a_long_host_is_cut_and_marked(head: bytes, length: int) -> None:
    for bytewise in (False, True):
        one = seen(head % (b"h" * length), bytewise=bytewise)
        assert one.host == b"h" * min(length, HOST_BYTES)
        assert bool(one.path_flags & HOST_CUT) == (length > HOST_BYTES)


# Traces


@pytest.mark.parametrize(
    ("value", "is_valid"),
    [
        (HEADER, True),
        (f"  {HEADER}\t ", True),
        (f"01-{TRACE}-00", True),
        (f"cc-{TRACE}-01-what-the-future-will-be", True),
        (f"fe-{TRACE}-01-", True),
        (f"cc-{TRACE}-01.what", False),
        (f"00-{TRACE}-01-more", False),
        (f"00-{TRACE}-0", False),
        (f"00-{TRACE}", False),
        (f"0-{TRACE}-01", False),
        (f"000-{TRACE}-01", False),
        (f"ff-{TRACE}-01", False),
        (f"00-{TRACE.upper()}-01", False),
        (f"0A-{TRACE}-01", False),
        (f"00-{TRACE}-0A", False),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", False),
        (f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01", False),
        (f"00-{'0' * 31}1-{'0' * 15}1-00", True),
        (f"00-1{'0' * 31}-1{'0' * 15}-00", True),
        (f"00_{TRACE}-01", False),
        (f"00-{TRACE.replace('-', '_')}-01", False),
        (f"00-{TRACE}_01", False),
        (f"00-{TRACE.replace('4b', '4g')}-01", False),
        (f"{HEADER} {HEADER}", False),
        (f"{HEADER},{HEADER}", False),
        (f"00- {TRACE}-01", False),
        ("", False),
        ("-", False),
    ],
)
def test_a_trace_is_one_if_it_is_valid(value: str, is_valid: bool) -> None:
    head = get(b"/", b"traceparent:" + value.encode(), b"X: y")
    expected = "-".join(value.strip().split("-")[1:3]) if is_valid else ""
    for bytewise in (False, True):
        one = seen(head, bytewise=bytewise)
        assert (one.trace, bool(one.path_flags & HAS_TRACE)) == (expected, is_valid)


def test_of_several_traces_none_is_one() -> None:
    header = b"traceparent: " + HEADER.encode()
    assert not seen(get(b"/", header, header)).trace
    assert not seen(get(b"/", header, b"traceparent: x")).trace
    assert not seen(get(b"/", b"traceparent: x", header)).trace


def test_headers_of_a_response_are_nobodys_details() -> None:
    talk = Talk(wants=ALL)
    talk.feed(ask(GET))
    headers = b"\r\nHost: x\r\ntraceparent: " + HEADER.encode() + b"\r\n"
    talk.feed(answer(OK.replace(b"\r\n", headers, 1)))
    (one,) = talk.answer().exchanges
    assert (one.host, one.trace, one.status) == (b"h", "", 200)
