"""The gate's parts that do no I/O: frames that are counted, rates, quotas; and its listeners' rules
for paths and addresses."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from coral.agent.access.tokens import Tokens
from coral.agent.addresses import UnixAddress
from coral.agent.caller import Caller, Trust
from coral.agent.config import Auth, ByteCount, Config, ConfigError, Duration, Limits
from coral.agent.errors import LimitError
from coral.agent.rate import Bucket
from coral.agent.serving import gate
from coral.agent.serving.counts import ConnectionCounts
from coral.agent.serving.gate import Side
from coral.agent.serving.http2 import Closings, Meter, NotHttp2Error, goaway
from coral.agent.serving.listening import Listener, Origin, TcpListener, UnixListener, listen
from coral.agent.serving.quota import Quota
from coral.agent.serving.relay import Connection, Peer
from coral.agent.serving.service import EbpfService
from coral.agent.sessions.budget import Priority
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.http2 import (
    ACK,
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


@given(sizes=st.lists(st.integers(1, 40), min_size=1))
def test_streams_are_open_until_one_of_the_ends_closes_them(sizes: list[int]) -> None:
    meter, closings, ended = Meter(), Closings(), []
    sent = PREFACE + frame(SETTINGS)
    for stream in (1, 3, 5, 7, 9, 4, 3):  # gRPC ignores the last two
        sent += frame(HEADERS, END_HEADERS, stream, INDEXED)
    sent += frame(DATA, 0, 5, bytes(100)) + frame(RST_STREAM, 0, 7, bytes(4))
    sent += frame(DATA, END_STREAM, 9)  # the request has ended, and the call has not
    # The first bit of a stream's number says nothing.
    sent += frame(HEADERS, END_HEADERS, 0x8000_000B, INDEXED)
    sent += frame(HEADERS, END_HEADERS, 13, INDEXED)
    meter.feed(memoryview(sent))
    assert (meter.streams, meter.unfinished_bytes) == (6, 100 + 64)
    answer = frame(SETTINGS, ACK) + frame(PING, ACK, 0, bytes(8)) + frame(DATA, 0, 3, bytes(300))
    answer += frame(HEADERS, END_HEADERS | END_STREAM, 3, INDEXED) + frame(
        RST_STREAM, 0, 5, bytes(4)
    )
    answer += frame(DATA, END_STREAM, 11, bytes(70))
    at = turn = 0
    while at < len(answer):
        step = sizes[turn % len(sizes)]
        ended += closings.feed(memoryview(answer)[at : at + step])
        at, turn = at + step, turn + 1
    assert ended == [3, 5, 11]
    assert closings.between_frames
    for stream in ended:
        meter.close(stream)
    assert (meter.streams, meter.unfinished_bytes) == (3, 0)
    meter.feed(memoryview(frame(DATA, 0, 5, bytes(100))))  # gRPC discards it
    assert meter.unfinished_bytes == 0
    closings.feed(memoryview(answer)[:-1])
    assert not closings.between_frames


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
        UnixListener(UnixAddress(path)).close()
    else:
        with pytest.raises(
            ConfigError, match=rf"{name} exists and is not .* left as it is"
        ) as told:
            UnixListener(UnixAddress(path))
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
            UnixListener(UnixAddress(path))
        assert path.exists()
    with closing(UnixListener(UnixAddress(path))):
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_a_path_that_is_another_socket_by_now_is_not_removed(path: Path) -> None:
    listener = UnixListener(UnixAddress(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        listener.close()
        assert path.is_socket()


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_that_others_may_write_is_refused(mode: int, path: Path) -> None:
    path.parent.chmod(mode)
    with pytest.raises(ConfigError, match=f"may write {path.parent}"):
        UnixListener(UnixAddress(path))
    assert not list(path.parent.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory away")
def test_another_users_directory_is_refused(path: Path) -> None:
    os.chown(path.parent, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"may write {path.parent}"):
        UnixListener(UnixAddress(path))


def test_a_path_that_is_refused_gets_no_lock(path: Path) -> None:
    path.write_text("kept")
    with pytest.raises(ConfigError, match="exists and is not a socket"):
        UnixListener(UnixAddress(path))
    assert list(path.parent.iterdir()) == [path]
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="another agent is listening there"):
            UnixListener(UnixAddress(path))
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("addresses", "text"),
    [
        (["unix:"], "'unix:' has no path; give unix:PATH or HOST:PORT"),
        (
            ["tcp:127.0.0.1:9071"],
            (
                "'tcp:127.0.0.1:9071': the host 'tcp:127.0.0.1' is not known (Name or service not "
                "known); give unix:PATH or HOST:PORT"
            ),
        ),
        (
            [f"unix:/run/{'x' * 103}"],
            (
                f"unix:/run/{'x' * 103}: the path has 108 bytes; give at most 107, the kernel's "
                "limit for the path of a unix socket"
            ),
        ),
        (["127.0.0.1:1", "127.0.0.1:1"], "127.0.0.1:1 is given twice; give each address once"),
    ],
)
def test_an_address_that_is_refused_is_told_what_is_accepted(
    addresses: list[str], text: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        listen(Config(listen=tuple(addresses)), has_token=True)
    assert str(refused.value) == f"listen: {text}"


def test_a_path_that_is_given_twice_is_refused_as_that(path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^listen: unix:{path} is given twice"):
        listen(Config(listen=(f"unix:{path}",) * 2), has_token=True)
    assert not path.exists()
    # Port 0 is another port each time.
    listeners = listen(Config(listen=("127.0.0.1:0",) * 2), has_token=True)
    assert len({listener.address for listener in listeners}) == 2
    for listener in listeners:
        listener.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="the text is for root")
def test_root_is_named_once_where_a_directory_is_refused(path: Path) -> None:
    path.parent.chmod(0o1777)
    with pytest.raises(ConfigError) as refused:
        UnixListener(UnixAddress(path))
    assert str(refused.value) == (
        f"listen: unix:{path}: others than root may write {path.parent}, and could put their own "
        "socket there: choose a directory that belongs to root, with mode 0755 or less"
    )


# The token


def token_config(path: Path, token: str, mode: int) -> Config:
    path.write_text(token)
    path.chmod(mode)
    return Config(auth=Auth(token_file=str(path)))


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o777])
def test_a_token_that_others_may_write_is_refused(mode: int, tmp_path: Path) -> None:
    config = token_config(tmp_path / "token", "x" * 16, mode)
    with pytest.raises(ConfigError) as refused:
        Tokens(config.auth)
    assert str(refused.value) == (
        f"auth.token_file: {tmp_path}/token: others than its owner may write it (mode {mode:04o}), "
        "and could choose the token; give a file of mode 0600"
    )


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    config = token_config(tmp_path / "token", f" {'x' * 15}\n", 0o600)
    with pytest.raises(ConfigError, match="the token has 15 bytes; give at least 16,"):
        Tokens(config.auth)


@pytest.mark.parametrize(
    ("mode", "warnings"), [(0o400, 0), (0o600, 0), (0o440, 0), (0o644, 1), (0o444, 1)]
)
def test_a_token_that_every_user_may_read_is_warned_of(
    mode: int, warnings: int, tmp_path: Path
) -> None:
    token_config(tmp_path / "token", f"{'x' * 16}\n", mode)
    (tmp_path / "link").symlink_to("token")
    with structlog.testing.capture_logs() as lines:
        tokens = Tokens(Auth(token_file=f"{tmp_path}/link"))
    assert tokens.name_of("x" * 16) == "default"
    assert tokens.name_of("y" * 16) == ""
    assert [line["event"] for line in lines] == ["every user may read the token"] * warnings


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
        groups = tuple(f"gid:{gid}" for gid in dict.fromkeys((os.getegid(), *os.getgroups())))
        assert set(origin.names) == {f"uid:{user}", *groups, "socket:admin"}
        host, _, port = tcp.address.rpartition(":")
        with socket.create_connection((host, int(port))) as client:
            accepted, _ = tcp.sockets[0].accept()
            with accepted:
                origin = tcp.origin(accepted)
            assert origin.address == f"ipv4:127.0.0.1:{client.getsockname()[1]}"
        assert (origin.principal, origin.trust) == (f"uid {user}", Trust.ANYONE)
        assert origin.names == ()
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

    def handshake_wait_s(self, _now_s: float) -> float:
        return 0.0


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
    tls: Any = None

    def __init__(self, failing: Failing) -> None:
        self.sockets: Any = (failing,)

    def origin(self, _accepted: socket.socket) -> Origin:
        return Origin("unix:", "uid 0", Trust.OWNER)

    def close(self) -> None: ...


@contextmanager
def descriptors(most: int) -> Iterator[None]:
    """At most the given number in this process, for the duration of a block."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("most", "unix", "tcp"), [(64, 5, 1), (100, 8, 1), (200, 16, 1), (1024, 85, 68)]
)
async def test_tcp_leaves_descriptors_for_the_agent_and_its_sessions(
    most: int, unix: int, tcp: int, path: Path
) -> None:
    def side(listener: Listener) -> Side:
        return Side((listener,), socket.socket, Limits(), ConnectionCounts())

    with (
        closing(UnixListener(UnixAddress(path))) as on_unix,
        closing(TcpListener("127.0.0.1:0", "127.0.0.1", 0)) as on_tcp,
        descriptors(most),
    ):
        assert (side(on_unix).most, side(on_tcp).most) == (unix, tcp)


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
