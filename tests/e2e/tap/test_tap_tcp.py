"""`coral tap --tcp-metrics` as users meet it: real connections, and what is said of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Final

import pytest

from coral.views.text import times
from tests import tapping
from tests.network import READ_ALL, connected, listen, number, send, socket_of, ss, two_sides
from tests.support import (
    Puppet,
    RunningAgent,
    collectors_at_work,
    coral,
    wait_until,
)
from tests.tapping import columns, sheet
from tests.terminal import Terminal

LINGER: Final = "import struct; linger = struct.pack('ii', 1, 0)"
RESET: Final = "c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); c.close()"
COMM: Final = "python"

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def pair() -> Iterator[tuple[Puppet, Puppet]]:
    """A client and a server."""
    with Puppet() as client, Puppet() as server:
        yield client, server


tapped = partial(tapping.tapped, "--tcp-metrics")


def nobody(puppet: Puppet) -> int:
    """A port at which nobody listens, held by PUPPET."""
    puppet.do("import socket; held = socket.socket(); held.bind(('127.0.0.1', 0))")
    return number(puppet, "held.getsockname()[1]")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_totals_are_what_the_programs_sent(
    address: str, agent: RunningAgent, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    with tapped(agent, client, server) as tap:
        port = connected(client, server, address)
        send(client, "c", server, "s", 345_000)
        send(server, "s", client, "c", 6_780)
        client.do("c.close()")
        server.do("s.recv(1); s.close()")
        wait_until(lambda: not ss(None, port))  # the last goodbye is answered a little later
        out = tap.finish()
    heading, total, ends, *_ = out[out.index("totals of ") :].splitlines()
    assert heading.endswith("s, stopped")
    # The machine decides how much is sent again.
    assert total.startswith("0 open, 2 opened, 0 failed; 352kB out, 352kB in; ")
    assert ends == "ended: 1 closed, 1 peer closed"
    peers = sheet(out, "PEER", "OPENED")
    there = f"[{address}]" if ":" in address else address
    assert peers[f"→ {there}:{port}"][:5] == ["1", "0", "0", "345kB", "6.78kB"]
    assert peers[f":{port} ← {address}"][:5] == ["1", "0", "0", "6.78kB", "345kB"]
    (picture,) = re.findall(
        r"^ *ROUND TRIP +ACKS +p50 \S+s, p95 \S+s, p99 \S+s$", out, re.MULTILINE
    )
    samples = out[out.index(picture) + len(picture) :].split("\n\n")[0]
    assert sum(int(count) for count in re.findall(r"s +(\d+)", samples)) > 2
    assert "█" * 30 in samples


def test_data_is_one_object_a_row_and_adds_up(
    agent: RunningAgent, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    with tapped(agent, client, server, arguments=("--json", "-i", "100ms")) as tap:
        port = connected(client, server, "127.0.0.1")
        for count in (1, 22, 333):
            send(client, "c", server, "s", count)
        client.do("c.close()")
        server.do("s.recv(1); s.close()")
        wait_until(lambda: not ss(None, port))  # the last goodbye is answered a little later
        out = tap.finish()
    *rows, end = map(json.loads, out.splitlines())
    assert end["end"] == "stopped"
    of_client = [row for row in rows if row["role"] == "client"]
    assert {(row["remote_address"], row["remote_port"]) for row in rows} >= {("127.0.0.1", port)}
    assert sum(row["delta"]["bytes_sent"] for row in of_client) == 356
    last = of_client[-1]
    assert (last["total"]["bytes_sent"], last["total"]["bytes_acked"]) == (356, 356)
    assert (last["end"], last["state"], last["error"]) == ("fin_local", "close", "")
    assert (last["pid"], last["comm"]) == (client.pid, COMM)
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))


def test_what_was_carried_before_anybody_looked_is_not_counted(
    agent: RunningAgent, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    port = connected(client, server, "127.0.0.1")
    send(client, "c", server, "s", 70_000)
    with tapped(agent, client) as tap:
        tap.until(f"→ 127.0.0.1:{port}")
        send(client, "c", server, "s", 5_000)
        out = tap.finish()
    assert "1 open, 0 opened, 0 failed; 5.00kB out, 0B in; " in out
    assert sheet(out, "PEER", "OPENED")[f"→ 127.0.0.1:{port}"][:4] == ["0", "1", "0", "5.00kB"]


def test_what_fails_stands_out_with_its_reason(
    agent: RunningAgent, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    closed = nobody(server)
    attempts = f"for _ in range(5): c = socket.socket(); c.connect_ex(('127.0.0.1', {closed}))"
    with tapped(agent, client, server, arguments=("-i", "60s")) as tap:
        port = connected(client, server, "127.0.0.1")
        tap.until(f"→ 127.0.0.1:{port}")  # from now on, all is one interval
        client.do(attempts)
        client.do(f"c.close(); {socket_of('127.0.0.1')}; c.connect(('127.0.0.1', {port}))")
        server.do("s, _ = l.accept()")
        client.do(f"{LINGER}; {RESET}")
        server.do("s.close()")
        out = tap.finish()
    assert ", 5 FAILED, 2 RESET, " in out
    interval = out[: out.index("totals of ")]
    shown = {tuple(columns(line)[:4]) for line in interval.splitlines()}
    mine = COMM, str(client.pid)
    assert (*mine, f"→ 127.0.0.1:{closed} {times(5)}", "REFUSED") in shown
    assert (*mine, f"→ 127.0.0.1:{port}", "RESET") in shown
    troubles = sheet(out, "ENDED BADLY", "TIMES")
    assert troubles["REFUSED"] == ["5", COMM, f"→ 127.0.0.1:{closed}", "ECONNREFUSED"]
    assert troubles["RESET"][:3] == ["1", COMM, f"→ 127.0.0.1:{port}"]
    assert troubles["PEER RESET"] == ["1", COMM, f":{port} ← 127.0.0.1", "ECONNRESET"]
    assert sheet(out, "PEER", "OPENED")[f"→ 127.0.0.1:{closed}"][:3] == ["5", "0", "5"]


def test_many_short_connections_are_one_line(
    agent: RunningAgent, pair: tuple[Puppet, Puppet]
) -> None:
    # So many rows come in more than one batch, and are one interval all the same.
    client, server = pair
    serve = "for _ in range(1500):\n v, _ = l.accept()\n v.recv(100)\n v.close()"
    visit = "for _ in range(1500):\n d = socket.create_connection(at)\n d.sendall(b'1234567')\n"
    visit += " d.recv(1)\n d.close()"
    with tapped(agent, client, server, arguments=("-i", "60s", "-c", "ring=16MiB")) as tap:
        port = connected(client, server, "127.0.0.1")
        tap.until(f"→ 127.0.0.1:{port}")
        client.do("at = c.getpeername()")
        server.begin(f"exec({serve!r})")
        client.do(f"exec({visit!r})")
        server.done()
        wait_until(lambda: len(ss(None, port)) == 2)  # the last goodbye is answered a little later
        out = tap.finish()
    interval = out[: out.index("\n\ntotals of ")].rpartition("\n\n")[2]
    shown = [columns(line)[2:4] for line in interval.splitlines() if line.startswith(COMM)]
    assert len(shown) == 4
    assert [f"→ 127.0.0.1:{port} {times(1_500)}", "peer closed"] in shown
    assert [f":{port} ← 127.0.0.1 {times(1_500)}", "closed"] in shown
    peers = sheet(out, "PEER", "OPENED")
    assert peers[f"→ 127.0.0.1:{port}"][:4] == ["1,501", "1", "0", "10.5kB"]


def test_peers_are_rows_of_their_own(agent: RunningAgent, pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    closed = nobody(server)
    visit = "for _ in range(20):\n d = socket.create_connection(at)\n d.sendall(bytes(1000))\n"
    visit += f" d.recv(1)\n d.close()\n socket.socket().connect_ex(('127.0.0.1', {closed}))"
    serve = "for _ in range(20):\n v, _ = l.accept()\n v.recv(1000)\n v.close()"
    with tapped(agent, client, arguments=("-i", "60s", "-c", "by=peer")) as tap:
        port = connected(client, server, "127.0.0.1")
        tap.until(f"→ 127.0.0.1:{port}")
        client.do("at = c.getpeername()")
        server.begin(f"exec({serve!r})")
        client.do(f"exec({visit!r})")
        server.done()
        out = tap.finish()
    interval = sheet(out, "PEER", "OPEN", "NEW/S")
    assert interval[f"→ 127.0.0.1:{port}"][0] == "1"
    assert interval[f"→ 127.0.0.1:{closed}"][-1] == f"REFUSED {times(20)}"
    peers = sheet(out, "PEER", "OPENED")
    assert peers[f"→ 127.0.0.1:{port}"][:5] == ["21", "1", "0", "20.0kB", "0"]
    assert peers[f"→ 127.0.0.1:{closed}"][:3] == ["20", "0", "20"]
    troubles = sheet(out, "ENDED BADLY", "TIMES")
    assert troubles["REFUSED"] == ["20", "-", f"→ 127.0.0.1:{closed}", "ECONNREFUSED"]


def test_addresses_are_shown_by_their_names(
    agent: RunningAgent, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    with tapped(agent, client, server, arguments=("--resolve",)) as tap:
        port = connected(client, server, "127.0.0.1")
        tap.until(f":{port}")  # a first table, which asks for the names
        out = tap.finish()
    peers = sheet(out, "PEER", "OPENED")
    assert f"→ localhost:{port}" in peers
    assert f":{port} ← localhost" in peers


def test_every_event_is_a_line(agent: RunningAgent, pair: tuple[Puppet, Puppet]) -> None:
    client, server = pair
    closed = nobody(server)
    with tapped(agent, client, arguments=("--events",)) as tap:
        port = connected(client, server, "127.0.0.1")
        mine = number(client, "c.getsockname()[1]")
        client.do("c.close()")
        server.do("s.recv(1); s.close()")
        client.do(f"socket.socket().connect_ex(('127.0.0.1', {closed}))")
        connect = f"{socket_of('127.0.0.1')}; c.connect(('127.0.0.1', {port}))"
        client.do(f"{connect}; {LINGER}; {RESET}")
        out = tap.finish()
    lines = out[: out.index("\ntotals of ")].splitlines()
    for line in lines:
        assert re.match(rf"\d\d:\d\d:\d\d\.\d{{6}}  {COMM}/{client.pid} +127\.0\.0\.1:\d+ → ", line)
    assert [line[: line.index(" ")] for line in lines] == sorted(line.split()[0] for line in lines)
    first = [columns(line)[-1] for line in lines if f"127.0.0.1:{mine} → 127.0.0.1:{port}" in line]
    assert first[:2] == ["syn-sent → established", "established → fin-wait1"]
    ended = f"127.0.0.1:{mine} → 127.0.0.1:{port}"
    assert any(ended in line and line.endswith("→ close  closed") for line in lines)
    refused = [line for line in lines if line.endswith("syn-sent → close  REFUSED  ECONNREFUSED")]
    assert len(refused) == 1
    assert f"→ 127.0.0.1:{closed} " in refused[0]
    assert any(re.search(rf"→ 127.0.0.1:{port} +RESET sent(: [A-Z_]+)?$", line) for line in lines)
    peers = sheet(out, "PEER", "OPENED")
    assert peers[f"→ 127.0.0.1:{port}"] == ["2", "2", "0", "0", "1"]
    assert peers[f"→ 127.0.0.1:{closed}"][:3] == ["1", "1", "1"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_every_event_fits_into_the_terminal(
    columns: int, agent: RunningAgent, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    closed = nobody(server)
    command = coral("tap", "--agent", agent.address, "--tcp-metrics", "--events", "-d", "50s")
    with Terminal([*command, f"pid:{client.pid},{server.pid}"], 24, columns) as terminal:
        wait_until(lambda: any(i.subscribers for i in collectors_at_work(agent).values()))
        port = connected(client, server, "::1")
        client.do(f"d = socket.socket(); d.connect_ex(('127.0.0.1', {closed}))")
        wait_until(lambda: terminal.has_drawn("REFUSED", f"→ [::1]:{port}", f":{port} ← "))
        terminal.press("\x03")
        assert terminal.finish() == 130
    lines = terminal.text.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= columns
    assert re.search(r"\x1b\[31;1m[^\x1b]*REFUSED", terminal.output)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_terminal_shows_connections_in_colour_and_within_its_width(
    columns: int, agent: RunningAgent, pair: tuple[Puppet, Puppet]
) -> None:
    client, server = pair
    closed = nobody(server)
    command = coral("tap", "--agent", agent.address, "--tcp-metrics", "-i", "100ms")
    target = f"pid:{client.pid},{server.pid}"
    with Terminal([*command, target, "-d", "50s"], 24, columns) as terminal:
        wait_until(lambda: terminal.has_drawn("Ctrl-C stops"))
        wait_until(lambda: any(i.subscribers for i in collectors_at_work(agent).values()))
        port = connected(client, server, "::1")
        still_open = re.compile(rf"→ \[::1\]:{port} +open")
        wait_until(lambda: terminal.has_drawn("2 open, ") and still_open.search(terminal.text))
        client.do(f"d = socket.socket(); d.connect_ex(('127.0.0.1', {closed}))")
        wait_until(lambda: terminal.has_drawn(f"→ 127.0.0.1:{closed}", "1 FAILED"))
        assert re.search(r"\x1b\[1;31mREFUSED *\x1b", terminal.output)
        # The idle one is in sight after that, too.
        shown = len(terminal.text)
        wait_until(lambda: terminal.has_drawn() and still_open.search(terminal.text, shown))
        terminal.press("\x03")
        assert terminal.finish() == 130
    lines = terminal.text.replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= columns
    totals = terminal.text[terminal.text.index("totals of ") :]
    assert re.search(rf"REFUSED +1 +({COMM} +)?→ 127.0.0.1:{closed} +ECONNREFUSED", totals)


def test_losses_on_the_way_are_told(agent: RunningAgent) -> None:
    with ExitStack() as stack:
        left, right = stack.enter_context(two_sides())
        client, server = (stack.enter_context(side.puppet()) for side in (left, right))
        tap = stack.enter_context(tapped(agent, client, arguments=("-i", "100ms")))
        port = listen(server, right.v4)
        client.do(f"{socket_of(right.v4)}; c.connect(({right.v4!r}, {port}))")
        server.do("s, _ = l.accept()")
        with right.dropping("tcp flags psh drop"):
            client.do("c.sendall(bytes(777))")
            tap.until(f"→ {right.v4}:{port}  LOSSY")
        server.do(f"exec({READ_ALL.format(s='s', n=777)!r})")
        out = tap.finish()
    assert f"{COMM} " in out
    (share,) = re.findall(
        r"^1 open, 1 opened, 0 failed; 777B out, 0B in; (\S+) of \d+", out, re.MULTILINE
    )
    row = sheet(out, "PEER", "OPENED")[f"→ {right.v4}:{port}"]
    assert row[3] == "777B"
    assert row[-3] == share != "0%"
    assert (int(row[-2]) >= 1, row[-1]) == (True, "-")
