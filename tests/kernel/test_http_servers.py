"""`http_latency` against what real servers and clients say of the same requests."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from tests.http_seen import (
    BY_CLIENT,
    BY_SERVER,
    CLIENT,
    COMPLETE,
    SERVER,
    Request,
    Seen,
    seeing_plain,
)
from tests.http_servers import (
    CLIENTS,
    MISSING,
    SERVERS,
    Call,
    Exchange,
    Logged,
    Nginx,
    Node,
    Server,
    client,
    exchanges,
)
from tests.network import connected, puppets
from tests.support import PATIENCE, wait_until

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("http_programs", "nothing_left"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}"),
]

_CURL_GOT_A_PART, _CURL_TIMED_OUT = 18, 28  # of its exit statuses
_WRK_S = 2
# nginx counts it as a part of the response's body.
_INTERIM_BYTES = len("HTTP/1.1 100 Continue\r\n\r\n")


@pytest.fixture
def site() -> Iterator[Path]:
    """A directory for files, which every user may read."""
    with TemporaryDirectory() as place:
        path = Path(place)
        path.chmod(0o755)
        yield path


def _tagged(site: Path, by: str, server: Server) -> list[Call]:
    """Requests to paths of their own."""
    calls = []
    (site / by).mkdir(mode=0o755)

    def add(method: str, name: str, size: int, sends: int = 0, **headers: str) -> None:
        path = f"{by}/{name}"
        (site / path).write_bytes(b"x" * size)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        calls.append(Call(method, f"/{path}", sends, named))

    for size in (0, 1, 999, 70_000):
        add("GET", f"get-{size}", size)
    add("HEAD", "head", 5000)
    add("GET", "unmodified", 100, If_Modified_Since="Fri, 01 Jan 2100 00:00:00 GMT")
    if server.takes:
        add(server.takes, "whole", 10, sends=5000)
        add(server.takes, "chunked", 11, sends=5001, Transfer_Encoding="chunked")
        add(server.takes, "expected", 12, sends=5002, Expect="100-continue")
    calls.append(Call("GET", f"/{by}/missing"))
    return calls


@pytest.mark.parametrize("name", SERVERS)
def test_every_request_once(name: str, site: Path, tmp_path: Path) -> None:
    server = SERVERS[name](site, tmp_path)
    calls = {by: _tagged(site, by, server) for by in CLIENTS}
    with server.running(), ExitStack() as stack:
        callers = {
            by: stack.enter_context(client(command(server.port, calls[by])))
            for by, command in CLIENTS.items()
        }
        seen = stack.enter_context(seeing_plain(*server.pids, *(it.pid for it in callers.values())))
        for caller in callers.values():
            caller.go()
        told = {by: exchanges(calls[by], caller.finish()) for by, caller in callers.items()}
        total = sum(map(len, told.values()))
        at_client, at_server = seen.wait_for(total, CLIENT), seen.wait_for(total, SERVER)
        assert not seen.lost
    for by, caller in callers.items():
        own = [each for each in at_client if each.pid == caller.pid]
        assert [Exchange(*each.exchange) for each in own] == told[by]
    assert {each.outcome for each in (*at_client, *at_server)} == {COMPLETE}
    clients = {each.path: each for each in at_client}
    for row in at_server:
        other = clients.pop(row.path)
        assert row.exchange == other.exchange
        assert (row.local_port, row.remote_port) == (other.remote_port, other.local_port)
    rows = {each.path: each for each in at_server}
    for line in _logged(server, total):
        row = rows.pop(line.path)
        interim = _INTERIM_BYTES if name == "nginx" and row.path.endswith("/expected") else 0
        assert (row.method, row.status) == (line.method, line.status)
        assert line.body_bytes in (-1, row.response_body_bytes + interim)
        assert line.pid in (-1, row.pid)
    assert not rows


_MANY = 100 << 20


@pytest.mark.timed
def test_a_hundred_megabytes_each_way(site: Path, tmp_path: Path) -> None:
    with (site / "down").open("wb") as file:
        file.truncate(_MANY)
    server = Nginx(site, tmp_path)
    place = f"http://127.0.0.1:{server.port}"
    told = ("--silent", "--output", "/dev/null", "--write-out", "%{http_code} %{time_total}\n")
    command = ("curl", *told, f"{place}/down", "--next", *told, "-T", site / "down", f"{place}/up")
    with server.running(), client(command) as caller:
        with seeing_plain(*server.pids, caller.pid) as seen:
            times = [float(line.split()[1]) for line in caller.run().splitlines()]
            rows = seen.wait_for(2, CLIENT), seen.wait_for(2, SERVER)
            assert not seen.lost
        lines = _logged(server, 2)
    for found in rows:
        assert [each.exchange for each in found] == [
            ("GET", "/down", 200, 0, _MANY),
            ("PUT", "/up", 201, _MANY, 0),
        ]
        assert {each.outcome for each in found} == {COMPLETE}
        for each, time_s in zip(found, times, strict=True):
            assert each.duration_ns / 1e9 == pytest.approx(time_s, rel=0.1, abs=0.02 * PATIENCE)
    for each, line in zip(rows[1], lines, strict=True):
        # It reads the clock once for everything that it has to do at a time.
        assert each.duration_ns / 1e9 == pytest.approx(line.request_s, rel=0.1, abs=0.02 * PATIENCE)
    assert lines[0].body_bytes == _MANY


def _logged(server: Server, count: int) -> list[Logged]:
    """The lines of a server's log, once there are COUNT."""
    lines = wait_until(lambda: (found := server.log()) and len(found) >= count and found)
    assert lines
    assert len(lines) == count
    return lines


