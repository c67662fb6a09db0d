"""`http_latency` of HTTP inside of TLS, against programs that say what they have done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from coral.collectors.http_latency.tls import PROGRAMS, TlsHooks
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.http_seen import CLIENT, COMPLETE, SERVER, Request, Seen, seeing
from tests.http_servers import certificate
from tests.openssl import openssl_1_1_program, openssl_program, static_openssl_program
from tests.support import ROOT, Puppet, wait_until

pytestmark = [
    pytest.mark.usefixtures("http_supported", "nothing_left", "no_descriptors_left"),
    pytest.mark.long,
]

MOST_OBJECTS = 65536
HOOKS = 15  # in a file: where functions begin, and where most of them return
SOURCES = ROOT / "tests/programs/http"
# Says, path, status, port of the peer.
Told = tuple[str, str, int, int]


@pytest.fixture(scope="module", name="certificate")
def certificate_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of localhost, with its key."""
    return certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def openssl() -> Path:
    """tests/programs/http/openssl.c."""
    return openssl_program()


@pytest.fixture(scope="module")
def static_openssl() -> Path:
    """The same, with OpenSSL in the program itself."""
    return static_openssl_program()


@pytest.fixture(scope="module")
def openssl_1_1() -> Path:
    """The same with OpenSSL 1.1."""
    if program := openssl_1_1_program():
        return program
    pytest.skip("the wheel of psycopg2 2.9.5 is not for this machine")


class OpensslTalk:
    """tests/programs/http/openssl.c: a client and a server in one process, which wait."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin
        assert process.stdout
        self.pid, self._in, self._out = process.pid, process.stdin, process.stdout
        self.port = int(self._out.readline())

    def go(self) -> None:
        """Has them make their requests, and waits until these are made."""
        self._in.write("x")
        self._in.flush()
        assert self._out.readline() == "done\n"

    def end(self) -> None:
        """Lets the process end."""
        self._in.write("x")


@contextmanager
def talking(command: Sequence[str | Path]) -> Iterator[OpensslTalk]:
    """COMMAND runs the program, which ends with the block."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        talk = OpensslTalk(process)
        yield talk
        talk.end()


class Server:
    """tests/programs/http/tls.py."""

    def __init__(self, how: str, certificate: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, SOURCES / "tls.py", how, certificate],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def told(self, count: int) -> list[Told]:
        """The next COUNT requests that it says to have answered."""
        assert self.process.stdout
        lines = [self.process.stdout.readline().split() for _ in range(count)]
        return [(method, path, int(status), int(port)) for method, path, status, port in lines]

    def listen_no_more(self) -> None:
        """Has a thread take what it says, so that it never waits for room in the pipe."""
        assert self.process.stdout
        said = self.process.stdout
        threading.Thread(target=lambda: all(map(bool, said)), daemon=True).start()

    def end(self) -> None:
        """Kills it."""
        self.process.kill()
        with self.process:
            pass


@contextmanager
def serving(how: str, certificate: Path) -> Iterator[Server]:
    """A server at work."""
    server = Server(how, certificate)
    try:
        yield server
    finally:
        server.end()


@contextmanager
def client_of(port: int, connections: int = 1) -> Iterator[Puppet]:
    """A Python process with open connections `c[0]`, `c[1]`, ..."""
    with Puppet() as client:
        client.do("import http.client, ssl, threading")
        client.do("context = ssl.create_default_context(); context.check_hostname = False")
        client.do("context.verify_mode = ssl.CERT_NONE")
        client.do(
            f"c = [http.client.HTTPSConnection('127.0.0.1', {port}, context=context) "
            f"for _ in range({connections})]"
        )
        client.do(
            "def get(c, path, method='GET', body=None): "
            "c.request(method, path, body); return c.getresponse().read()"
        )
        client.do("for one in c: one.connect()")
        yield client


def curl(port: int, *paths: str, more: Sequence[str] = ()) -> list[str]:
    """The command that gets PATHS on one connection."""
    urls = [f"https://127.0.0.1:{port}{path}" for path in paths]
    return ["curl", "-sk", "--http1.1", *more, *urls]


