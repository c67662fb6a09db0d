"""`http_latency` of a Python server and a Python client: single requests, summaries and metrics, by
exact numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from coral import bpf
from coral.collectors.contract import EventRows, Summaries
from coral.collectors.http_latency.collector import HttpLatencyCollector
from coral.collectors.procfs import comm_of
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.http_seen import CLIENT, COMPLETE, SERVER, Request, Seen, seeing
from tests.network import number, puppets
from tests.support import (
    Puppet,
    RunningAgent,
    at_work,
    samples,
    scrape,
    wait_until,
    watching,
)

pytestmark = pytest.mark.usefixtures("http_supported", "nothing_left")

KIND = pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
BY_CLIENT, BY_SERVER = pb.HTTP_OUTCOME_ABORTED_BY_CLIENT, pb.HTTP_OUTCOME_ABORTED_BY_SERVER
WAIT_MS = 30

# A server with a thread for each connection. The paths say what it does.
SERVE = f"""
import http.server, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def log_message(self, *_): pass
    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                self.rfile.read(length + 2)
            self.rfile.readline()
        else:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
    def answer(self, status, length, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
    def do_GET(self):
        if self.path.startswith("/items/"):
            self.answer(200, 100)
            self.wfile.write(b"x" * 100)
        elif self.path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for chunk in (b"a" * 7, b"b" * 300):
                self.wfile.write(b"%x\\r\\n%b\\r\\n" % (len(chunk), chunk))
            self.wfile.write(b"0\\r\\n\\r\\n")
        elif self.path == "/waits":
            time.sleep({WAIT_MS / 1000})
            self.answer(200, 2)
            self.wfile.write(b"x")
            time.sleep({WAIT_MS / 1000})
            self.wfile.write(b"y")
        elif self.path == "/stuck":
            arrived.set()
            self.rfile.read(1)
            self.close_connection = True
        elif self.path == "/cut":
            self.answer(200, 100)
            self.wfile.write(b"x" * 10)
            self.close_connection = True
        elif self.path == "/vanishes":
            self.close_connection = True
        elif self.path == "/broken":
            self.answer(503, 0)
        else:
            self.answer(404, 9)
            self.wfile.write(b"not found")
    def do_HEAD(self):
        self.answer(200, 100)
    def do_POST(self):
        self.body()
        self.answer(201, 2)
        self.wfile.write(b"ok")
arrived = threading.Event()
served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=served.serve_forever, daemon=True).start()
"""
# A client whose `ask` makes a request and reads the response; `took_ns` is by its own clock.
CLIENT_CODE = """
import contextlib, http.client, socket, time
def ask(method, path, body=None, **options):
    global took_ns
    began = time.monotonic_ns()
    c.request(method, path, body, **options)
    response = c.getresponse()
    response.read()
    took_ns = time.monotonic_ns() - began
    return response.status