@contextmanager
def _proxied(site: Path, tmp_path: Path) -> Iterator[tuple[Nginx, Node]]:
    """nginx that passes what is below /via/ on to Node."""
    (tmp_path / "proxy").mkdir()
    upstream, proxy = Node(site, tmp_path), Nginx(site, tmp_path / "proxy")
    proxy.upstreams = f"upstream node {{ server 127.0.0.1:{upstream.port}; keepalive 2; }}"
    proxy.locations = (
        "location /via/ { proxy_pass http://node; proxy_http_version 1.1; proxy_buffering off;"
        ' proxy_set_header Connection ""; }'
    )
    with upstream.running(), proxy.running():
        yield proxy, upstream


class _Chain:
    """What was seen of requests at each place that they pass."""

    def __init__(self, seen: Seen, caller: int, proxy: Nginx, upstream: Node) -> None:
        self._seen = seen
        self.workers = set(proxy.pids)
        self._places = [
            (CLIENT, {caller}),
            (SERVER, self.workers),
            (CLIENT, self.workers),
            (SERVER, set(upstream.pids)),
        ]

    def wait_for(self, count: int) -> list[list[Request]]:
        """COUNT requests at each place, from the client to the upstream."""
        self._seen.until(lambda: min(map(len, self._found())) >= count)
        found = self._found()
        assert list(map(len, found)) == [count] * len(found)
        assert not self._seen.lost
        return found

    def _found(self) -> list[list[Request]]:
        return [
            [each for each in self._seen.of(role) if each.pid in pids]
            for role, pids in self._places
        ]


def test_both_sides_of_a_proxy(site: Path, tmp_path: Path) -> None:
    names = [f"/via/{n}" for n in range(20)]
    (site / "via").mkdir(mode=0o755)
    for n, name in enumerate(names):
        (site / name[1:]).write_bytes(b"x" * n * 1000)
    calls = [Call("GET", name) for name in names]
    calls += [Call("POST", name, 1000) for name in names]
    with _proxied(site, tmp_path) as (proxy, upstream), ExitStack() as stack:
        caller = stack.enter_context(client(CLIENTS["http.client"](proxy.port, calls)))
        seen = stack.enter_context(seeing_plain(*proxy.pids, *upstream.pids, caller.pid))
        chain = _Chain(seen, caller.pid, proxy, upstream)
        told = exchanges(calls, caller.run())
        places = chain.wait_for(len(calls))
        lines = _logged(proxy, len(calls))
    for found in places:
        assert [Exchange(*each.exchange) for each in found] == told
        assert {each.outcome for each in found} == {COMPLETE}
    for outer, inner in pairwise(places):
        for around, within in zip(outer, inner, strict=True):
            # A client's request begins when its call that sends returns: the server may be quicker,
            # and much quicker where all have to wait for a CPU.
            assert around.time_ns <= within.time_ns + 1e9 * PATIENCE
            assert around.first_byte_ns >= within.first_byte_ns - 1e9 * PATIENCE
    assert [line.pid for line in lines] == [each.pid for each in places[1]]