def told(requests: list[Request]) -> list[Told]:
    """What the other side of these can tell, too."""
    return [(it.method, it.path, it.status, it.remote_port) for it in requests]


def hooks(seen: Seen) -> TlsHooks:
    """The uprobes of a running collector."""
    return seen.collector.bpf_object.common(TlsHooks)


def left_over(seen: Seen, name: str) -> int:
    """The number of elements in a map of the hub."""
    return len(seen.collector.bpf_object.object.map(name).read_keys())


@pytest.mark.parametrize("how", ["threads", "asyncio"])
def test_both_sides_of_every_request_are_seen_once_with_its_peer(
    how: str, certificate: Path
) -> None:
    with serving(how, certificate) as server, seeing(server.pid, os.getpid()) as seen:
        paths = [*(f"/one/{i}" for i in range(5)), "/missing/1", "/after/0.02/x"]
        clients = [
            subprocess.Popen(
                curl(server.port, *(f"{path}/{i}" for path in paths)), stdout=subprocess.DEVNULL
            )
            for i in range(4)
        ]
        for client in clients:
            assert client.wait(20) == 0
        truth = server.told(28)
        of_server, of_client = seen.wait_for(28, SERVER), seen.wait_for(28, CLIENT)
        assert sorted(told(of_server)) == sorted(truth)
        assert {it.remote_port for it in of_client} == {server.port}
        by_server = {(it.local_port, it.path): it for it in of_client}
        for it in of_server:
            other = by_server[it.remote_port, it.path]
            assert other.exchange == it.exchange
            assert it.tls == other.tls == 1
            assert it.outcome == other.outcome == COMPLETE
            assert it.version == other.version == 1
            assert 0 < it.first_byte_ns <= it.duration_ns
        assert all(it.first_byte_ns >= 20_000_000 for it in of_server if "after" in it.path)
        assert seen.lost == 0
        wait_until(lambda: left_over(seen, "connections") == 0)
        assert left_over(seen, "ssl_objects") == 0


def test_a_body_goes_up_and_requests_share_one_connection(certificate: Path) -> None:
    with (
        serving("threads", certificate) as server,
        seeing(server.pid, os.getpid()) as seen,
        client_of(server.port) as client,
    ):
        client.do("for i in range(3): get(c[0], f'/up/{i}', 'POST', b'x' * 1000)")
        truth = server.told(3)
        found = seen.wait_for(3, SERVER)
        assert told(found) == truth
        assert [it.request_body_bytes for it in found] == [1000] * 3
        assert [it.number for it in found] == [0, 1, 2]
        assert len({it.connection_id for it in found}) == 1
        assert [it.exchange for it in seen.wait_for(3, CLIENT)] == [it.exchange for it in found]


def test_the_first_byte_of_much_passes_before_the_last(certificate: Path) -> None:
    """The server writes it by one call, and the client takes its time."""
    with (
        serving("threads", certificate) as server,
        seeing(server.pid, os.getpid()) as seen,
        client_of(server.port) as client,
    ):
        client.do("c[0].request('GET', '/much/x'); time.sleep(0.3); c[0].getresponse().read()")
        (served,), (made,) = (seen.wait_for(1, role) for role in (SERVER, CLIENT))
        for it in (served, made):
            assert it.response_body_bytes == 20_000_000
            assert it.duration_ns >= 300_000_000
        assert made.first_byte_ns >= 300_000_000
        assert served.time_ns + served.first_byte_ns < made.time_ns + made.first_byte_ns
        seen.until(whole_look())
        assert not +seen.unread


@pytest.mark.parametrize("how", ["threads", "asyncio"])
def test_a_connection_that_began_earlier_is_joined(how: str, certificate: Path) -> None:
    with serving(how, certificate) as server, client_of(server.port, 3) as client:
        client.do("for one in c: get(one, '/before')")
        server.told(3)
        # Threads of the server are inside of SSL_read now, which no uprobe has seen begin.
        first = "/joined/0" if how == "threads" else ""
        with seeing(server.pid, client.pid) as seen:
            client.do("for i in range(3): [get(one, f'/joined/{i}') for one in c]")
            truth = server.told(9)
            assert told(seen.wait_for(9, CLIENT)) == [
                (method, path, status, server.port) for method, path, status, _ in truth
            ]
            expected = [it for it in truth if it[1] != first]
            assert told(seen.wait_for(len(expected), SERVER)) == expected
            client.do("for one in c: one.close()")
            wait_until(lambda: left_over(seen, "connections") == 0)
            # Each connection once of which a request is missing, on the side that misses it.
            expected_unread = {"joined": 3} if how == "threads" else {}
            seen.until(lambda: +seen.unread == expected_unread)
            seen.until(whole_look())
            assert +seen.unread == expected_unread


