"""The same requests come out the same on every rung: where the kernel does not tell of each use of
a socket, the system calls do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coral import bpf
from coral.collectors.http_latency.collector import HttpLatencyCollector
from coral.collectors.http_latency.sockets import sockets
from coral.collectors.syscall_stats import table as syscall_table
from tests.http_seen import CLIENT, COMPLETE, SERVER, Seen, seeing
from tests.network import READ_ALL, connected, number, puppets
from tests.support import Puppet, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

HTTP_RUNGS: dict[str, tuple[str, ...]] = {
    "best": (),
    "raw_tp": ("tp_btf",),
    "system calls": ("socket_hooks",),
    "system calls, raw_tp": ("socket_hooks", "tp_btf"),
}
every_rung = pytest.mark.parametrize("without", HTTP_RUNGS.values(), ids=HTTP_RUNGS.keys())

REQUEST = b"POST /%s?token=secret HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\n%s"
RESPONSE = b"HTTP/1.1 201 Created\r\nContent-Length: 6\r\n\r\n%s"
BODY = b"hello\n"

# How a puppet sends DATA, and how it receives LENGTH bytes, by pieces where a call has several.
CODE = """
import ctypes, os, socket, tempfile
libc = ctypes.CDLL(None, use_errno=True)
class Piece(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
class Header(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_void_p), ("name_length", ctypes.c_size_t),
        ("pieces", ctypes.POINTER(Piece)), ("count", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int), ("passed", ctypes.c_size_t),
    ]
def many(call, end, buffers, *more):
    pieces = [Piece(ctypes.addressof(b), len(b)) for b in buffers]
    headers = (Header * len(pieces))()
    for header, piece in zip(headers, pieces):
        header.pieces, header.count = ctypes.pointer(piece), 1
    assert call(end.fileno(), headers, len(pieces), 0, *more) == len(pieces)
def buffers_of(data):
    return [(ctypes.c_char * len(part)).from_buffer_copy(part) for part in (data[:4], data[4:])]
def send_file(end, data):
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return os.sendfile(end.fileno(), file.fileno(), 0, len(data))
def splice_to(end, data):
    out, into = os.pipe()
    os.write(into, data)
    sent = os.splice(out, end.fileno(), len(data))
    os.close(out), os.close(into)
    return sent
def splice_from(end, length):
    out, into = os.pipe()
    assert os.splice(end.fileno(), into, length) == length
    os.read(out, length), os.close(out), os.close(into)
def cut(data):
    return [data[:5], b'', data[5:]]
def room(length):
    return [bytearray(3), bytearray(length - 3)]
def peek_and_receive(end, length):
    assert len(end.recv(length, socket.MSG_PEEK | socket.MSG_WAITALL)) == length
    end.recv(length)