@pytest.mark.timed
def test_times_are_those_of_nginx(site: Path, tmp_path: Path) -> None:
    waits = [(0, 0), (10, 0), (0, 10), (100, 50), (50, 150)]
    calls = [Call("GET", f"/via/wait/{first}/{rest}") for first, rest in waits]
    with _proxied(site, tmp_path) as (proxy, upstream), ExitStack() as stack:
        caller = stack.enter_context(client(CLIENTS["curl"](proxy.port, calls)))
        seen = stack.enter_context(seeing_plain(*proxy.pids, *upstream.pids, caller.pid))
        chain = _Chain(seen, caller.pid, proxy, upstream)
        told = exchanges(calls, caller.run())
        places = chain.wait_for(len(calls))
        lines = _logged(proxy, len(calls))
    assert {each.status for each in told} == {200}
    for to_client, to_upstream, line in zip(places[1], places[2], lines, strict=True):
        # It says them in whole ms, by a clock that it reads once for all that it has to do.
        assert to_client.duration_ns / 1e9 == pytest.approx(
            line.request_s, rel=0.02, abs=2e-3 * PATIENCE
        )
        assert to_upstream.duration_ns / 1e9 == pytest.approx(
            line.upstream_s, rel=0.02, abs=2e-3 * PATIENCE
        )
        first_s = to_upstream.first_byte_ns / 1e9
        assert first_s == pytest.approx(line.upstream_head_s, rel=0.02, abs=2e-3 * PATIENCE)


def test_a_client_that_gives_up_and_an_upstream_that_fails(site: Path, tmp_path: Path) -> None:
    with _proxied(site, tmp_path) as (proxy, upstream), ExitStack() as stack:
        place = f"http://127.0.0.1:{proxy.port}/via/wait"
        silent = ("curl", "--silent", "--max-time")
        gives_up = stack.enter_context(client((*silent, "0.3", f"{place}/9000/1")))
        gets_half = stack.enter_context(client((*silent, "30", f"{place}/0/cut")))
        is_refused = stack.enter_context(client((*silent, "30", f"{place}/9000/2")))
        callers = [it.pid for it in (gives_up, gets_half, is_refused)]
        seen = stack.enter_context(seeing_plain(*proxy.pids, *upstream.pids, *callers))
        chains = [_Chain(seen, pid, proxy, upstream) for pid in callers]

        def ends(chain: _Chain) -> list[tuple[int, int, int]]:
            """How its one request ended at each place."""
            places = [found[0] for found in chain.wait_for(1)]
            seen.requests.clear()
            return [(each.status, each.outcome, each.response_body_bytes) for each in places]

        gives_up.go()
        gives_up.finish(_CURL_TIMED_OUT)
        assert ends(chains[0]) == [(0, BY_CLIENT, 0)] * 4
        gets_half.go()
        assert gets_half.finish(_CURL_GOT_A_PART) == "12345"
        assert ends(chains[1]) == [(200, BY_SERVER, 5)] * 4
        is_refused.go()
        wait_until(lambda: upstream.lets_wait("/via/wait/9000/2"))
        os.kill(upstream.pid, signal.SIGKILL)
        page_bytes = len(is_refused.finish())
        refused, failed = (502, COMPLETE, page_bytes), (0, BY_SERVER, 0)
        assert ends(chains[2]) == [refused, refused, failed, failed]
        assert [line.status for line in _logged(proxy, 3)] == [499, 200, 502]


_TAGGING = """
local threads = 0
function setup(thread) thread:set("id", threads); threads = threads + 1 end
function init() n = 0 end
function request() n = n + 1; return wrk.format("GET", "/said/" .. id .. "/" .. n) end
function done(summary, latency)
  print(summary.requests, latency:percentile(50), latency:percentile(99))
end
"""


