"""One attack of a local user without privileges, for tests/e2e/test_attacker.py.

    attacker.py ATTACK TARGET

TARGET is JSON: `grpc` and `metrics`, each [host, port]; `socket`, the path of the agent's socket;
`directory`, which this user may write; `seconds`. Needs only the standard library: the user may not
be able to read the project. Prints one line of JSON: what it did, as counts. It ends by itself, and
with its parent.

Each attack is bounded in connections, requests and time, so that it is the agent that limits it,
not the machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import starmap
from pathlib import Path

Address = tuple[str, int]

SERVICE = b"/coral.mesh.v1.EbpfService/"
WATCH_HEALTH = b"/grpc.health.v1.Health/Watch"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS, ACK = 1, 4, 1
CANCEL = 8
INITIAL_WINDOW_SIZE = 4
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
# The kernel keeps 15 bytes of a name.
NAMES = (
    b"[/x]", b"[red]x", b"\x1b[2J\x1b[31m", b"\x1b]0;title\x07", b"two\nlines", b'quo"te\\',
    b"\xff\xfe\xfd", b"\xc2\x9b31m", b"a) R 1 1 (", b"{label}", b"\r\x08\x08", b"root",
)  # fmt: skip
counts: Counter[str] = Counter()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def call(stream: int, path: bytes, message: bytes, *, token: bytes = b"") -> bytes:
    """The frames of one gRPC call."""
    headers = {
        b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"localhost",
        b"te": b"trailers", b"content-type": b"application/grpc",
    }  # fmt: skip
    if token:
        headers[b"authorization"] = b"Bearer " + token
    body = b"\0" + struct.pack("!I", len(message)) + message
    parts = [body[at : at + 16_384] for at in range(0, len(body), 16_384)]
    frames = [frame(HEADERS, END_HEADERS, stream, b"".join(starmap(_literal, headers.items())))]
    frames += [frame(DATA, END_STREAM * (part is parts[-1]), stream, part) for part in parts]
    return b"".join(frames)


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field of HPACK without indexing, RFC 7541, 6.2.2."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """A string's length of HPACK, RFC 7541, 5.1, not Huffman-coded."""
    size = len(text)
    if size < 127:
        return bytes([size])
    return b"\x7f" + _varint(size - 127)


def _varint(number: int) -> bytes:
    """Seven bits a byte, least significant first: HPACK and protobuf have it alike."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def text(number: int, value: bytes) -> bytes:
    """A field of protobuf with a length."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def start(service: bytes = b"", **config: bytes) -> bytes:
    """A StartEbpfCollectorRequest for syscall_stats."""
    entries = (text(4, text(1, key.encode()) + text(2, value)) for key, value in config.items())
    return text(2, service) + b"\x18\x01" + b"".join(entries)


# An agent that accepts no more leaves connections waiting: an attacker goes on to the next.
_CONNECT_S = 0.2


class Connection:
    """A connection whose failures are no errors: to be cut off is an attacker's lot."""

    def __init__(self, address: Address, receive_bytes: int = 0) -> None:
        self.broken = False
        self._socket = socket.socket(socket.AF_INET)
        if receive_bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self._socket.settimeout(_CONNECT_S)
        try:
            self._socket.connect(address)
            counts["connections"] += 1
        except OSError:
            self.broken = True
            counts["refused_connections"] += 1
        self._socket.settimeout(1)

    def send(self, data: bytes) -> None:
        """Sends DATA unless the connection is broken."""
        if not self.broken:
            try:
                self._socket.sendall(data)
            except OSError:
                self.broken = True

    def receive(self, seconds: float = 0.0) -> bytes:
        """What has come, waiting at most that long for a first byte; empty when nothing has."""
        if self.broken:
            return b""
        self._socket.settimeout(max(seconds, 0.001))
        try:
            data = self._socket.recv(1 << 18)
            self.broken = not data
        except TimeoutError:
            return b""
        except OSError:
            self.broken = True
            return b""
        finally:
            self._socket.settimeout(1)
        return data

    def reset(self) -> None:
        """Closes it with a RST."""
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        """Closes it."""
        self._socket.close()


class Http2(Connection):
    """A connection that has said hello."""

    def __init__(self, address: Address, receive_bytes: int = 0, window: int = 1 << 20) -> None:
        super().__init__(address, receive_bytes)
        self._next_stream = 1
        self.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack("!HI", 4, window)))

    def send_within_window(self, frames: bytes) -> None:
        """Sends the frames of one call, its data as fast as the agent's windows allow; gives up
        after five seconds."""
        windows = {0: 65_535, 1: 65_535}
        end_s, received = time.monotonic() + 5, b""
        while frames and time.monotonic() < end_s and not self.broken:
            size = 9 + int.from_bytes(frames[:3], "big")
            if frames[3] == DATA and size - 9 > min(windows.values()):
                received = _widen(windows, received + self.receive(0.05))
                continue
            if frames[3] == DATA:
                windows = {stream: window - size + 9 for stream, window in windows.items()}
            self.send(frames[:size])
            frames = frames[size:]

    def streams(self, number: int) -> Iterator[int]:
        """That many numbers of new streams."""
        for _ in range(number):
            yield self._next_stream
            self._next_stream += 2


