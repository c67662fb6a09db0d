"""The gate's parts that do no I/O: frames that are counted, rates, quotas; and its listeners' rules
for paths and addresses."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.agent.caller import Caller, Trust
from coral.agent.config import Auth, ByteCount, Config, ConfigError, Duration, Limits
from coral.agent.errors import LimitError
from coral.agent.rate import Bucket
from coral.agent.serving import gate
from coral.agent.serving.counts import ConnectionCounts
from coral.agent.serving.gate import Side
from coral.agent.serving.http2 import Meter, NotHttp2Error, goaway
from coral.agent.serving.listening import Origin, TcpListener, UnixListener, listen
from coral.agent.serving.quota import Quota
from coral.agent.serving.relay import Connection, Peer
from coral.agent.serving.service import EbpfService
from coral.agent.sessions.budget import Priority
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    frame,
)
from tests.scripted import Desk, until

NOBODY = 65534
INDEXED = b"\x83"  # `:method: POST`, of the table that every connection has


@given(sizes=st.lists(st.integers(1, 40), min_size=1))
def test_frames_are_counted_however_they_are_cut(sizes: list[int]) -> None:
    sent = PREFACE + frame(SETTINGS, payload=bytes(6))
    for stream in (1, 3, 5):
        sent += frame(HEADERS, END_HEADERS, stream, INDEXED * 20)
        sent += frame(DATA, 0, stream, bytes(1000))
    sent += frame(RST_STREAM, 0, 1, bytes(4)) + frame(DATA, END_STREAM, 3) + frame(PING, 0, 0)
    meter, calls, at, turn = Meter(), 0.0, 0, 0
    while at < len(sent):
        step = sizes[turn % len(sizes)]
        calls += meter.feed(memoryview(sent)[at : at + step])[1]
        at, turn = at + step, turn + 1
    assert meter.greeted
    assert calls == 3  # one for each stream
    assert meter.unfinished_bytes == 1000 + 64  # those of stream 5


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\n", PREFACE + frame(PING), PREFACE[:-1] + b"x"]
)
def test_what_does_not_begin_as_http2_is_refused(sent: bytes) -> None:
    with pytest.raises(NotHttp2Error):
        Meter().feed(memoryview(sent))


def test_a_goaway_is_settings_and_a_goaway_that_says_why() -> None:
    assert goaway("full") == frame(SETTINGS) + frame(7, payload=bytes(7) + b"\x0bfull")


def test_a_bucket_lends_and_is_paid_by_time() -> None:
    bucket = Bucket(rate=10, burst=5)
    assert bucket.wait_s(100.0) == 0
    bucket.spend(25, 100.0)
    assert bucket.wait_s(100.0) == pytest.approx(2.0)
    assert bucket.wait_s(101.5) == pytest.approx(0.5)
    assert not bucket.is_full(102.4)
    assert bucket.is_full(102.5)
    bucket.spend(6, 1000.0)  # however long it rested, it holds no more than its burst
    assert bucket.wait_s(1000.0) == pytest.approx(0.1)


def test_a_bucket_in_debt_gives_nothing_until_time_has_paid() -> None:
    bucket = Bucket(rate=10, burst=5)
    assert [bucket.take(25, now_s) for now_s in (100.0, 100.0, 101.9, 102.0)] == [
        True, False, False, True,
    ]  # fmt: skip
    assert bucket.wait_s(102.0) == pytest.approx(2.5)


def test_a_quota_counts_each_peer_and_all_and_names_its_limit() -> None:
    quota = Quota("calls", 3, "calls_per_peer", 2, "calls")
    one, other = (Caller(principal=name) for name in ("uid 1", "uid 2"))
    with quota.one(one), quota.one(one):
        with pytest.raises(
            LimitError, match=r"^limits\.calls_per_peer is 2, and 2 calls of uid 1 "
        ):
            quota.one(one).__enter__()
        with (
            quota.one(other),
            pytest.raises(LimitError, match=r"^limits\.calls is 3, and 3 calls are under way"),
        ):
            quota.one(other).__enter__()
    assert quota.refused == {"calls_per_peer": 1, "calls": 1}
    assert not quota.taken


@pytest.mark.parametrize(
    ("trust", "priority"),
    [
        (Trust.OWNER, Priority.WATCHED),
        (Trust.TOKEN, Priority.WATCHED),
        (Trust.ANYONE, Priority.ON_DEMAND),
    ],
)
async def test_only_a_trusted_caller_is_believed_that_a_person_waits(
    trust: Trust, priority: Priority
) -> None:
    desk = Desk()
    async with desk.supervisor:
        session = await desk.start()
        request = pb.EbpfEventStreamRequest(collector_id=session.id, interactive=True)
        with EbpfService(desk.supervisor).StreamEventBatches(request, Caller(trust=trust)):
            assert session.priority is priority


# Paths


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir(mode=0o755)
    return directory / "agent.sock"


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling"])
@pytest.mark.parametrize("name", ["agent.sock", "agent.sock.lock"])
def test_what_is_no_socket_and_no_lock_is_left_alone(kind: str, name: str, path: Path) -> None:
    at, target = path.with_name(name), path.with_name("target")
    if kind == "file":
        at.write_text("kept")
    elif kind == "directory":
        at.mkdir()
    else:
        at.symlink_to(target)
        if kind == "link":
            target.write_text("kept")
    before = at.lstat()
    if (kind, name) == ("file", "agent.sock.lock"):
        UnixListener(path).close()
    else:
        with pytest.raises(
            ConfigError, match=rf"{name} exists and is not .* left as it is"
        ) as told:
            UnixListener(path)
        assert "\n" not in str(told.value)
        assert not path.exists() or name == path.name
    assert at.lstat().st_ino == before.st_ino
    assert target.exists() == (kind == "link")
    if kind in ("file", "link"):
        assert at.read_text() == "kept"


def test_a_socket_at_which_somebody_answers_is_left_and_a_dead_one_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="another agent is listening there"):
            UnixListener(path)
        assert path.exists()
    with closing(UnixListener(path)):
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_a_path_that_is_another_socket_by_now_is_not_removed(path: Path) -> None:
    listener = UnixListener(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        listener.close()
        assert path.is_socket()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_that_others_may_write_is_refused(mode: int, path: Path) -> None:
    path.parent.chmod(mode)
    with pytest.raises(ConfigError, match=f"may write {path.parent}"):
        UnixListener(path)
    assert not list(path.parent.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory away")
def test_another_users_directory_is_refused(path: Path) -> None:
    os.chown(path.parent, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"may write {path.parent}"):
        UnixListener(path)


# TCP


def test_tcp_without_a_token_is_refused_and_leaves_nothing(path: Path) -> None:
    config = Config(listen=(f"unix:{path}", "127.0.0.1:0"))
    with pytest.raises(ConfigError, match=r"^listen: 127\.0\.0\.1:0: .*auth\.insecure_loopback"):
        listen(config, has_token=False)
    assert not path.exists()
    (unix, tcp) = listen(config, has_token=True)
    unix.close()
    tcp.close()


def test_origins_are_what_the_kernel_says(path: Path) -> None:
    config = Config(listen=(f"unix:{path}", "127.0.0.1:0"), auth=Auth(insecure_loopback=True))
    unix, tcp = listen(config, has_token=False)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            accepted, _ = unix.sockets[0].accept()
            with accepted:
                origin = unix.origin(accepted)
        user = os.geteuid()
        assert (origin.address, origin.trust) == (
            f"unix: uid {user}, pid {os.getpid()}",
            Trust.OWNER,
        )
        host, _, port = tcp.address.rpartition(":")
        with socket.create_connection((host, int(port))) as client:
            accepted, _ = tcp.sockets[0].accept()
            with accepted:
                origin = tcp.origin(accepted)
            assert origin.address == f"ipv4:127.0.0.1:{client.getsockname()[1]}"
        assert (origin.principal, origin.trust) == (f"uid {user}", Trust.ANYONE)
    finally:
        unix.close()
        tcp.close()


def test_a_user_of_this_machine_is_one_peer_from_whichever_address() -> None:
    listener = TcpListener("127.0.0.1:0", "127.0.0.1", 0)
    with closing(listener):
        listener.sockets[0].settimeout(10)
        address = listener.sockets[0].getsockname()
        principals: dict[bool, list[str]] = {True: [], False: []}
        for is_open in (True, False):
            for source in ("127.0.0.1", "127.0.0.2", "127.9.9.9"):
                with socket.socket() as client:
                    client.bind((source, 0))
                    client.connect(address)
                    # The kernel names no user for a socket that is closed already.
                    if not is_open:
                        client.close()
                    accepted, _ = listener.sockets[0].accept()
                    with accepted:
                        principals[is_open].append(listener.origin(accepted).principal)
    assert principals[True] == [f"uid {os.geteuid()}"] * 3
    assert principals[False] == ["this machine"] * 3


# Connections


class Keeper:
    """What a connection needs of a gate; gRPC's end of it is `grpc`."""

    def __init__(self) -> None:
        self.grpc: socket.socket | None = None

    def dial(self, _connection: Connection) -> socket.socket:
        ours, self.grpc = socket.socketpair()
        ours.setblocking(False)
        return ours

    def closed(self, _connection: Connection, _reason: str) -> None: ...

    def throttle(self) -> None: ...