def _as_wrk(times_us: list[int]) -> list[float]:
    """The median and the 99th percentile as wrk reports them: it adds what it would have measured
    if it had not waited for slow responses (stats_correct in its stats.c)."""
    expected_us = _WRK_S * 1_000_000 * 8 // len(times_us)
    times = np.array(times_us)
    more = [times]
    slow = times[times >= 2 * expected_us]
    while len(slow := slow - expected_us) and slow.max() > expected_us:
        slow = slow[slow > expected_us]
        more.append(slow)
    every = np.concatenate(more)
    return [float(np.percentile(every, part)) for part in (50, 99)]


@pytest.mark.long
@pytest.mark.timed
def test_requests_of_wrk_are_those_in_the_log(site: Path, tmp_path: Path) -> None:
    server = Nginx(site, tmp_path)
    (tmp_path / "tag.lua").write_text(_TAGGING)
    load = ("wrk", "-t1", "-c8", f"-d{_WRK_S}s", "-s", tmp_path / "tag.lua")
    with server.running(), client((*load, f"http://127.0.0.1:{server.port}")) as caller:
        with seeing_plain(*server.pids, caller.pid, ring="64MiB") as seen:
            caller.go()
            seen.until(caller.has_ended, 60)
            output = caller.finish()
            told, *percentiles_us = (int(float(it)) for it in output.splitlines()[-1].split())
            wait_until(lambda: len(server.log()) >= told)
            lines = server.log()
            seen.until(lambda: len(seen.of(SERVER)) + seen.lost >= len(lines))
        assert not seen.lost
    at_client, at_server = seen.of(CLIENT), seen.of(SERVER)
    assert told > 1000 / PATIENCE**2
    assert {(line.method, line.path, line.status, line.body_bytes, line.pid) for line in lines} == {
        (each.method, each.path, each.status, each.response_body_bytes, each.pid)
        for each in at_server
    }
    assert len(at_server) == len(lines)
    assert len({each.path for each in at_server}) == len(at_server)
    complete = [each for each in at_client if each.outcome == COMPLETE]
    # wrk leaves its connections while it waits for some last responses.
    assert {each.outcome for each in at_client} <= {COMPLETE, BY_CLIENT}
    assert len(complete) == told
    ours = _as_wrk([each.duration_ns // 1000 for each in complete])
    for our_us, its_us in zip(ours, percentiles_us, strict=True):
        assert our_us == pytest.approx(its_us, rel=0.05, abs=20 * PATIENCE**2)


# Both sides read the clock beside each call that begins or ends something.
_SERVES = """
for first, rest in waits:
    s.recv(1)
    began = time.monotonic_ns()
    s.recv(1000)
    time.sleep(first)
    first = time.monotonic_ns()
    s.send(b"HTTP/1.1 200 OK\\r\\nContent-Length: 1\\r\\n\\r\\n")
    time.sleep(rest)
    s.send(b"x")
    times.append([first - began, time.monotonic_ns() - began])
"""
_ASKS = """
for _ in waits:
    began = time.monotonic_ns()
    c.send(b"GET /it HTTP/1.1\\r\\n\\r\\n")
    c.recv(38, socket.MSG_WAITALL)
    first = time.monotonic_ns()
    c.recv(1)
    times.append([first - began, time.monotonic_ns() - began])
"""


@pytest.mark.timed
def test_times_to_the_first_byte_and_to_the_last() -> None:
    waits = [(0, 0), (0.005, 0), (0, 0.005), (0.02, 0.03), (0.1, 0.05), (0.001, 0.3)] * 3
    with puppets(2) as (caller, server), seeing_plain(caller.pid, server.pid) as seen:
        connected(caller, server, "127.0.0.1")
        for puppet in (server, caller):
            puppet.do(f"waits = {waits}; times = []")
        server.begin(f"exec({_SERVES!r})")
        caller.do(f"exec({_ASKS!r})")
        server.done()
        told = {CLIENT: json.loads(caller.ask("times")), SERVER: json.loads(server.ask("times"))}
        found = {role: seen.wait_for(len(waits), role) for role in told}
    for role, times_ns in told.items():
        for each, (first_ns, last_ns) in zip(found[role], times_ns, strict=True):
            assert each.first_byte_ns == pytest.approx(first_ns, rel=0.02, abs=1e6 * PATIENCE)
            assert each.duration_ns == pytest.approx(last_ns, rel=0.02, abs=1e6 * PATIENCE)