def whole_look() -> Callable[[], bool]:
    """True once a drain has also looked at what was lost or not read, as not every one does."""
    end = time.monotonic() + 0.3
    return lambda: time.monotonic() > end


def test_an_object_without_room_is_a_loss_and_the_next_one_is_seen(certificate: Path) -> None:
    with serving("threads", certificate) as server, seeing(server.pid) as seen:
        objects = seen.collector.bpf_object.object.map("ssl_objects")
        mine = np.zeros(MOST_OBJECTS, objects.key_dtype)
        mine["process"], mine["ssl"] = os.getpid(), np.arange(MOST_OBJECTS)
        objects.write_many(mine, np.zeros(MOST_OBJECTS, objects.value_dtype))
        with client_of(server.port) as client:
            client.do("get(c[0], '/no-room')")
            seen.until(lambda: seen.lost >= 2)  # SSL_new, and each call that passes bytes
            server.told(1)
            seen.until(whole_look())
            assert seen.requests == []
        objects.delete(mine)
        lost = seen.lost
        with client_of(server.port) as client:
            client.do("get(c[0], '/room')")
            assert [it.path for it in seen.wait_for(1, SERVER)] == ["/room"]
        assert seen.lost == lost


def test_what_waits_on_an_object_of_no_known_socket_is_told_when_its_process_is_killed(
    certificate: Path,
) -> None:
    with Puppet() as server, seeing(server.pid) as seen:
        # The client's encrypted bytes never pass through a socket of the server.
        server.do("import ssl; context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)")
        server.do(f"context.load_cert_chain({str(certificate)!r})")
        server.do("there, back = ssl.MemoryBIO(), ssl.MemoryBIO()")
        server.do("insecure = ssl._create_unverified_context()")
        wait_until(lambda: len(hooks(seen)) == HOOKS)
        step = "def step(it):\n  try: it.do_handshake()\n  except ssl.SSLWantReadError: pass"
        server.do(f"exec({step!r})")
        server.do("s = context.wrap_bio(there, back, server_side=True)")
        server.do("c = insecure.wrap_bio(back, there)")
        server.do("[step(it) for _ in range(4) for it in (c, s)]")
        server.do("began_ns = time.monotonic_ns()")
        server.do("c.write(b'GET /waits HTTP/1.1\\r\\n\\r\\n'); s.read(999)")
        took_ns = int(server.ask("time.monotonic_ns() - began_ns"))
        assert left_over(seen, "ssl_objects") == 2
        server.kill()
        for role in (CLIENT, SERVER):
            (it,) = seen.wait_for(1, role)
            assert (it.method, it.path, it.status) == ("GET", "/waits", 0)
            assert (it.outcome, it.remote_port) == (pb.HTTP_OUTCOME_UNKNOWN, 0)
            assert it.duration_ns < took_ns
        assert left_over(seen, "ssl_objects") == left_over(seen, "connections") == 0