@pytest.mark.parametrize(
    ("idle_s", "age_s", "last_s", "reason"),
    [
        (1000, 24 * 3600, 1.1 * 1000, "idle"),
        # gRPC lets calls go on for 5 s after it has said GOAWAY.
        (24 * 3600, 3600, 1.1 * 3600 + 5, "age"),
    ],
)
async def test_a_connection_is_cut_only_once_grpc_must_have_ended_it(
    idle_s: float, age_s: float, last_s: float, reason: str
) -> None:
    limits = Limits(connection_idle=Duration(idle_s), connection_age=Duration(age_s))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    keeper = Keeper()
    began_s = time.monotonic()
    connection = Connection(
        ours, Origin("unix:", "uid 0", Trust.OWNER), Peer(limits), limits, keeper
    )
    with theirs:
        theirs.sendall(PREFACE + frame(SETTINGS))
        await until(lambda: keeper.grpc is not None)
        assert connection.overdue(began_s + last_s) == ""
        assert connection.overdue(time.monotonic() + last_s + 11) == reason
        connection.close()
    assert keeper.grpc
    keeper.grpc.close()


async def test_a_client_that_grpc_has_left_sends_no_faster_than_its_rate() -> None:
    limits = Limits(peer_bytes_per_second=ByteCount(64 << 10))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)
    keeper, loop = Keeper(), asyncio.get_running_loop()
    connection = Connection(
        ours, Origin("unix:", "uid 0", Trust.OWNER), Peer(limits), limits, keeper
    )
    with theirs:
        await loop.sock_sendall(theirs, PREFACE + frame(SETTINGS))
        await until(lambda: keeper.grpc is not None)
        assert keeper.grpc
        keeper.grpc.close()
        await until(lambda: connection._server is None)
        sent, began_s = 0, time.monotonic()
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                while True:
                    await loop.sock_sendall(theirs, bytes(4 << 10))
                    sent += 4 << 10
        # A second's worth at once, then the rate; and what the kernel's buffers took.
        most = (64 << 10) * (1 + time.monotonic() - began_s) + (64 << 10)
        assert 64 << 10 <= sent < most
        connection.close()


