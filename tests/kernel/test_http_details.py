"""Query, host and trace of requests: with a session that asks for them, and with no other."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Final

import pytest

from coral import bpf
from coral.collectors.http_latency.collector import HttpLatencyCollector
from tests.http_seen import CLIENT, SERVER, Request, Seen, seeing
from tests.support import Puppet, at_work, wait_until

pytestmark = pytest.mark.usefixtures("http_supported", "nothing_left")

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT: Final = "00f067aa0ba902b7"
HEAD: Final = (
    b"GET /users/7?token=secret HTTP/1.1\r\nHost: shop.example:8080\r\n"
    b"Traceparent: 00-%b-%b-01\r\n\r\n" % (TRACE.encode(), PARENT.encode())
)
ALL: Final = {"include_query": "true", "include_host": "true", "traceparent": "true"}
NOTHING: Final = ("", "", "", "")
EVERYTHING: Final = ("token=secret", "shop.example:8080", TRACE, PARENT)


def watching(
    puppet: Puppet, options: Mapping[str, str], without: tuple[str, ...] = ()
) -> AbstractContextManager[Seen]:
    """What a session with OPTIONS sees of a process."""
    return seeing(puppet.pid, without=without, tls="false", **options)


def details(request: Request) -> tuple[str, str, str, str]:
    return request.query, request.host, request.trace_id, request.parent_span_id


def seen_details(seen: Seen, count: int) -> list[tuple[str, str, str, str]]:
    """Those of COUNT requests, which are the same on both sides."""
    found = [[details(each) for each in seen.wait_for(count, role)] for role in (CLIENT, SERVER)]
    assert found[0] == found[1]
    assert not seen.lost
    return found[0]


@pytest.mark.parametrize("without", [(), ("socket_hooks",)], ids=["sockets", "system calls"])
def test_details_are_copied_wherever_the_head_is_cut(
    both_ends: Puppet, without: tuple[str, ...]
) -> None:
    with watching(both_ends, ALL, without) as seen:
        code = f"head = {HEAD!r}\nfor n in range(1, len(head)): exchange(head[:n], head[n:])"
        both_ends.do(f"exec({code!r})")
        assert seen_details(seen, len(HEAD) - 1) == [EVERYTHING] * (len(HEAD) - 1)
        assert {each.path for each in seen.requests} == {"/users/7"}


@pytest.mark.parametrize("option", ["include_query", "include_host", "traceparent", ""])
def test_each_session_has_what_it_asks_for_and_nothing_else(both_ends: Puppet, option: str) -> None:
    own = {option: "true"} if option else {}
    wanted = {
        "include_query": (EVERYTHING[0], "", "", ""),
        "include_host": ("", EVERYTHING[1], "", ""),
        "traceparent": ("", "", *EVERYTHING[2:]),
        "": NOTHING,
    }[option]
    with (
        watching(both_ends, own) as one,
        watching(both_ends, ALL) as other,
    ):
        for _ in range(3):
            both_ends.do(f"exchange({HEAD!r})")
        assert seen_details(one, 3) == [wanted] * 3
        assert seen_details(other, 3) == [EVERYTHING] * 3


def test_no_byte_of_a_query_leaves_the_kernel_for_a_session_that_does_not_ask(
    both_ends: Puppet,
) -> None:
    config = {"pid": str(both_ends.pid), "mode": "events", "tls": "false"}
    collector = HttpLatencyCollector.create(config, None, bpf.probe())
    with at_work(collector), watching(both_ends, ALL) as other:
        for path in (b"/", b"/users/7", b"/seventeen-letters"):
            both_ends.do(f"exchange({HEAD.replace(b'/users/7', path)!r})")
        seen_details(other, 3)
        raw = bytearray()

        def drained() -> bool:
            assert collector.records
            for records in collector.records.drain().values():
                raw.extend(records.tobytes())
            return raw.count(b"/seventeen-letters") == 2

        wait_until(drained)
        assert all(secret not in raw for secret in (b"token", b"secret", b"shop.example"))


def test_a_session_that_begins_later_has_the_details_of_the_next_request(both_ends: Puppet) -> None:
    with watching(both_ends, {}) as first:
        both_ends.do(f"exchange({HEAD!r})")
        with watching(both_ends, ALL) as second:
            for _ in range(2):
                both_ends.do(f"exchange({HEAD!r})")
            assert seen_details(second, 2) == [EVERYTHING] * 2
        both_ends.do(f"exchange({HEAD!r})")
        assert seen_details(first, 4) == [NOTHING] * 4


def test_pipelined_requests_keep_their_own_details(both_ends: Puppet) -> None:
    heads = b"".join(b"GET /%d?q=%d HTTP/1.1\r\nHost: h%d\r\n\r\n" % (n, n, n) for n in range(20))
    with watching(both_ends, ALL) as seen:
        both_ends.do(f"exchange({heads!r})")
        answers = b"HTTP/1.1 204 No Content\r\n\r\n" * 19
        both_ends.do(f"s.sendall({answers!r}); c.recv({len(answers)}, socket.MSG_WAITALL)")
        assert seen_details(seen, 20) == [(f"q={n}", f"h{n}", "", "") for n in range(20)]


def test_what_is_too_long_is_cut_and_marked(both_ends: Puppet) -> None:
    with watching(both_ends, ALL) as seen:
        head = b"GET /a?%b HTTP/1.1\r\nHost: %b\r\n\r\n" % (b"q" * 300, b"h" * 65)
        both_ends.do(f"exchange({head!r})")
        assert seen_details(seen, 1) == [("q" * 254 + "…", "h" * 64 + "…", "", "")]
        assert seen.requests[0].path == "/a"
