"""`http_latency` against what real servers and clients say of the same requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.http_seen import CLIENT, COMPLETE, SERVER, seeing
from tests.http_servers import CLIENTS, SERVERS, Call, Exchange, Server, client, exchanges

pytestmark = pytest.mark.usefixtures("nothing_left")

# nginx counts it as a part of the response's body.
_INTERIM_BYTES = len("HTTP/1.1 100 Continue\r\n\r\n")


@pytest.fixture
def site() -> Iterator[Path]:
    """A directory for files, which every user may read."""
    with TemporaryDirectory() as place:
        path = Path(place)
        path.chmod(0o755)
        yield path


def _tagged(site: Path, by: str, server: type[Server]) -> list[Call]:
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
    calls = {by: _tagged(site, by, SERVERS[name]) for by in CLIENTS}
    with server.running(), ExitStack() as stack:
        callers = {
            by: stack.enter_context(client(command(server.port, calls[by])))
            for by, command in CLIENTS.items()
        }
        seen = stack.enter_context(seeing(*server.pids, *(it.pid for it in callers.values())))
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
    for line in server.log():
        row = rows.pop(line.path)
        interim = _INTERIM_BYTES if name == "nginx" and row.path.endswith("/expected") else 0
        assert (row.method, row.status) == (line.method, line.status)
        assert line.body_bytes in (-1, row.response_body_bytes + interim)
        assert line.pid in (-1, row.pid)
    assert not rows