def test_no_cpu_has_a_record_of_tls_in_its_draft(certificate: Path) -> None:
    """The kernel may preempt a thread in the middle of a uprobe's program: here those that make the
    records run in threads that have called nothing else of OpenSSL."""
    with Puppet() as server, seeing(server.pid) as seen:
        server.do("import socket, ssl, threading")
        server.do("context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)")
        server.do(f"context.load_cert_chain({str(certificate)!r})")
        server.do("listener = socket.create_server(('127.0.0.1', 0))")
        wait_until(lambda: len(hooks(seen)) == HOOKS)
        port = int(server.ask("listener.getsockname()[1]"))
        with Puppet() as client:
            client.do("import socket, ssl; context = ssl._create_unverified_context()")
            client.do(f"raw = socket.create_connection(('127.0.0.1', {port}))")
            server.begin("s = context.wrap_socket(listener.accept()[0], server_side=True)")
            client.do("c = context.wrap_socket(raw)")
            server.done()
            client.do("c.sendall(b'GET /cut HTTP/1.1\\r\\n\\r\\n')")
            server.do("s.recv(999); s.setblocking(False)")
            server.do("shut = threading.Thread(target=lambda: s._sslobj.shutdown())")
            server.do("shut.start(); shut.join()")
            (it,) = seen.wait_for(1, SERVER)
            assert (it.path, it.outcome) == ("/cut", pb.HTTP_OUTCOME_ABORTED_BY_SERVER)
            assert it.tls == 1
        drafts = seen.collector.bpf_object.object.map("drafts").read_one(0)
        assert drafts is not None
        assert drafts["record"]["exchange"]["tls"].max() == 0


def test_encrypted_bytes_are_never_taken_for_those_of_another_connection(
    certificate: Path,
) -> None:
    """The server receives from both before it decrypts: requests of the same length."""
    with serving("crossed", certificate) as server, seeing(server.pid) as seen:
        with Puppet() as client:
            client.do("import socket, ssl, time")
            client.do("context = ssl.create_default_context(); context.check_hostname = False")
            client.do("context.verify_mode = ssl.CERT_NONE")
            client.do(
                f"raw = [socket.create_connection(('127.0.0.1', {server.port})) for _ in '12']"
            )
            client.do("both = [context.wrap_socket(it) for it in raw]")
            for turn in range(10):
                client.do(
                    f"for i in (0, 1): both[i].sendall(b'GET /crossed/%d/%d HTTP/1.1\\r\\n\\r\\n'"
                    f" % (i, {turn}))"
                )
                client.do("for it in both: it.recv(65536)")
            truth = {path: port for _, path, _, port in server.told(20)}
            found = seen.wait_for(20, SERVER)
        assert {it.path for it in found} == truth.keys()
        assert all(it.remote_port in (0, truth[it.path]) for it in found)
        tied = [it for it in found if it.remote_port]
        assert len(tied) >= 9  # one connection at least is known once a request has come


def test_each_function_of_openssl_counts_once_and_peeks_do_not(
    openssl: Path, static_openssl: Path, openssl_1_1: Path
) -> None:
    for program, how in (
        (openssl, "plain"),
        (static_openssl, "plain"),
        (openssl, "inner"),
        (openssl_1_1, "plain"),
        (openssl_1_1, "inner"),
    ):
        with talking([program, how, "40"]) as talk, seeing(talk.pid) as seen:
            talk.go()
            truth = [("GET", f"/said/{i}", 200 + i) for i in range(40)]
            for role in (SERVER, CLIENT):
                found = seen.wait_for(40, role)
                assert [it[:3] for it in told(found)] == truth
                assert {it.tls for it in found} == {1}
            if how == "plain":
                assert {it.remote_port for it in seen.of(SERVER)} == {talk.port}
                assert {it.local_port for it in seen.of(CLIENT)} == {talk.port}
            else:
                assert {it.remote_port for it in seen.of(SERVER)} <= {0, talk.port}
            assert not any("ghost" in it.path for it in seen.requests)
            wait_until(lambda: left_over(seen, "connections") == 0)
            assert left_over(seen, "ssl_objects") == 0


def test_a_library_that_is_loaded_later_is_found(certificate: Path) -> None:
    with (
        serving("threads", certificate) as server,
        Puppet() as client,
        seeing(client.pid) as seen,
    ):
        assert len(hooks(seen)) == 0
        client.do("import http.client, ssl")
        wait_until(lambda: len(hooks(seen)) == HOOKS)
        client.do("context = ssl._create_unverified_context()")
        client.do(f"c = http.client.HTTPSConnection('127.0.0.1', {server.port}, context=context)")
        client.do("c.request('GET', '/later'); c.getresponse().read()")
        assert told(seen.wait_for(1, CLIENT)) == [("GET", "/later", 200, server.port)]


