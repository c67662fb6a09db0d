"""`coral tap --http-latency` as users meet it: a real server, real clients, and what is said of
them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import pytest
from rich.cells import cell_len

from coral.views.text import times
from tests import tapping
from tests.network import connected, puppets
from tests.shop import BODY_BYTES, WAIT_S, port_of, shop, visit, visitor
from tests.support import (
    Puppet,
    RunningAgent,
    collectors_at_work,
    coral,
    wait_until,
)
from tests.tapping import START_S, Tap, columns, sheet
from tests.terminal import Terminal

COMM: Final = "python"

tapped = partial(tapping.tapped, "--http-latency")
pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def server() -> Iterator[Puppet]:
    with shop() as puppet:
        yield puppet


@pytest.fixture
def client() -> Iterator[Puppet]:
    with visitor() as puppet:
        yield puppet


SHOPPING: Final = (
    ("GET", "/users/1/orders/17?token=secret", 0),
    ("GET", "/users/2/orders/18?token=secret", 0),
    ("POST", "/basket", 300),
    ("GET", "/slow/3", 0),
    ("GET", "/late/3", 0),
    ("GET", "/missing", 0),
    ("GET", "/same", 0),
    ("GET", "/bad", 0),
)


def ms(text: str) -> float:
    """A time of a table."""
    value, unit = re.fullmatch(r"([0-9.]+)(ns|µs|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(value) * {"ns": 1e-6, "µs": 1e-3, "ms": 1, "s": 1000}[unit]


def row(out: str, request: str) -> dict[str, str]:
    """The row of REQUEST in the last table of routes."""
    titles = next(line for line in reversed(out.splitlines()) if line.startswith("REQUEST "))
    return dict(zip(columns(titles)[1:], sheet(out, "REQUEST")[request], strict=True))


def test_every_request_is_in_its_row_on_both_sides(
    agent: RunningAgent, client: Puppet, server: Puppet
) -> None:
    with tapped(agent, client, server, arguments=("-i", "60s")) as tap:
        for _ in range(3):
            visit(client, server, *SHOPPING)
        out = tap.finish()
    totals = out[out.index("totals of ") :].splitlines()
    bodies = f"{3 * 300}B in, {3 * 6 * BODY_BYTES / 1000:.1f}kB out"
    assert totals[1] == f"24 requests served, 3 ERRORS (12%); {bodies}"
    assert totals[2] == (
        f"24 requests made, 3 ERRORS (12%); {3 * 6 * BODY_BYTES / 1000:.1f}kB in, 900B out"
    )
    assert set(sheet(out, "REQUEST")) == {
        f"{arrow} {request}"
        for arrow in "←→"
        for request in (
            "GET /users/{id}/orders/{id}", "POST /basket", "GET /slow/{id}", "GET /late/{id}",
            "GET /missing", "GET /same", "GET /bad",
        )
    }  # fmt: skip
    for arrow in "←→":
        orders = row(out, f"{arrow} GET /users/{{id}}/orders/{{id}}")
        assert (orders["REQUESTS"], orders["ERRORS"], orders["NOT 2xx"]) == ("6", "0", "-")
        assert row(out, f"{arrow} GET /missing")["NOT 2xx"] == f"404 {times(3)}"
        assert row(out, f"{arrow} GET /same")["NOT 2xx"] == f"304 {times(3)}"
        bad = row(out, f"{arrow} GET /bad")
        assert (bad["ERRORS"], bad["NOT 2xx"]) == ("3", f"503 {times(3)}")
        slow, late = (row(out, f"{arrow} GET /{name}/{{id}}") for name in ("slow", "late"))
        assert ms(slow["TTFB P50"]) >= WAIT_S * 1000 * 0.99
        assert ms(late["P50"]) >= WAIT_S * 1000 * 0.99
        if arrow == "←":  # a client may come late to the first byte
            assert ms(late["TTFB P50"]) < ms(late["P50"])
        assert row(out, f"{arrow} POST /basket")["IN" if arrow == "←" else "OUT"] == "900B"
    assert "secret" not in out
    served, made = re.findall(r"^ +(SERVED|ANSWERED) IN  REQUESTS  p50 ", out, re.MULTILINE)
    assert (served, made) == ("SERVED", "ANSWERED")


def test_every_request_is_a_line(agent: RunningAgent, client: Puppet, server: Puppet) -> None:
    with tapped(agent, client, server, arguments=("--events",)) as tap:
        visit(client, server, *SHOPPING)
        out = tap.finish()
    lines = [columns(line) for line in out[: out.index("\ntotals of ")].splitlines()]
    assert len(lines) == 2 * len(SHOPPING)
    statuses = ("200", "200", "201", "200", "200", "404", "304", "503")
    for arrow, puppet in (("←", server), ("→", client)):
        mine = [cells for cells in lines if cells[1].startswith(arrow)]
        wanted = [f"{arrow} {method} {path.split('?')[0]}" for method, path, _ in SHOPPING]
        assert [cells[1] for cells in mine] == wanted
        assert tuple(cells[2] for cells in mine) == statuses
        for clock, _, _, first, total, _, who, peer in mine:
            assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{6}", clock)
            assert ms(first) <= ms(total)
            assert who == f"{COMM}/{puppet.pid}"
            assert re.fullmatch(r"127\.0\.0\.1:\d+", peer)
        assert ms(mine[3][3]) >= WAIT_S * 1000 * 0.99
        assert mine[2][5] == "300B/2B"
        if arrow == "→":
            assert {cells[-1] for cells in mine} == {f"127.0.0.1:{port_of(server)}"}
    # Which are slowest, a busy machine decides.
    took_ms = {cells[1]: ms(cells[4]) for cells in lines}
    slowest = list(sheet(out, "SLOWEST", "BEGAN"))[:4]
    others = took_ms.keys() - set(slowest)
    assert len(others) == len(lines) - 4
    assert min(took_ms[one] for one in slowest) >= max(took_ms[one] for one in others)


def test_a_client_that_goes_away_is_told_and_no_status_is_invented(
    agent: RunningAgent, client: Puppet, server: Puppet
) -> None:
    ask = "import socket; c = socket.create_connection(('127.0.0.1', {port})); "
    ask += "c.sendall(b'GET /slow/9 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); c.close()"
    with tapped(agent, client, server, arguments=("--events",)) as tap:
        client.do(ask.format(port=port_of(server)))
        line = columns(tap.until("→ GET /slow/9"))
        out = tap.finish()
    assert (line[2], line[-1]) == ("-", "ABORTED by client")
    total = re.search(
        r"^1 request made, 1 ERROR \(100%\); 1 ABORTED by client; ", out, re.MULTILINE
    )
    assert total
    made = row(out, "→ GET /slow/{id}")
    assert (made["NOT 2xx"], made["TTFB P50"]) == (f"ABORTED by client {times(1)}", "-")


def rows_of(tap: Tap) -> list[dict[str, Any]]:
    *rows, end = map(json.loads, tap.finish().splitlines())
    assert end["end"] == "stopped"
    return rows


def test_data_is_one_object_a_row_and_adds_up(
    agent: RunningAgent, client: Puppet, server: Puppet
) -> None:
    with tapped(agent, client, server, arguments=("--json", "-i", "100ms")) as tap:
        for _ in range(3):
            visit(client, server, *SHOPPING)
        rows = rows_of(tap)
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))
    for role in ("server", "client"):
        mine = [row for row in rows if row["role"] == role]
        assert sum(row["count"] for row in mine) == 24
        assert sum(sum(row["counts"]) for row in mine) == 24
        assert sum(row["count"] for row in mine if row["status"] == 503) == 3
        assert sum(row["errors"] for row in mine) == 3
        assert sum(row["request_body_bytes"] for row in mine) == 900
        assert {row["version"] for row in mine} == {"1.1"}
        for row in mine:
            assert row["min"] <= row["p50"] <= row["p95"] <= row["p99"] <= row["max"]
            assert row["first_byte_p99"] <= row["max"]


def test_single_requests_are_data(agent: RunningAgent, client: Puppet, server: Puppet) -> None:
    with tapped(agent, client, server, arguments=("--json", "--events")) as tap:
        visit(client, server, *SHOPPING)
        rows = rows_of(tap)
    for role, puppet in (("server", server), ("client", client)):
        mine = [row for row in rows if row["role"] == role]
        assert [row["path"] for row in mine] == [path.split("?")[0] for _, path, _ in SHOPPING]
        assert [row["number"] for row in mine] == list(range(len(SHOPPING)))
        assert {(row["pid"], row["comm"]) for row in mine} == {(puppet.pid, COMM)}
        assert {row["outcome"] for row in mine} == {"complete"}
        assert len({row["connection_id"] for row in mine}) == 1
        assert mine[0]["route"] == "/users/{id}/orders/{id}"
        assert mine[3]["first_byte_ns"] >= WAIT_S * 1e9 * 0.99
        assert mine[4]["duration_ns"] >= WAIT_S * 1e9 * 0.99
        if role == "server":  # a client may come late to the first byte
            assert mine[4]["duration_ns"] - mine[4]["first_byte_ns"] >= WAIT_S * 1e9 * 0.9


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_shows_routes_in_colour_and_within_its_width(
    width: int, agent: RunningAgent, client: Puppet, server: Puppet
) -> None:
    command = coral("tap", "--agent", agent.address, "--http-latency", "-i", "100ms", "-d", "50s")
    with Terminal([*command, f"pid:{client.pid},{server.pid}"], 24, width) as terminal:
        wait_until(lambda: terminal.has_drawn("no HTTP requests in "), START_S)
        wait_until(lambda: any(i.subscribers for i in collectors_at_work(agent).values()))
        for _ in range(20):
            visit(client, server, ("GET", "/users/1", 0), ("GET", "/bad", 0))
        wait_until(lambda: terminal.has_drawn("← GET /users/{id}", "→ GET /users/{id}", " ERROR"))
        wait_until(lambda: terminal.has_drawn("no requests for "))
        terminal.press("\x03")
        assert terminal.finish() == 130
    assert re.search(r"\x1b\[1;31m← GET /bad *\x1b", terminal.output)
    assert max(map(cell_len, terminal.text.replace("\r", "\n").splitlines())) <= width
    totals = terminal.text[terminal.text.index("totals of ") :]
    assert "20 ERRORS (50%)" in totals
    assert re.search(r"→ GET /users/\{id\} +[0-9.]+ +0 ", totals)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_request_fits_into_the_terminal(
    width: int, agent: RunningAgent, client: Puppet, server: Puppet
) -> None:
    command = coral("tap", "--agent", agent.address, "--http-latency", "--events", "-d", "50s")
    with Terminal([*command, f"pid:{client.pid},{server.pid}"], 24, width) as terminal:
        wait_until(lambda: any(i.subscribers for i in collectors_at_work(agent).values()), START_S)
        visit(client, server, *SHOPPING, ("GET", "/a" * 200, 0))
        wait_until(lambda: terminal.has_drawn("← GET /bad", "→ GET /bad", "→ GET /a"))
        terminal.press("\x03")
        assert terminal.finish() == 130
    text = terminal.text.replace("\r", "\n")
    assert max(map(cell_len, text.splitlines())) <= width
    assert re.search(r"← GET /bad +503 ", text)
    assert re.search(r"\x1b\[31;1m503\x1b\[0m", terminal.output)
    assert "secret" not in text


def test_a_tap_without_requests_says_what_would_be_seen(agent: RunningAgent) -> None:
    with Puppet() as idle, tapped(agent, idle) as tap:
        out = tap.finish()
    assert "\nno HTTP requests: HTTP/1 on TCP sockets of the watched processes " in out


def test_patterns_of_the_user_are_routes(
    agent: RunningAgent, client: Puppet, server: Puppet
) -> None:
    with tapped(agent, server, arguments=("--routes", "/users/{name}/**,/late/*")) as tap:
        visit(client, server, *SHOPPING)
        out = tap.finish()
    assert row(out, "← GET /users/{name}/**")["REQUESTS"] == "2"
    assert row(out, "← GET /late/*")["REQUESTS"] == "1"
    assert row(out, "← GET /slow/{id}")["REQUESTS"] == "1"


def test_what_is_not_read_is_told(agent: RunningAgent) -> None:
    hello = "b'\\x16\\x03\\x01' + bytes(497)"  # TLS begins so
    with puppets(2) as (client, server), tapped(agent, client, server) as tap:
        connected(client, server, "127.0.0.1")
        client.do(f"c.sendall({hello})")
        server.do("s.recv(500, socket.MSG_WAITALL); s.sendall(bytes(500))")
        client.do("c.recv(500, socket.MSG_WAITALL); c.close()")
        server.do("s.recv(1); s.close()")
        out = tap.finish()
    assert "\nno HTTP requests: not read: TLS on 2 connections (" in out


def test_what_is_not_read_is_data(agent: RunningAgent) -> None:
    # Bytes count when a connection ends: a reset ends it before the call returns that closes it.
    resets = "c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, *bytes(7)])); c.close()"
    with puppets(2) as (client, server), tapped(agent, client, arguments=("--json",)) as tap:
        connected(client, server, "127.0.0.1")
        client.do(f"c.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n'); {resets}")
        out = [json.loads(line) for line in tap.finish().splitlines()]
    assert out[:-1] == [{"unread": "http2", "count": 1, "bytes": 24}]
    assert out[-1]["end"] == "stopped"