def _widen(windows: dict[int, int], received: bytes) -> bytes:
    """Adds what the agent's frames grant to the windows of a connection (0) and its first stream
    (1); returns the bytes of an unfinished frame."""
    while len(received) >= 9 and len(received) >= 9 + (size := int.from_bytes(received[:3], "big")):
        kind, stream = received[3], int.from_bytes(received[5:9], "big")
        payload, received = received[9 : 9 + size], received[9 + size :]
        if kind == WINDOW_UPDATE and stream in windows:
            windows[stream] += int.from_bytes(payload, "big")
        if kind == SETTINGS:
            for at in range(0, len(payload), 6):
                number, value = struct.unpack_from("!HI", payload, at)
                if number == INITIAL_WINDOW_SIZE:
                    windows[1] += value - 65_535
    return received


class Target:
    """What is attacked, and until when."""

    def __init__(self, told: dict[str, object]) -> None:
        self.grpc: Address = tuple(told["grpc"])  # type: ignore[arg-type,assignment]
        self.metrics: Address = tuple(told["metrics"])  # type: ignore[arg-type,assignment]
        self.socket = Path(str(told["socket"]))
        self.directory = Path(str(told["directory"]))
        self._end_s = time.monotonic() + float(str(told["seconds"]))

    def turns(self, per_second: float) -> Iterator[int]:
        """Numbers turns, at most that many a second, until the end."""
        turn = 0
        while (now_s := time.monotonic()) < self._end_s:
            yield turn
            turn += 1
            rest_s = min(now_s + 1 / per_second, self._end_s) - time.monotonic()
            time.sleep(max(rest_s, 0))


def idle(target: Target) -> None:
    """Holds 600 silent connections to each port, and opens those anew that were closed."""
    _hold(target, 600, lambda _: b"")