def test_a_file_in_another_mount_namespace_is_found(openssl: Path, tmp_path: Path) -> None:
    """Over the library of its mount namespace lies a copy, which nobody else maps."""
    listed = subprocess.run(["ldd", openssl], check=True, capture_output=True, text=True).stdout
    library = Path(next(line for line in listed.splitlines() if "libssl" in line).split()[2])
    shutil.copy(library.resolve(), tmp_path / "copy")
    script = (
        f"mount -t tmpfs coral-test {tmp_path / 'over'} && cp {tmp_path / 'copy'} "
        f"{tmp_path / 'over'}/lib && mount --bind {tmp_path / 'over'}/lib {library.resolve()} && "
        f"exec {openssl} plain 5"
    )
    (tmp_path / "over").mkdir()
    with talking(["unshare", "--mount", "sh", "-ec", script]) as talk, seeing(talk.pid) as seen:
        talk.go()
        assert {it.remote_port for it in seen.wait_for(5, SERVER)} == {talk.port}


def test_a_program_is_seen_from_its_first_request_when_it_is_awaited(certificate: Path) -> None:
    """Nobody else maps the library when the session begins."""
    with serving("threads", certificate) as server:
        command = " ".join(map(repr, curl(server.port, "/first")))
        with subprocess.Popen(
            ["sh", "-c", f"read line; exec {command}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        ) as process:
            assert process.stdin
            with seeing(process.pid, from_exec="true") as seen:
                process.stdin.write(b"\n")
                process.stdin.close()
                assert process.wait(20) == 0
                assert told(seen.wait_for(1, CLIENT)) == [("GET", "/first", 200, server.port)]


def test_sessions_share_what_is_attached_and_come_and_go_while_requests_pass(
    certificate: Path,
) -> None:
    with (
        serving("threads", certificate) as server,
        client_of(server.port, 2) as client,
        seeing(client.pid) as seen,
    ):
        server.listen_no_more()
        client.do("import itertools; stop = threading.Event(); made = [0, 0]")
        client.do(
            "def run(i):\n"
            "  for n in itertools.count():\n"
            "    if stop.is_set(): return\n"
            "    get(c[i], f'/flow/{i}/{n}'); made[i] = n + 1\n".replace("\n", "\\n").join(
                ("exec('''", "''')")
            )
        )
        client.do("t = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]")
        client.do("[it.start() for it in t]")
        counts: list[int] = []
        for _ in range(3):
            with seeing(client.pid) as other:
                assert hooks(other) is hooks(seen)
                other.until(lambda: len(other.requests) >= 20)
                assert len(hooks(seen)) == HOOKS
                counts.append(len(other.requests))
            seen.drain()
        client.do("stop.set(); [it.join() for it in t]")
        made = [int(client.ask(f"made[{i}]")) for i in (0, 1)]
        found = seen.wait_for(sum(made), CLIENT)
        paths = sorted(it.path for it in found)
        assert paths == sorted(f"/flow/{i}/{n}" for i in (0, 1) for n in range(made[i]))
        assert {it.outcome for it in found} == {COMPLETE}
        assert len(hooks(seen)) == HOOKS


def has_unread(port: int) -> bool:
    """Whether bytes wait to be read at this local port of IPv4."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    queues = {queue for _, local, _, _, queue, *_ in lines if local.endswith(f":{port:04X}")}
    return any(not queue.endswith(":00000000") for queue in queues)


def test_what_passed_while_no_session_watched_is_no_part_of_a_later_one(certificate: Path) -> None:
    """Another session keeps the uprobes where they are, and the server has half of a request."""
    with (
        serving("threads", certificate) as server,
        client_of(server.port) as other,
        seeing(other.pid),
        seeing(server.pid, os.getpid()) as first,
        client_of(server.port) as client,
    ):
        client.do("get(c[0], '/first')")
        assert [it.path for it in first.wait_for(1, SERVER)] == ["/first"]
        first.collector.close()
        client.do("c[0].sock.sendall(b'GET /unseen HTTP/1.1\\r\\nX: ')")
        wait_until(lambda: not has_unread(server.port))
        with seeing(server.pid, client.pid) as second:
            client.do("c[0].sock.sendall(b'y\\r\\n\\r\\n'); c[0].sock.recv(999)")
            client.do("for i in range(3): get(c[0], f'/second/{i}')")
            for role in (SERVER, CLIENT):
                second.until(lambda: second.of(role)[-1:])  # noqa: B023
                second.until(lambda: second.of(role)[-1].path == "/second/2")  # noqa: B023
                paths = [it.path for it in second.of(role)]
                assert paths == [f"/second/{i}" for i in range(3)]


def ends_with_its_connection(client: Puppet, _: Server) -> None:
    """A body up to the end of the session, which the server says long before it closes."""
    client.do("began_ns = time.monotonic_ns()")
    client.do("get(c[0], '/to-close/x'); took_ns = time.monotonic_ns() - began_ns")
    client.do("c[0].close()")


def client_gives_up(client: Puppet, _: Server) -> None:
    """The client closes while the server works on its request."""
    client.do("c[0].request('GET', '/after/1/x'); time.sleep(0.05); c[0].close()")


def server_dies(client: Puppet, server: Server) -> None:
    """The server ends while it works on a request."""
    client.do("c[0].request('GET', '/after/30/x'); time.sleep(0.05)")
    server.process.kill()
    server.process.wait()
    client.do("import contextlib")
    client.begin("try: c[0].getresponse()\\nexcept Exception: pass".join(("exec('", "')")))
    client.done()


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        (ends_with_its_connection, COMPLETE),
        (client_gives_up, pb.HTTP_OUTCOME_ABORTED_BY_CLIENT),
        (server_dies, pb.HTTP_OUTCOME_ABORTED_BY_SERVER),
    ],
)
def test_how_it_ended(
    act: Callable[[Puppet, Server], None], outcome: int, certificate: Path
) -> None:
    with (
        serving("threads", certificate) as server,
        seeing(server.pid, os.getpid()) as seen,
        client_of(server.port) as client,
    ):
        act(client, server)
        for role in (CLIENT, SERVER):
            (it,) = seen.wait_for(1, role)
            assert it.outcome == outcome
            assert it.status == (200 if outcome == COMPLETE else 0)
            assert it.remote_port
            assert it.response_body_bytes == (12 if outcome == COMPLETE else 0)
            if outcome == COMPLETE:  # the server closes a second later
                assert it.duration_ns < int(client.ask("took_ns")) + 900_000_000


def test_objects_of_a_process_that_was_killed_are_freed(certificate: Path) -> None:
    with serving("asyncio", certificate) as server, seeing(server.pid) as seen:
        with client_of(server.port, 5) as client:
            client.do("for one in c: get(one, '/x')")
            seen.wait_for(5, SERVER)
            assert left_over(seen, "ssl_objects") == 5
            server.end()
        wait_until(lambda: left_over(seen, "ssl_objects") == 0, 20)
        assert left_over(seen, "connections") == 0


def unread(seen: Seen) -> dict[str, int]:
    """How many connections were not read, by the reason; most drains do not look."""
    return {what: it.count for what, it in seen.collector.drain().unread.items()}


@pytest.mark.parametrize(("tls", "counted"), [("true", {}), ("false", {"tls": 6})])
def test_what_is_not_read_is_told_and_what_is_read_is_not(
    tls: str, counted: dict[str, int], certificate: Path
) -> None:
    """Each connection once: those that no function of OpenSSL is called for."""
    with (
        serving("threads", certificate) as server,
        seeing(server.pid, os.getpid(), tls=tls) as seen,
    ):
        with client_of(server.port, 3) as client:
            client.do("for one in c: get(one, '/told'); one.close()")
            assert len(server.told(3)) == 3
            if tls == "true":
                seen.wait_for(3, SERVER)
        wait_until(lambda: left_over(seen, "connections") == 0)
        wait_until(lambda: unread(seen) == counted)


def test_without_tls_nothing_is_attached(certificate: Path) -> None:
    with (
        serving("threads", certificate) as server,
        client_of(server.port) as client,
        seeing(client.pid, tls="false") as seen,
    ):
        client.do("get(c[0], '/x')")
        seen.drain()
        assert seen.requests == []
        runs = seen.collector.bpf_object.program_stats()
        assert not runs.keys() & set(PROGRAMS)
