"""`http_latency` however the bytes lie on the wire, and however a request ends: two processes that
use their sockets exactly as told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.http_seen import (
    BY_CLIENT,
    BY_SERVER,
    CLIENT,
    COMPLETE,
    SERVER,
    UPGRADED,
    Request,
    Seen,
    seeing_plain,
)
from tests.network import connected, puppets
from tests.support import Puppet, wait_until

pytestmark = [pytest.mark.usefixtures("http_programs", "nothing_left"), pytest.mark.long]


TCP_CLOSE = "7"


@pytest.fixture
def pair() -> Iterator[tuple[Puppet, Puppet]]:
    """A client and a server, connected: `c` and `s`, with functions to send and receive a message
    in two parts, or by single bytes."""
    code = (
        "import socket\n"
        "def take(it, length):\n"
        "  got = it.recv(length, socket.MSG_WAITALL) if length else b''\n"
        "  assert len(got) == length\n"
        "def give_split(it, data, at):\n"
        "  it.send(data[:at])\n"
        "  it.send(data[at:])\n"
        "def take_split(it, data, at):\n"
        "  take(it, at)\n"
        "  take(it, len(data) - at)\n"
        "def give_bytes(it, data):\n"
        "  for at in range(len(data)): it.send(data[at:at+1])\n"
        "def take_bytes(it, data):\n"
        "  for _ in data: take(it, 1)\n"
    )
    with puppets(2) as (client, server):
        for puppet in (client, server):
            puppet.do(f"exec({code!r})")
        connected(client, server, "127.0.0.1")
        for puppet, name in ((client, "c"), (server, "s")):
            puppet.do(f"{name}.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)")
        yield client, server


def _both(seen: Seen, count: int = 1) -> tuple[list[Request], list[Request]]:
    """The requests of the client and of the server, once there are COUNT of each."""
    found = seen.wait_for(count, CLIENT), seen.wait_for(count, SERVER)
    assert not seen.lost
    return found


def _exchange_all(pair: tuple[Puppet, Puppet], each: str) -> None:
    """Has both run EACH, a block that calls `give` and `take`, or what begins with these, in the
    order of the client."""
    client, server = pair
    other = each.replace("give", "GIVE").replace("take", "give").replace("GIVE", "take")
    server.begin(f"exec({other.replace('END', 's')!r})")
    client.do(f"exec({each.replace('END', 'c')!r})")
    server.done()


_REQUEST = (
    "b'POST /split/%04d?secret=1 HTTP/1.1\\r\\nhost: a\\r\\nContent-Length: 5\\r\\n\\r\\nhello' % n"
)
_RESPONSE = (
    "b'HTTP/1.1 100 Continue\\r\\n\\r\\nHTTP/1.1 202 Accepted\\r\\nTransfer-Encoding: chunked\\r\\n"
    "\\r\\n4;x=y\\r\\nabcd\\r\\n00003\\r\\nGET\\r\\n0\\r\\nTrailer: 1\\r\\n\\r\\n'"
)


def test_messages_split_at_every_offset(pair: tuple[Puppet, Puppet]) -> None:
    with seeing_plain(*(puppet.pid for puppet in pair)) as seen:
        _exchange_all(
            pair,
            f"for n in range(200):\n"
            f"  data = {_REQUEST}\n"
            "  give_split(END, data, n % len(data))\n"
            f"  data = {_RESPONSE}\n"
            "  take_split(END, data, n % len(data))",
        )
        for found in _both(seen, 200):
            assert [each.exchange for each in found] == [
                ("POST", f"/split/{n:04}", 202, 5, 7) for n in range(200)
            ]
            assert {each.outcome for each in found} == {COMPLETE}


def test_messages_sent_and_read_by_single_bytes(pair: tuple[Puppet, Puppet]) -> None:
    with seeing_plain(*(puppet.pid for puppet in pair)) as seen:
        _exchange_all(
            pair,
            f"for n in range(3):\n"
            f"  data = {_REQUEST}\n"
            "  give_bytes(END, data)\n"
            f"  data = {_RESPONSE}\n"
            "  take_bytes(END, data)",
        )
        for found in _both(seen, 3):
            assert [each.exchange for each in found] == [
                ("POST", f"/split/{n:04}", 202, 5, 7) for n in range(3)
            ]


def test_heads_of_every_length_up_to_three_windows(pair: tuple[Puppet, Puppet]) -> None:
    lengths = [*range(1, 40), *range(380, 560), *range(960, 1060), 20_000]
    with seeing_plain(*(puppet.pid for puppet in pair)) as seen:
        _exchange_all(
            pair,
            f"for n in {lengths}:\n"
            "  pad = b'x' * n\n"
            "  data = b'PUT /long/%d HTTP/1.1\\r\\nA: %b\\r\\n' % (n, pad)\n"
            "  data += b'Content-Length: 3\\r\\n\\r\\nabc'\n"
            "  give_split(END, data, len(data))\n"
            "  data = b'HTTP/1.1 200 OK\\r\\nA: %b\\r\\nContent-Length: 2\\r\\n\\r\\nok' % pad\n"
            "  take_split(END, data, len(data))",
        )
        for found in _both(seen, len(lengths)):
            assert [each.exchange for each in found] == [
                ("PUT", f"/long/{n}", 200, 3, 2) for n in lengths
            ]


def test_pipelined_requests_are_answered_first_in_first_out(pair: tuple[Puppet, Puppet]) -> None:
    with seeing_plain(*(puppet.pid for puppet in pair)) as seen:
        _exchange_all(
            pair,
            "methods = [b'GET', b'HEAD', b'DELETE', b'brew'] * 8\n"
            "asked = b''.join(\n"
            "  b'%b /pipe/%d HTTP/1.1\\r\\n\\r\\n' % (m, n) for n, m in enumerate(methods))\n"
            "told = b''.join(\n"
            "  b'HTTP/1.1 %d X\\r\\nContent-Length: %d\\r\\n\\r\\n' % (210 + n, n)\n"
            "  + (b'' if m == b'HEAD' else b'x' * n) for n, m in enumerate(methods))\n"
            "give_split(END, asked, len(asked) // 2)\n"
            "take_split(END, told, len(told) // 2)",
        )
        names = ["GET", "HEAD", "DELETE", "OTHER"] * 8
        for found in _both(seen, 32):
            assert [each.exchange for each in found] == [
                (name, f"/pipe/{n}", 210 + n, 0, 0 if name == "HEAD" else n)
                for n, name in enumerate(names)
            ]
            assert [each.number for each in found] == list(range(32))


_GET = r"b'GET /it HTTP/1.1\r\n\r\n'"
_HALF = r"b'HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345'"
_TO_CLOSE = r"b'HTTP/1.1 200 OK\r\n\r\n12345'"


def _asked(client: Puppet, server: Puppet, what: str = _GET) -> None:
    client.do(f"data = {what}; c.sendall(data)")
    server.do(f"take(s, len({what}))")


def _answered(client: Puppet, server: Puppet, what: str) -> None:
    server.do(f"data = {what}; s.sendall(data)")
    client.do(f"take(c, len({what}))")


def client_closes(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    client.do("c.close()")
    server.do("assert s.recv(1) == b''; s.close()")


def client_resets(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    client.do("import struct; linger = struct.pack('ii', 1, 0)")
    client.do("c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); c.close()")
    server.do("exec('try: s.recv(1)\\nexcept ConnectionResetError: s.close()')")


def client_closes_halfway(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    _answered(client, server, _HALF)
    client.do("c.close()")
    server.do("assert s.recv(1) == b''; s.close()")


def client_closes_in_its_body(client: Puppet, server: Puppet) -> None:
    _asked(client, server, r"b'POST /it HTTP/1.1\r\nContent-Length: 10\r\n\r\n12345'")
    client.do("c.close()")
    server.do("assert s.recv(1) == b''; s.close()")


def client_is_killed(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    client.kill()
    server.do("assert s.recv(1) == b''; s.close()")


def server_closes(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    server.do("s.close()")
    client.do("assert c.recv(1) == b''; c.close()")


def server_resets(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    server.do("import struct; linger = struct.pack('ii', 1, 0)")
    server.do("s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); s.close()")
    client.do("exec('try: c.recv(1)\\nexcept ConnectionResetError: c.close()')")


def server_closes_halfway(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    _answered(client, server, _HALF)
    server.do("s.close()")
    client.do("assert c.recv(1) == b''; c.close()")


def server_is_killed(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    server.kill()
    client.do("assert c.recv(1) == b''; c.close()")


def server_is_killed_halfway(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    _answered(client, server, _HALF)
    server.kill()
    client.do("assert c.recv(1) == b''; c.close()")


def body_ends_with_the_connection(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    _answered(client, server, _TO_CLOSE)
    server.do("s.close()")
    client.do("assert c.recv(1) == b''; c.close()")


def body_ends_with_a_reset(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    _answered(client, server, _TO_CLOSE)
    server.do("import struct; linger = struct.pack('ii', 1, 0)")
    server.do("s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); s.close()")
    client.do("exec('try: c.recv(1)\\nexcept ConnectionResetError: c.close()')")


def client_ends_its_side_first(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    client.do("c.shutdown(socket.SHUT_WR)")
    server.do("assert s.recv(1) == b''")
    _answered(client, server, r"b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12345'")
    server.do("s.close()")
    client.do("assert c.recv(1) == b''; c.close()")


def client_ends_its_side_and_body_ends_later(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    client.do("c.shutdown(socket.SHUT_WR)")
    server.do("assert s.recv(1) == b''")
    _answered(client, server, _TO_CLOSE)
    server.do("s.close()")
    client.do("assert c.recv(1) == b''; c.close()")


def _answered_and_closed(server: Puppet) -> None:
    server.do(r"s.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12345'); s.close()")


def _reads_late(client: Puppet) -> None:
    """Reads when the kernel has long ended the connection."""
    wait_until(lambda: client.ask("c.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO)") == TCP_CLOSE)
    client.do("take(c, 43); c.close()")


def client_reads_late(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    _answered_and_closed(server)
    client.do("take(c, 43); c.close()")


def client_ends_its_side_and_reads_late(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    client.do("c.shutdown(socket.SHUT_WR)")
    server.do("assert s.recv(1) == b''")
    _answered_and_closed(server)
    _reads_late(client)


def client_reads_after_a_reset(client: Puppet, server: Puppet) -> None:
    client.do(r"c.sendall(b'GET /it HTTP/1.1\r\n\r\n-')")
    server.do("take(s, 20); s.recv(1, socket.MSG_PEEK)")
    _answered_and_closed(server)
    _reads_late(client)


def body_ends_with_a_reset_that_comes_before_it_is_read(client: Puppet, server: Puppet) -> None:
    client.do(r"c.sendall(b'GET /it HTTP/1.1\r\n\r\n-')")
    server.do("take(s, 20); s.recv(1, socket.MSG_PEEK)")
    server.do(f"s.sendall({_TO_CLOSE}); s.close()")
    wait_until(lambda: client.ask("c.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO)") == TCP_CLOSE)
    client.do(f"take(c, len({_TO_CLOSE}))")
    client.do("exec('try: c.recv(1)\\nexcept ConnectionResetError: c.close()')")


def server_refuses_a_body(client: Puppet, server: Puppet) -> None:
    _asked(client, server, r"b'POST /it HTTP/1.1\r\nContent-Length: 10\r\n\r\n12345'")
    _answered(client, server, r"b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12345'")
    server.do("s.close()")
    client.do("assert c.recv(1) == b''; c.close()")


def goes_on_with_another_protocol(client: Puppet, server: Puppet) -> None:
    _asked(client, server)
    _answered(client, server, r"b'HTTP/1.1 101 Over\r\n\r\n12345'")
    _asked(client, server, r"b'GET /never HTTP/1.1\r\n\r\n'")
    client.do("c.close()")
    server.do("assert s.recv(1) == b''; s.close()")


def tunnels(client: Puppet, server: Puppet) -> None:
    _asked(client, server, r"b'CONNECT it:443 HTTP/1.1\r\n\r\n'")
    _answered(client, server, r"b'HTTP/1.1 200 OK\r\n\r\n12345'")
    _asked(client, server, r"b'GET /never HTTP/1.1\r\n\r\n'")
    client.do("c.close()")
    server.do("assert s.recv(1) == b''; s.close()")


@pytest.mark.parametrize(
    ("act", "outcome", "status", "body_bytes"),
    [
        (client_closes, BY_CLIENT, 0, 0),
        (client_resets, BY_CLIENT, 0, 0),
        (client_closes_halfway, BY_CLIENT, 200, 5),
        (client_closes_in_its_body, BY_CLIENT, 0, 0),
        (client_is_killed, BY_CLIENT, 0, 0),
        (server_closes, BY_SERVER, 0, 0),
        (server_resets, BY_SERVER, 0, 0),
        (server_closes_halfway, BY_SERVER, 200, 5),
        (server_is_killed, BY_SERVER, 0, 0),
        (server_is_killed_halfway, BY_SERVER, 200, 5),
        (body_ends_with_the_connection, COMPLETE, 200, 5),
        (body_ends_with_a_reset, BY_SERVER, 200, 5),
        (client_ends_its_side_first, COMPLETE, 200, 5),
        (client_ends_its_side_and_body_ends_later, COMPLETE, 200, 5),
        (client_reads_late, COMPLETE, 200, 5),
        (client_ends_its_side_and_reads_late, COMPLETE, 200, 5),
        (client_reads_after_a_reset, COMPLETE, 200, 5),
        (body_ends_with_a_reset_that_comes_before_it_is_read, BY_SERVER, 200, 5),
        (server_refuses_a_body, COMPLETE, 200, 5),
        (goes_on_with_another_protocol, UPGRADED, 101, 0),
        (tunnels, UPGRADED, 200, 0),
    ],
)
def test_how_it_ended(
    act: object, outcome: int, status: int, body_bytes: int, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    with seeing_plain(client.pid, server.pid) as seen:
        act(client, server)  # type: ignore[operator]
        for (found,) in _both(seen):
            assert (found.outcome, found.status) == (outcome, status)
            assert found.response_body_bytes == body_bytes
            assert found.path == ("" if act is tunnels else "/it")


@pytest.mark.parametrize(("sent", "outcome"), [(5, COMPLETE), (4, BY_CLIENT)])
def test_a_server_answers_a_client_that_has_gone(
    sent: int, outcome: int, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    with seeing_plain(client.pid, server.pid) as seen:
        _asked(client, server)
        client.do("c.close()")
        server.do("assert s.recv(1) == b''")
        # The client's reset comes back while the call that sends has not returned yet.
        body = b"x" * sent
        server.do(
            rf"s.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n' + {body!r}); s.close()"
        )
        (at_client,), (at_server,) = _both(seen)
    assert (at_client.outcome, at_client.status) == (BY_CLIENT, 0)
    assert (at_server.outcome, at_server.status) == (outcome, 200)
    assert at_server.response_body_bytes == sent


def test_a_request_and_the_end_of_its_side_come_at_once(pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    with seeing_plain(client.pid, server.pid) as seen:
        client.do(f"c.sendall({_GET}); c.shutdown(socket.SHUT_WR)")
        server.do(f"take(s, len({_GET})); assert s.recv(1) == b''; s.close()")
        client.do("assert c.recv(1) == b''; c.close()")
        (at_client,), (at_server,) = _both(seen)
    # To a server, a client that has ended its side is one that has left.
    assert (at_client.outcome, at_client.status) == (BY_SERVER, 0)
    assert (at_server.outcome, at_server.status) == (BY_CLIENT, 0)


def test_the_rest_of_a_body_that_looks_like_a_request_hides_no_request_after_it(
    pair: tuple[Puppet, Puppet],
) -> None:
    client, server = pair
    looks = r"b'GET /never HTTP/1.1\r\n\r\n'"
    _asked(client, server)
    _answered(client, server, r"b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n-'")
    with seeing_plain(client.pid, server.pid) as seen:
        _answered(client, server, looks)
        _asked(client, server)
        _answered(client, server, r"b'HTTP/1.1 204 None\r\n\r\n'")
        for (found,) in _both(seen):
            assert (found.path, found.status, found.outcome) == ("/it", 204, COMPLETE)


_EXPECTS = r"b'POST /it HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n'"
_REFUSED = r"b'HTTP/1.1 417 No\r\nContent-Length: 0\r\n\r\n'"
_OK = r"b'HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n12345'"


def test_a_client_that_expected_to_be_refused_goes_on_without_the_body(
    pair: tuple[Puppet, Puppet],
) -> None:
    client, server = pair
    with seeing_plain(client.pid, server.pid) as seen:
        for asked, answer in (
            (_EXPECTS, _REFUSED),
            (r"b'POST /again HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello'", _OK),
            (_EXPECTS.replace("Content-Length: 5", "Transfer-Encoding: chunked"), _REFUSED),
            (_GET, _OK),
            (_EXPECTS, _REFUSED),
        ):
            _asked(client, server, asked)
            _answered(client, server, answer)
        _asked(client, server, r"b'hello'")  # a client may send it all the same
        _asked(client, server)
        _answered(client, server, _OK)
        for found in _both(seen, 6):
            assert [each.exchange for each in found] == [
                ("POST", "/it", 417, 0, 0),
                ("POST", "/again", 200, 5, 5),
                ("POST", "/it", 417, 0, 0),
                ("GET", "/it", 200, 0, 5),
                ("POST", "/it", 417, 0, 0),
                ("GET", "/it", 200, 0, 5),
            ]
            assert {each.outcome for each in found} == {COMPLETE}
        assert not seen.unread


_EARLY = r"b'HTTP/1.1 413 Much\r\nContent-Length: 0\r\n\r\n'"
_LOOKS = r"b'GET /never HTTP/1.1\r\n\r\n'"


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("expects", ["", r"Expect: 100-continue\r\n"])
def test_a_body_that_follows_an_early_answer_and_looks_like_requests_is_none(
    expects: str, pieces: int, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    head = rf"b'PUT /it HTTP/1.1\r\n{expects}Content-Length: {pieces * 23}\r\n\r\n'"
    with seeing_plain(client.pid, server.pid) as seen:
        _asked(client, server, head)
        _answered(client, server, _EARLY)
        for _ in range(pieces):
            _asked(client, server, _LOOKS)
        statuses = [201, 202]
        for status in statuses:
            _asked(client, server)
            _answered(client, server, rf"b'HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n'")
        # The body may be left out where it is expected to be refused: what is no whole body, and
        # is followed by more, was no request, so that the next one is not told from its rest.
        told = expects and pieces > 1
        for found in _both(seen, 2 if told else 3):
            assert [it.status for it in found] == [413, *statuses[bool(told) :]]
            assert {it.path for it in found} == {"/it"}
            assert {it.outcome for it in found} == {COMPLETE}
        seen.until(lambda: +seen.unread == ({"joined": 2} if told else {}))


def test_a_response_that_nobody_has_asked_for_answers_no_later_request(
    pair: tuple[Puppet, Puppet],
) -> None:
    client, server = pair
    late = r"b'HTTP/1.1 408 Late\r\nContent-Length: 0\r\n\r\n'"
    with seeing_plain(client.pid, server.pid) as seen:
        for answers in ((_OK, late), (_OK,), (f"{_OK} + {late}",), (_OK,)):
            _asked(client, server)
            for answer in answers:
                _answered(client, server, answer)
        _answered(client, server, late)
        _asked(client, server)
        client.do("c.close()")
        server.do("assert s.recv(1) == b''; s.close()")
        for found in _both(seen, 5):
            assert [(each.status, each.outcome) for each in found] == [
                *[(200, COMPLETE)] * 4,
                (0, BY_CLIENT),
            ]


@pytest.mark.parametrize("rest", [1, 3])
def test_the_rest_of_an_upload_that_looks_like_requests_is_none(
    rest: int, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    looks = r"b'GET /never HTTP/1.1\r\n\r\n'"
    _asked(client, server, rf"b'POST /before HTTP/1.1\r\nContent-Length: {1 + rest * 23}\r\n\r\n-'")
    with seeing_plain(client.pid, server.pid) as seen:
        for _ in range(rest):
            _asked(client, server, looks)
        _answered(client, server, r"b'HTTP/1.1 201 Made\r\nContent-Length: 0\r\n\r\n'")
        _asked(client, server)
        _answered(client, server, r"b'HTTP/1.1 204 None\r\n\r\n'")
        for (found,) in _both(seen):
            assert (found.path, found.status, found.outcome) == ("/it", 204, COMPLETE)
        seen.until(lambda: seen.unread == {"joined": 2})


def test_a_request_behind_one_that_waits_since_before_the_session_gets_none_of_its_response(
    pair: tuple[Puppet, Puppet],
) -> None:
    client, server = pair
    _asked(client, server, r"b'GET /before HTTP/1.1\r\n\r\n'")
    with seeing_plain(client.pid, server.pid) as seen:
        _asked(client, server, r"b'GET /behind HTTP/1.1\r\n\r\n'")
        for status in (201, 202):
            answer = rf"b'HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n'"
            _answered(client, server, answer)
        _asked(client, server)
        _answered(client, server, r"b'HTTP/1.1 204 None\r\n\r\n'")
        for (found,) in _both(seen):
            assert (found.path, found.status, found.outcome) == ("/it", 204, COMPLETE)


def test_a_request_that_waits_to_be_read_when_the_session_begins_is_seen(
    pair: tuple[Puppet, Puppet],
) -> None:
    client, server = pair
    client.do(f"c.sendall({_GET})")
    with seeing_plain(client.pid, server.pid) as seen:
        server.do(f"take(s, len({_GET}))")
        _answered(client, server, _OK)
        (found,) = seen.wait_for(1, SERVER)
        assert (found.path, found.status, found.outcome) == ("/it", 200, COMPLETE)
        assert not seen.of(CLIENT)