class Failing:
    """A listening socket from which nothing can be accepted for a while."""

    def __init__(self, real: socket.socket, *errors: int) -> None:
        self._real, self.errors = real, list(errors)

    def accept(self) -> tuple[socket.socket, object]:
        if self.errors:
            number = self.errors.pop()
            raise OSError(number, os.strerror(number))
        return self._real.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class FailingListener:
    """A listener on `Failing`."""

    kind, address = "unix", "unix:"

    def __init__(self, failing: Failing) -> None:
        self.sockets: Any = (failing,)

    def origin(self, _accepted: socket.socket) -> Origin:
        return Origin("unix:", "uid 0", Trust.OWNER)

    def close(self) -> None: ...


async def test_errors_of_accept_and_of_a_tick_end_neither(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_TICK_S", 0.01)
    raised: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: raised.append(context))
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(str(path))
        listening.listen()
        listening.setblocking(False)
        # Linux passes errors of the new connection's network on, accept(2).
        failing = Failing(
            listening, errno.ENETDOWN, errno.EPROTO, errno.EHOSTUNREACH, errno.ECONNABORTED
        )
        counts = ConnectionCounts()
        side = Side((FailingListener(failing),), lambda: client, Limits(), counts)
        side.open()
        client.connect(str(path))
        await until(lambda: counts.open == 1)
        assert not failing.errors
        assert not raised
        (connection,) = side.connections
        ticks: list[float] = []

        def fails_once(now_s: float) -> str:
            ticks.append(now_s)
            if len(ticks) == 1:
                raise RuntimeError
            return ""

        monkeypatch.setattr(connection, "overdue", fails_once)
        await until(lambda: len(ticks) >= 3)
        assert len(raised) == 1
        await side.close(0)
        assert counts.open == 0