send = {
    'send': lambda end, data: end.send(data),
    'write': lambda end, data: os.write(end.fileno(), data),
    'writev': lambda end, data: os.writev(end.fileno(), cut(data)),
    'pwritev2': lambda end, data: os.pwritev(end.fileno(), cut(data), -1),
    'sendmsg': lambda end, data: end.sendmsg(cut(data)),
    'sendmmsg': lambda end, data: many(libc.sendmmsg, end, buffers_of(data)),
    'sendfile': send_file,
    'splice': splice_to,
}
receive = {
    'recv': lambda end, length: end.recv(length, socket.MSG_WAITALL),
    'peek': peek_and_receive,
    'read': lambda end, length: os.read(end.fileno(), length),
    'readv': lambda end, length: os.readv(end.fileno(), room(length)),
    'preadv2': lambda end, length: os.preadv(end.fileno(), room(length), -1),
    'recvmsg': lambda end, length: end.recvmsg_into(room(length), 0, socket.MSG_WAITALL),
    'recvmmsg': lambda end, length: many(libc.recvmmsg, end, buffers_of(bytes(length)), None),
    'splice': splice_from,
}
"""
SEEN = [
    ("send", "recv"),
    ("write", "read"),
    ("writev", "readv"),
    ("pwritev2", "preadv2"),
    ("sendmsg", "recvmsg"),
    ("send", "peek"),
]
# Those whose bytes lie nowhere in the process, or may be any of several.
UNSEEN = [("sendfile", "recv"), ("splice", "splice"), ("sendmmsg", "recvmmsg")]


def _prepared(*puppets: Puppet) -> None:
    for puppet in puppets:
        puppet.do(f"exec({CODE!r})")


@contextmanager
def _pair_seen(without: tuple[str, ...]) -> Iterator[tuple[Puppet, Puppet, Seen]]:
    """A client and a server with a connection, both watched."""
    with puppets(2) as (client, server):
        _prepared(client, server)
        connected(client, server, "127.0.0.1")
        with seeing(client.pid, server.pid, without=without) as seen:
            yield client, server, seen


def _exchange(
    client: Puppet, server: Puppet, name: str, ways: tuple[str, str], apart: tuple[str, str] | None
) -> None:
    """A request and its response, each sent and received in one call; their bodies in calls of
    their own, in the ways APART."""
    request = REQUEST % (name.encode(), b"%s")
    for sender, end, receiver, other, text in (
        (client, "c", server, "s", request),
        (server, "s", client, "c", RESPONSE),
    ):
        parts = [(ways, text % b""), (apart, BODY)] if apart else [(ways, text % BODY)]
        for (sends, receives), data in parts:
            receiver.begin(f"receive[{receives!r}]({other}, {len(data)})")
            sender.do(f"send[{sends!r}]({end}, {data!r})")
            receiver.done()


def _assert_seen(seen: Seen, names: list[str]) -> None:
    for role in (CLIENT, SERVER):
        found = seen.wait_for(len(names), role)
        assert [it.exchange for it in found] == [("POST", f"/{it}", 201, 6, 6) for it in names]
        assert {it.outcome for it in found} == {COMPLETE}
        for it in found:
            assert 0 <= it.request_ns <= it.first_byte_ns <= it.duration_ns
    assert not seen.lost


@every_rung
def test_every_call_that_carries_bytes(without: tuple[str, ...]) -> None:
    with _pair_seen(without) as (client, server, seen):
        names = []
        for ways in SEEN:
            names.append("-".join(ways))
            _exchange(client, server, names[-1], ways, None)
        for ways in UNSEEN:
            names.append("-".join(ways))
            _exchange(client, server, names[-1], SEEN[0], ways)
        _assert_seen(seen, names)


@every_rung
def test_requests_whose_heads_cannot_be_seen_are_none(without: tuple[str, ...]) -> None:
    with _pair_seen(without) as (client, server, seen):
        names = []
        for ways in UNSEEN[1:]:
            _exchange(client, server, "unseen", ways, None)
            names.append(f"after-{ways[0]}")
            _exchange(client, server, names[-1], SEEN[0], None)
        _assert_seen(seen, names)


@every_rung
def test_a_descriptor_that_becomes_another_socket_during_a_call(without: tuple[str, ...]) -> None:
    """System calls tell nothing of the first request then, and nothing wrong of others."""
    first, response = REQUEST % (b"first", BODY), RESPONSE % BODY
    with puppets(2) as (client, server):
        _prepared(client, server)
        connected(client, server, "127.0.0.1")
        client.do("c1 = c; c = socket.create_connection(c1.getpeername())")
        server.do("import threading; s1 = s; s, _ = l.accept(); at = os.dup(s1.fileno())")
        with seeing(client.pid, server.pid, without=without) as seen:
            server.do(f"it = threading.Thread(target=os.read, args=(at, {len(first)})); it.start()")
            thread = Path(f"/proc/{server.pid}/task/{number(server, 'it.native_id')}/syscall")
            read = f"{syscall_table.numbers()['read']} "
            wait_until(lambda: thread.read_text().startswith(read))
            server.do("os.dup2(s.fileno(), at)")
            client.do(f"c1.send({first!r})")
            server.do(f"it.join(); s1.send({response!r})")
            client.do(f"c1.recv({len(response)}, socket.MSG_WAITALL)")
            for name in ("second", "third"):
                _exchange(client, server, name, SEEN[0], None)
            _assert_paths(seen, CLIENT, "first", "second", "third")
            found_first = ["first"] if _way(without) == "socket_hooks" else []
            _assert_paths(seen, SERVER, *found_first, "second", "third")
            assert not seen.lost


@every_rung
def test_a_response_that_comes_while_its_request_is_sent(without: tuple[str, ...]) -> None:
    """Nobody has seen that request by then; those that follow are right."""
    size = 16 << 20
    head = b"POST /large HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size
    early = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n"
    with _pair_seen(without) as (client, server, seen):
        _exchange(client, server, "before", SEEN[0], None)
        client.do(
            f"import threading; data = {head!r} + bytes({size}); "
            "it = threading.Thread(target=c.send, args=(data,)); it.start()"
        )
        server.do(f"s.recv({len(head)}, socket.MSG_WAITALL); s.send({early!r})")
        client.do(f"c.recv({len(early)}, socket.MSG_WAITALL)")
        server.do(f"exec({READ_ALL.format(s='s', n=size)!r})")
        client.do("it.join()")
        names = ["after", "and", "more"]
        for name in names:
            _exchange(client, server, name, SEEN[0], None)
        _assert_paths(seen, SERVER, "before", "large", *names)
        _assert_paths(seen, CLIENT, "before", *names)


def _assert_paths(seen: Seen, role: int, *names: str) -> None:
    """These requests are complete, in this order, and there are no others."""
    found = seen.wait_for(len(names), role)
    assert [it.path for it in found] == [f"/{name}" for name in names]
    assert {it.outcome for it in found} == {COMPLETE}
    assert [it.status for it in found] == [413 if name == "large" else 201 for name in names]


def _way(without: tuple[str, ...]) -> str:
    return sockets(bpf.probe().without(*without)).taken


def test_what_is_no_tcp_socket_is_left_alone() -> None:
    request, response = REQUEST % (b"none", BODY), RESPONSE % BODY
    with puppets(1) as (puppet,):
        _prepared(puppet)
        with seeing(puppet.pid, without=("socket_hooks",)) as seen:
            puppet.do(
                "a, b = socket.socketpair(); d = socket.socket(type=socket.SOCK_DGRAM); "
                "d.bind(('127.0.0.1', 0)); d.connect(d.getsockname()); out, into = os.pipe()"
            )
            for data in (request, response):
                puppet.do(f"a.send({data!r}); b.recv(4096); d.send({data!r}); d.recv(4096)")
                puppet.do(f"os.write(into, {data!r}); os.read(out, 4096); send_file(a, {data!r})")
                puppet.do("b.recv(4096)")
            with puppets(1) as (client,):
                _prepared(client)
                connected(client, puppet, "127.0.0.1")
                _exchange(client, puppet, "one", SEEN[0], None)
            assert [it.path for it in seen.wait_for(1, SERVER)] == ["/one"]
            assert not seen.of(CLIENT)


def test_the_way_to_sockets_is_told_with_the_reason() -> None:
    features = bpf.probe()
    support = HttpLatencyCollector.support(features.without("socket_hooks"))
    if not support.supported:
        pytest.skip(support.reason)
    (step,) = (step for step in support.steps if step.what == "sockets")
    assert (step.taken, [it.name for it in step.refused]) == ("system_calls", ["socket_hooks"])
    if features["socket_hooks"].available:
        best = HttpLatencyCollector.support(features)
        assert ("sockets", "socket_hooks") in [(it.what, it.taken) for it in best.steps]
    none = HttpLatencyCollector.support(features.without("loops"))
    assert not none.supported
    assert none.reason.startswith("no way to sockets (loops: ")


@every_rung
def test_no_program_comes_near_the_verifiers_limit(
    without: tuple[str, ...], record_property: Callable[[str, object], None]
) -> None:
    with seeing(os.getpid(), without=without) as seen:
        stats = seen.collector.bpf_object.program_stats()
    assert stats
    for name, program in stats.items():
        record_property(f"{name}, {_way(without)}", program.verified_instructions)
        assert program.verified_instructions <= bpf.VERIFIER_LIMIT // 2, name