"""


class Pair:
    """A client and a server, each a process; the client's connection `c` is new."""

    def __init__(self, client: Puppet, server: Puppet) -> None:
        self.client, self.server = client, server
        server.do(f"exec({SERVE!r})")
        self.port = number(server, "served.server_port")
        client.do(f"exec({CLIENT_CODE!r})")
        self.connect()

    def connect(self) -> None:
        """A new connection, not yet made."""
        self.client.do(f"c = http.client.HTTPConnection('127.0.0.1', {self.port})")

    def ask(self, *arguments: object, **options: object) -> int:
        """Has the client make a request; the status of the response."""
        named = "".join(f", {name}={value!r}" for name, value in options.items())
        return number(self.client, f"ask({', '.join(map(repr, arguments))}{named})")

    @property
    def pids(self) -> tuple[int, int]:
        return self.client.pid, self.server.pid


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A client and a server that has one connection each time."""
    with puppets(2) as (client, server):
        yield Pair(client, server)


def both(seen: Seen, count: int) -> tuple[list[Request], list[Request]]:
    """The requests of the client and of the server, once there are COUNT of each, none lost."""
    found = seen.wait_for(count, CLIENT), seen.wait_for(count, SERVER)
    assert not seen.lost
    return found


def test_each_request_of_a_kept_connection_is_seen_once_on_each_side(pair: Pair) -> None:
    asked = [
        ("GET", "/items/1?secret=1", None, 200),
        ("GET", "/items/2", None, 200),
        ("POST", "/items", b"x" * 70_000, 201),
        ("HEAD", "/items/3", None, 200),
        ("GET", "/nothing", None, 404),
        ("GET", "/chunked", None, 200),
        ("GET", "/broken", None, 503),
    ]
    with seeing(*pair.pids) as seen:
        for method, path, body, status in asked:
            assert pair.ask(method, path, body) == status
        local_port = number(pair.client, "c.sock.getsockname()[1]")
        for role, found in zip((CLIENT, SERVER), both(seen, len(asked)), strict=True):
            assert [each.exchange for each in found] == [
                ("GET", "/items/1", 200, 0, 100),
                ("GET", "/items/2", 200, 0, 100),
                ("POST", "/items", 201, 70_000, 2),
                ("HEAD", "/items/3", 200, 0, 0),
                ("GET", "/nothing", 404, 0, 9),
                ("GET", "/chunked", 200, 0, 307),
                ("GET", "/broken", 503, 0, 0),
            ]
            assert [each.number for each in found] == list(range(len(asked)))
            assert len({each.connection_id for each in found}) == 1
            assert {(each.outcome, each.version) for each in found} == {(COMPLETE, 1)}
            pid = pair.client.pid if role == CLIENT else pair.server.pid
            ports = (local_port, pair.port) if role == CLIENT else (pair.port, local_port)
            assert {(each.pid, each.local_port, each.remote_port) for each in found} == {
                (pid, *ports)
            }
            for each in found:
                assert 0 < each.first_byte_ns <= each.duration_ns
                assert 0 <= each.request_ns <= each.first_byte_ns


def test_a_chunked_request_and_pipelined_ones_are_matched_in_order(pair: Pair) -> None:
    chunks = "(b'a' * 5, b'b' * 700)"
    with seeing(*pair.pids) as seen:
        pair.client.do(f"ask('POST', '/up', iter({chunks}), encode_chunked=True)")
        pair.client.do(pipelined_requests(pair.port))
        pair.client.do("exec('while read().count(item) < 20: pass')")
        for found in both(seen, 21):
            up, *pipelined = found
            assert up.exchange == ("POST", "/up", 201, 705, 2)
            assert [(each.number, each.exchange) for each in pipelined] == [
                (n, ("GET", f"/items/{n}", 200, 0, 100)) for n in range(20)
            ]
            assert {each.outcome for each in found} == {COMPLETE}


def pipelined_requests(port: int) -> str:
    """Code that sends 20 requests at once on a connection `p`; `read()` gives what has come."""
    code = f"""
item, got = b"x" * 100, bytearray()
def read():
    part = p.recv(1 << 16)
    got.extend(part)
    return got if part else item * 20
