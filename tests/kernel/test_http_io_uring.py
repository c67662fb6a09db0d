"""Traffic that no system call shows: io_uring is named, and nothing is invented."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from coral import bpf
from coral.collectors.http_latency.sockets import sockets
from tests.http_seen import CLIENT, SERVER, Seen, seeing
from tests.network import number, puppets
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("http_supported", "nothing_left")

# `pass_on(opcode, socket, buffer)` has the kernel send or receive by a ring of its own.
CODE: Final = """
import ctypes, mmap, socket, struct
RECEIVE, SEND = 27, 26
libc = ctypes.CDLL(None, use_errno=True)
parameters = (ctypes.c_uint8 * 120)()
ring = libc.syscall(425, 4, parameters)
if ring >= 0:
    p = struct.unpack("<30I", parameters)
    submitted = mmap.mmap(ring, p[16] + 4 * p[0], offset=0)
    completed = mmap.mmap(ring, p[25] + 16 * p[1], offset=0x8000000)
    entries = mmap.mmap(ring, 64 * p[0], offset=0x10000000)
def word(memory, at): return struct.unpack_from("<I", memory, at)[0]
def pass_on(opcode, end, buffer):
    tail, head = word(submitted, p[11]), word(completed, p[20])
    at = tail & (p[0] - 1)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    entry = struct.pack("<BBHiQQII", opcode, 0, 0, end.fileno(), 0, address, len(buffer), 0)
    entries[64 * at : 64 * at + 64] = entry.ljust(64, bytes(1))
    struct.pack_into("<I", submitted, p[16] + 4 * at, at)
    struct.pack_into("<I", submitted, p[11], tail + 1)
    assert libc.syscall(426, ring, 1, 1, 1, None, 0) == 1
    result = struct.unpack_from("<i", completed, p[25] + 16 * (head & (p[1] - 1)) + 8)[0]
    struct.pack_into("<I", completed, p[20], head + 1)
    assert result == len(buffer), result
listener = socket.create_server(("127.0.0.1", 0))
def connect():
    global c, s
    c = socket.create_connection(listener.getsockname())
    s = listener.accept()[0]
    c.settimeout(5)
    s.settimeout(5)
"""
ASK: Final = b"GET /by-ring HTTP/1.1\r\nHost: a\r\n\r\n"
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def counted(seen: Seen, unread: Counter[str]) -> Counter[str]:
    """Adds what was not read since to UNREAD."""
    batch = seen.collector.drain()
    seen.add(batch)
    unread.update({what: it.count for what, it in batch.unread.items()})
    return unread


def test_reads_and_writes_of_io_uring_are_counted_by_its_name() -> None:
    if sockets(bpf.probe()).taken != "socket_hooks":
        pytest.skip("only the sockets' own hooks see what io_uring passes")
    with puppets(1) as (both,):
        both.do(f"exec({CODE!r})")
        if number(both, "ring") < 0:
            pytest.skip("this kernel has no io_uring, or does not let us use it")
        with seeing(both.pid, tls="false") as seen:
            unread: Counter[str] = Counter()
            for _ in range(3):
                both.do("connect()")
                both.do(f"c.sendall({ASK!r}); pass_on(RECEIVE, s, bytearray({len(ASK)}))")
                both.do(f"pass_on(SEND, s, bytearray({ANSWER!r})); c.recv(100)")
            wait_until(lambda: counted(seen, unread)["io_uring"] == 3)
            wait_until(lambda: counted(seen, unread) and len(seen.of(CLIENT)) == 3)
            assert unread["io_uring"] == 3
            assert not unread["unseen"]
            assert {each.status for each in seen.of(CLIENT)} == {200}
            assert not seen.of(SERVER)


def test_what_sendfile_passes_is_not_io_urings() -> None:
    with puppets(1) as (both,):
        both.do(f"exec({CODE!r})")
        both.do("import os, tempfile; file = tempfile.TemporaryFile()")
        both.do(f"file.write({ASK!r}); file.flush(); connect()")
        with seeing(both.pid, tls="false") as seen:
            both.do(f"os.sendfile(c.fileno(), file.fileno(), 0, {len(ASK)}); s.recv(100)")
            both.do(f"s.sendall({ANSWER!r}); c.recv(100)")
            unread: Counter[str] = Counter()
            wait_until(lambda: counted(seen, unread)["unseen"])
            assert not unread["io_uring"]