def half_prefaces(target: Target) -> None:
    """Holds 200 connections to each port that stop in the middle of their first bytes."""
    whole = (PREFACE, b"GET /metrics HTTP/1.1\r\nHost: a\r\n")
    _hold(target, 200, lambda index: whole[index % 2][: index // 2 % len(PREFACE)])


def _hold(target: Target, number: int, first_bytes: Callable[[int], bytes]) -> None:
    """Holds NUMBER connections to each port; the one at an even index is to gRPC."""
    held: dict[int, Connection] = {}
    for turn in target.turns(400):
        index = turn % (2 * number)
        if index in held:
            held[index].receive()
            if not held[index].broken:
                continue
            held.pop(index).close()
            counts["closed_by_agent"] += 1
        held[index] = Connection((target.grpc, target.metrics)[index % 2])
        held[index].send(first_bytes(index))
        counts["most_held"] = max(counts["most_held"], sum(not c.broken for c in held.values()))


def slow(target: Target) -> None:
    """Sends requests byte by byte on 60 connections to each port."""
    whole = (
        PREFACE + frame(SETTINGS, 0, 0) + call(1, SERVICE + b"ListCollectors", b""),
        b"GET /metrics HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 4_000,
    )
    connections: list[Connection | None] = [None] * 120
    sent = [0] * len(connections)
    for _ in target.turns(20):
        for index, connection in enumerate(connections):
            rest = whole[index % 2][sent[index] :]
            if connection is None or connection.broken or not rest:
                if connection:
                    connection.close()
                connections[index] = Connection((target.grpc, target.metrics)[index % 2])
                sent[index] = 0
                continue
            connection.send(rest[:1])
            sent[index] += 1
            counts["bytes"] += 1


def resets(target: Target) -> None:
    """Resets connections in the middle of requests."""
    for turn in target.turns(200):
        if turn % 2:
            connection: Connection = Http2(target.grpc)
            connection.send(call(1, SERVICE + b"ListCollectors", b""))
        else:
            connection = Connection(target.metrics)
            connection.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
        connection.reset()
        counts["resets"] += 1


def calls(target: Target) -> None:
    """Bursts of 400 unary calls at a time on one connection, with and without a wrong token."""
    connection = Http2(target.grpc)
    for turn in target.turns(4):
        if connection.broken:
            connection.close()
            connection = Http2(target.grpc)
        token = b"wrong" * (turn % 2)
        for stream in connection.streams(400):
            path = SERVICE + (b"ListCollectors", b"GetCapabilities", b"Nothing")[stream // 2 % 3]
            connection.send(call(stream, path, b"", token=token))
            counts["calls"] += 1
        _drink(connection)


def starts(target: Target) -> None:
    """Requests that must not be granted: of services that do not exist, of names much like those of
    hostile processes, of services whose pid files are traps."""
    services = [b"fifo", b"zero", b"huge", b"link", b"flipping", b"/", b"a" * 60]
    services += [name + b"?" for name in NAMES]
    connection = Http2(target.grpc)
    for turn in target.turns(40):
        if connection.broken:
            connection.close()
            connection = Http2(target.grpc)
        (stream,) = connection.streams(1)
        wanted = start(services[turn % len(services)])
        connection.send(call(stream, SERVICE + b"StartCollector", wanted))
        counts["calls"] += 1
        _drink(connection)


def stream_resets(target: Target) -> None:
    """Opens streams and resets them at once, on two connections."""
    connections = [Http2(target.grpc), Http2(target.grpc)]
    paths = (SERVICE + b"WatchCollectors", WATCH_HEALTH, SERVICE + b"ListCollectors")
    for turn in target.turns(20):
        index = turn % 2
        if connections[index].broken:
            connections[index].close()
            connections[index] = Http2(target.grpc)
        connection = connections[index]
        reset = struct.pack("!I", CANCEL)
        connection.send(
            b"".join(
                call(stream, paths[stream // 2 % 3], b"") + frame(RST_STREAM, 0, stream, reset)
                for stream in connection.streams(100)
            )
        )
        counts["stream_resets"] += 100
        _drink(connection)


def subscriptions(target: Target) -> None:
    """Subscribes to everything it can name, 50 streams on each of 10 connections, and reads none of
    it."""
    asking = Http2(target.grpc)
    asking.send(call(1, SERVICE + b"ListCollectors", b"\x08\x01"))
    answer = b"".join(asking.receive(0.2) for _ in range(5))
    ids = re.findall(rb"[0-9a-f]{8}-[0-9a-f-]{27}", answer) or [b"0" * 36]
    counts["known_ids"] = len(set(ids))
    asking.close()
    connections: list[Http2] = []
    for turn in target.turns(5):
        index = turn % 10
        if index < len(connections):
            if not connections[index].broken:
                connections[index].send(frame(PING, 0, 0, bytes(8)))
                continue
            connections[index].close()
        connection = Http2(target.grpc, receive_bytes=2_048, window=0)
        for stream in connection.streams(50):
            path, message = (
                (SERVICE + b"StreamEventBatches", text(1, ids[stream // 2 % len(ids)])),
                (SERVICE + b"StreamEvents", text(1, ids[stream // 2 % len(ids)])),
                (SERVICE + b"WatchCollectors", b""),
                (WATCH_HEALTH, b""),
            )[stream // 2 % 4]
            connection.send(call(stream, path, message))
            counts["subscriptions"] += 1
        connections[index : index + 1] = [connection]


def large(target: Target) -> None:
    """Requests of 70 KiB to 3 MiB: long texts, long lists, many options."""
    pids = b",".join(b"%d" % (1 << 20 | n) for n in range(300_000))
    many = (
        text(2, b"x")
        + b"\x18\x01"
        + b"".join(text(4, text(1, b"key%d" % n) + text(2, b"v")) for n in range(20_000))
    )
    messages = (
        start(b"a" * 70_000), start(pid=pids), start(comm=b"a," * 60_000), many, b"\x0a" * (3 << 20)
    )  # fmt: skip
    for turn in target.turns(2):
        connection = Http2(target.grpc)
        message = messages[turn % len(messages)]
        connection.send_within_window(call(1, SERVICE + b"StartCollector", message))
        connection.receive(0.1)
        counts["large_requests"] += 1
        counts["large_bytes"] += len(message)
        connection.close()


def malformed(target: Target) -> None:
    """Frames that HTTP/2 does not allow, floods of those that it does, and bytes of chance."""
    chance = random.Random(0)
    hello = PREFACE + frame(SETTINGS, 0, 0)
    attacks = (
        lambda: hello + chance.randbytes(2_000),
        lambda: chance.randbytes(2_000),
        lambda: hello + frame(HEADERS, END_HEADERS, 1, chance.randbytes(200)),
        lambda: hello + frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1, bytes(1_000)) * 50,
        lambda: hello + frame(SETTINGS, 0, 0, struct.pack("!HI", 3, 1)) * 200,
        lambda: hello + frame(PING, 0, 0, bytes(8)) * 200,
        lambda: hello + frame(WINDOW_UPDATE, 0, 0, bytes(4)),
        lambda: hello + frame(DATA, 0, 2, bytes(100)),
        lambda: hello + b"\xff\xff\xff\0\0\0\0\0\1" + bytes(100),
        lambda: hello + call(1, SERVICE + b"ListCollectors", chance.randbytes(100)),
        lambda: hello + call(1, b"/" + chance.randbytes(30), b""),
    )
    requests = (
        lambda: chance.randbytes(2_000),
        lambda: b"GET " + b"/" * 5_000 + b" HTTP/1.1\r\n\r\n",
        lambda: b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 500 + b"\r\n",
        lambda: b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx",
        lambda: b"GET /metrics?name[]=" + b"a" * 500 + b" HTTP/1.0\r\n\r\n",
        lambda: b"GET /\x1b[31m HTTP/1.1\r\nHost: \x1b[2J\r\n\r\n",
    )
    for turn in target.turns(40):
        half = turn // 2
        if turn % 2:
            connection = Connection(target.grpc)
            connection.send(attacks[half % len(attacks)]())
        else:
            connection = Connection(target.metrics)
            connection.send(requests[half % len(requests)]())
        connection.receive(0.01)
        connection.close()
        counts["malformed"] += 1


def scrapes(target: Target) -> None:
    """Scrapes with eight connections at a time."""
    for _ in target.turns(10):
        connections = [Connection(target.metrics) for _ in range(8)]
        for connection in connections:
            connection.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        for connection in connections:
            counts["answers"] += b" 200 " in connection.receive(0.5)
            connection.close()


def slow_readers(target: Target) -> None:
    """Asks for /metrics on 100 connections, several times on each, and reads none of it."""
    held: list[Connection] = []
    for turn in target.turns(50):
        index = turn % 100
        if index < len(held):
            held[index].send(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            if not held[index].broken:
                continue
            held[index].close()
            counts["closed_by_agent"] += 1
        connection = Connection(target.metrics, receive_bytes=2_048)
        connection.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
        held[index : index + 1] = [connection]
        counts["requests"] += 20


def names(target: Target) -> None:
    """Processes of hostile names, each listening on a port."""
    libc = ctypes.CDLL(None)
    children = []
    for name in NAMES:
        if not (pid := os.fork()):
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            libc.prctl(PR_SET_NAME, name)
            listener = socket.create_server(("127.0.0.1", 0))
            time.sleep(3_600)
            listener.close()
            os._exit(0)
        children.append(pid)
        counts["processes"] += 1
    try:
        for _ in target.turns(1):
            pass
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def files(target: Target) -> None:
    """Traps in the place of the pid files that rules name: `fifo`, `zero`, `huge`, `link`, and
    `flipping`, which is each of them in turn."""
    target.directory.joinpath("number").write_text(f"{os.getpid()}\n")
    made: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("fifo", os.mkfifo),
        ("zero", lambda path: path.symlink_to("/dev/zero")),
        ("huge", _huge),
        ("link", lambda path: path.symlink_to("number")),
        ("flipping", lambda path: path.write_text("none\n")),
    )
    for name, make in made:
        make(target.directory / name)
        counts["traps"] += 1
    for turn in target.turns(500):
        path = target.directory / "next"
        made[turn % len(made)][1](path)
        path.rename(target.directory / "flipping")
        counts["flips"] += 1


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def unix_socket(target: Target) -> None:
    """Everything that a user may try with the socket's path, its lock and its directory."""
    lock = Path(f"{target.socket}.lock")

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(str(target.socket))

    tries: tuple[Callable[[], object], ...] = (
        connect,
        target.socket.unlink,
        lock.unlink,
        lambda: target.socket.rename(target.directory / "taken"),
        lambda: target.socket.chmod(0o666),
        lambda: lock.open("r+"),
        lambda: lock.open("r"),
        lambda: os.truncate(lock, 1 << 30),
        lambda: target.socket.with_name("other").symlink_to("/etc/passwd"),
        lambda: os.link(target.socket, target.directory / "linked"),
    )
    for turn in target.turns(100):
        counts["tries"] += 1
        try:
            tries[turn % len(tries)]()
        except PermissionError:
            counts["denied"] += 1
        except (FileNotFoundError, ConnectionRefusedError):
            counts["agent_gone"] += 1


def _drink(connection: Connection) -> None:
    """Reads what has come, and widens the window, so that answers go on."""
    while data := connection.receive():
        counts["received_bytes"] += len(data)
    connection.send(frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", 1 << 20)))


ATTACKS: dict[str, Callable[[Target], None]] = {
    attack.__name__: attack
    for attack in (
        idle, half_prefaces, slow, resets, calls, starts, stream_resets, subscriptions, large,
        malformed, scrapes, slow_readers, names, files, unix_socket,
    )
}  # fmt: skip


def main() -> None:
    """Runs one attack."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(19)
    ATTACKS[sys.argv[1]](Target(json.loads(sys.argv[2])))
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