p = socket.create_connection(("127.0.0.1", {port}))
p.sendall(b"".join(b"GET /items/%d HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n" % n for n in range(20)))
"""
    return f"exec({code!r})"


def test_responses_that_are_read_after_the_connection_has_ended_are_responses(pair: Pair) -> None:
    with seeing(pair.client.pid) as seen:
        pair.client.do(pipelined_requests(pair.port))
        pair.client.do("p.shutdown(socket.SHUT_WR)")
        closed = "p.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == 7"
        wait_until(lambda: pair.client.ask(closed) == "True")
        pair.client.do("exec('while p.recv(1 << 16): pass')")
        found = seen.wait_for(20, CLIENT)
        assert {(each.status, each.response_body_bytes, each.outcome) for each in found} == {
            (200, 100, COMPLETE)
        }


def test_both_times_are_what_the_handler_waits_and_within_what_the_client_measures(
    pair: Pair,
) -> None:
    with seeing(*pair.pids) as seen:
        assert pair.ask("GET", "/waits") == 200
        took_ns = number(pair.client, "took_ns")
        (made,), (served,) = both(seen, 1)
        for each in (made, served):
            assert each.first_byte_ns >= WAIT_MS * 1e6
            assert each.duration_ns >= 2 * WAIT_MS * 1e6
        assert made.duration_ns <= took_ns
        # The client may come late to the first byte.
        assert served.duration_ns - served.first_byte_ns >= WAIT_MS * 1e6


def test_idle_time_of_a_kept_connection_belongs_to_no_request(pair: Pair) -> None:
    with seeing(*pair.pids) as seen:
        took_ns = []
        for path in ("/items/1", "/items/2"):
            pair.ask("GET", path)
            took_ns.append(number(pair.client, "took_ns"))
            pair.client.do("time.sleep(0.3)")
        pair.client.do("c.close()")
        for found in both(seen, 2):
            for each, busy_ns in zip(found, took_ns, strict=True):
                assert each.duration_ns < busy_ns + 0.25e9


def test_a_client_that_leaves_is_told_from_a_server_that_does(pair: Pair) -> None:
    with seeing(*pair.pids) as seen:
        pair.client.do("c.request('GET', '/stuck')")
        pair.server.do("arrived.wait()")
        pair.client.do("c.close()")
        for found in both(seen, 1):
            assert (found[0].exchange, found[0].outcome) == (("GET", "/stuck", 0, 0, 0), BY_CLIENT)
            assert found[0].first_byte_ns == 0
        ends = (("/cut", 200, 10), ("/vanishes", 0, 0))
        for count, (path, status, received) in enumerate(ends, 2):
            pair.connect()
            pair.client.do(
                f"with contextlib.suppress(http.client.HTTPException): ask('GET', {path!r})"
            )
            pair.client.do("c.close()")
            for found in both(seen, count):
                last = found[-1]
                assert (last.exchange, last.outcome) == (
                    ("GET", path, status, 0, received),
                    BY_SERVER,
                )
                assert bool(last.first_byte_ns) == bool(status)


def test_filters_of_events_apply(pair: Pair) -> None:
    config = {"pid": str(pair.server.pid), "mode": "events", "min_duration": f"{2 * WAIT_MS}ms"}
    errors = {"pid": str(pair.server.pid), "mode": "events", "errors_only": "true"}
    with (
        seeing(pair.server.pid) as everything,
        at_work(create(**config)) as slow,
        at_work(create(**errors)) as failed,
    ):
        for path in ("/items/1", "/waits", "/broken", "/nothing"):
            pair.ask("GET", path)
        everything.wait_for(4, SERVER)
        for collector, path, status in ((slow, "/waits", 200), (failed, "/broken", 503)):
            rows = collector.drain().rows
            assert isinstance(rows, EventRows)
            (record,) = rows.records
            assert (rows.strings[record["path"]], record["status"]) == (path, status)
            assert rows.strings[record["comm"]] == comm_of(pair.server.pid)


def create(**config: str) -> HttpLatencyCollector:
    return HttpLatencyCollector.create(config, None, bpf.probe())


class Summed:
    """The rows of a session of summaries so far, added up by role, method, route and status."""

    def __init__(self, collector: HttpLatencyCollector) -> None:
        self.collector = collector
        self.rows: list[pb.HttpLatencyHistogram] = []

    def counts(self) -> Counter[tuple[str, str, str, int]]:
        """How many requests of each kind so far."""
        batch = self.collector.drain()
        assert isinstance(batch.rows, Summaries)
        assert not batch.losses
        for row in batch.rows.as_messages():
            assert isinstance(row, pb.HttpLatencyHistogram)
            self.rows.append(row)
        counted: Counter[tuple[str, str, str, int]] = Counter()
        for row in self.rows:
            counted[row.labels["role"], row.labels["method"], row.route, row.status] += row.count
        return counted


def test_summaries_count_every_request_by_route(pair: Pair) -> None:
    expected: Counter[tuple[str, str, str, int]] = Counter()
    config = {"pid": ",".join(map(str, pair.pids)), "routes": "/items/{item}/**"}
    with at_work(create(**config)) as collector:
        summed = Summed(collector)
        for n in range(25):
            for method, path, route, status in (
                ("GET", f"/items/{n}", "/items/{item}/**", 200),
                ("POST", f"/orders/{n}", "/orders/{id}", 201),
                ("GET", "/chunked", "/chunked", 200),
                ("GET", f"/users/{n}/x", "/users/{id}/x", 404),
                ("GET", "/broken", "/broken", 503),
            ):
                assert pair.ask(method, path, b"12345" if method == "POST" else None) == status
                for role in ("client", "server"):
                    expected[role, method, route, status] += 1
        wait_until(lambda: summed.counts() == expected)
    by_route: dict[str, dict[str, Any]] = {}
    for row in summed.rows:
        assert sum(row.counts) == sum(row.first_byte_counts) == row.count
        assert 0 < row.first_byte_min <= row.first_byte_max <= row.max
        assert row.min * row.count <= row.sum * (1 + 1e-9)
        assert row.sum <= row.max * row.count * (1 + 1e-9)
        assert row.labels["status_class"] == f"{row.status // 100}xx"
        assert (row.labels["version"], row.labels["scheme"], row.unit) == ("1.1", "http", "ms")
        assert not row.outcomes
        sums = by_route.setdefault(row.route, Counter())
        for name in ("errors", "request_body_bytes", "response_body_bytes"):
            sums[name] += getattr(row, name)
    # Each is in the rows of the client and in those of the server.
    assert by_route["/orders/{id}"]["request_body_bytes"] == 2 * 25 * 5
    assert by_route["/items/{item}/**"]["response_body_bytes"] == 2 * 25 * 100
    assert by_route["/chunked"]["response_body_bytes"] == 2 * 25 * 307
    assert by_route["/broken"]["errors"] == 2 * 25
    assert by_route["/users/{id}/x"]["errors"] == 0


def test_histograms_have_both_times(pair: Pair) -> None:
    with (
        seeing(pair.server.pid) as seen,
        at_work(create(pid=str(pair.server.pid))) as collector,
    ):
        for _ in range(3):
            pair.ask("GET", "/waits")
        times = [(it.first_byte_ns, it.duration_ns) for it in seen.wait_for(3, SERVER)]
        summed = Summed(collector)
        assert summed.counts() == {("server", "GET", "/waits", 200): 3}
        (row,) = summed.rows
    for values, counts in zip(
        zip(*times, strict=True), (row.first_byte_counts, row.counts), strict=True
    ):
        slots = Counter(sum(value > bound * 1e6 for bound in row.buckets) for value in values)
        assert {slot: count for slot, count in enumerate(counts) if count} == slots
    firsts, totals = ([each / 1e6 for each in values] for values in zip(*times, strict=True))
    assert (row.min, row.max, row.sum) == pytest.approx((min(totals), max(totals), sum(totals)))
    assert (row.first_byte_min, row.first_byte_max, row.first_byte_sum) == pytest.approx(
        (min(firsts), max(firsts), sum(firsts))
    )


def test_requests_without_a_response_are_summed_by_their_end(pair: Pair) -> None:
    with at_work(create(pid=str(pair.server.pid))) as collector:
        pair.client.do("c.request('GET', '/stuck')")
        pair.server.do("arrived.wait()")
        pair.client.do("c.close()")
        summed = Summed(collector)
        wait_until(lambda: summed.counts() == {("server", "GET", "/stuck", 0): 1})
    (row,) = summed.rows
    assert (row.errors, dict(row.outcomes)) == (1, {"aborted_by_client": 1})
    assert (row.labels["status"], row.labels["outcome"]) == ("", "aborted_by_client")
    assert not any(row.first_byte_counts)


@pytest.mark.parametrize("mode", ["events", "summaries"])
def test_what_a_small_ring_has_no_room_for_is_counted_to_the_one(mode: str, pair: Pair) -> None:
    config = {"pid": str(pair.server.pid), "ring": "8KiB", "mode": mode}
    with at_work(create(**config)) as collector, seeing(pair.server.pid) as seen:
        pair.client.do("for n in range(200): ask('GET', f'/items/{n}')")
        seen.wait_for(200, SERVER)
        rows, lost = 0, 0

        def all_told() -> bool:
            nonlocal rows, lost
            batch = collector.drain()
            lost += batch.losses.get(pb.Loss.STAGE_KERNEL_BUFFER, 0)
            if isinstance(batch.rows, EventRows):
                rows += len(batch.rows)
                paths = [batch.rows.strings[at] for at in batch.rows.records["path"].tolist()]
                assert paths == [f"/items/{n}" for n in range(len(paths))]
            else:
                rows += int(batch.rows.columns["count"].sum())
            return rows + lost == 200

        wait_until(all_told)
        assert 8 << 10 >= rows * 192 > 4 << 10


def test_names_with_too_many_values_collapse(pair: Pair) -> None:
    with at_work(create(pid=str(pair.server.pid), max_children="10")) as collector:
        summed = Summed(collector)
        for n in range(30):
            pair.ask("GET", f"/who/name{n}x")
        wait_until(lambda: summed.counts().total() == 30)
        assert {row.route for row in summed.rows} >= {"/who/{*}"}
        assert len({row.route for row in summed.rows}) <= 11
        summed.rows.clear()
        for n in range(30):
            pair.ask("GET", f"/who/name{n}x")
        wait_until(lambda: summed.counts() == {("server", "GET", "/who/{*}", 404): 30})


def test_prometheus_counts_what_a_session_sums(agent: RunningAgent, pair: Pair) -> None:
    made = {"http_request_method": "POST", "http_route": "/orders/{id}"}
    with watching(agent, 60.0, "shop", KIND, pid=str(pair.server.pid)) as watch:
        for n in range(7):
            pair.ask("POST", f"/orders/{n}", b"x" * 11)
        counted: Counter[int] = Counter()
        while counted.total() < 7:
            for row in watch.read().http_latency:
                counted[row.status] += row.count
        assert counted == {201: 7}
    text = scrape(agent)
    labels = {
        "service": "shop",
        **made,
        "http_response_status_code": "201",
        "error_type": "",
        "url_scheme": "http",
        "network_protocol_version": "1.1",
    }
    for name, value in (
        ("http_server_request_duration_seconds_count", 7),
        ("http_server_request_body_size_bytes_sum", 77),
        ("http_server_response_body_size_bytes_sum", 14),
        ("http_server_response_body_size_bytes_count", 7),
    ):
        assert samples(text, name, **made) == {frozenset(labels.items()): value}
    buckets = samples(text, "http_server_request_duration_seconds_bucket", **made)
    bounds = [dict(each)["le"] for each in buckets]
    assert bounds[:6] == ["0.0001", "0.00025", "0.0005", "0.001", "0.0025", "0.005"]
    assert bounds[-3:] == ["7.5", "10.0", "+Inf"]
    assert list(buckets.values())[-1] == 7
    assert not samples(text, "http_client_request_duration_seconds_count")


def test_what_is_no_http_1_is_counted_with_its_bytes() -> None:
    with puppets(1) as (client,), at_work(create(pid=str(client.pid))) as collector:
        client.do("import socket; l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()")
        client.do("c = socket.create_connection(l.getsockname()); s = l.accept()[0]")
        counted: Counter[str] = Counter()
        sizes: Counter[str] = Counter()

        def read() -> Counter[str]:
            batch = collector.drain()
            assert not len(batch.rows)
            for what, unread in batch.unread.items():
                counted[what] += unread.count
                sizes[what] += unread.bytes
            return counted

        # Both ends are the same process's.
        for first, what in (
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), "http2"),
            (b"\x16\x03\x01\x00\x05hello", "tls"),
            (b"SSH-2.0-x\r\n", "other"),
        ):
            client.do("c = socket.create_connection(l.getsockname()); s = l.accept()[0]")
            client.do(f"c.sendall({first!r}); s.recv(100); s.sendall(bytes(50)); c.recv(100)")
            if what != "tls":  # which functions of OpenSSL may read yet
                wait_until(lambda what=what: read()[what] == 2)  # type: ignore[misc]
            client.do("c.close(); s.close()")
            # What came before it was clear is not among these.
            wait_until(lambda what=what: read() and sizes[what] >= 100)  # type: ignore[misc]
        assert counted == {"http2": 2, "tls": 2, "other": 2}


def test_a_connection_that_is_joined_in_its_middle_is_counted(pair: Pair) -> None:
    pair.client.do("c.request('GET', '/waits')")
    with at_work(create(pid=str(pair.client.pid))) as collector:
        pair.client.do("c.getresponse().read()")
        batch = collector.drain()
        assert {what: it.count for what, it in batch.unread.items()} == {"joined": 1}
        pair.ask("GET", "/items/1")
        summed = Summed(collector)
        wait_until(lambda: summed.counts() == {("client", "GET", "/items/{id}", 200): 1})
