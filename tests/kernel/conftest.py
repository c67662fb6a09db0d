"""Fixtures for tests of connections, and of what is attached."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final

import pytest

from coral import bpf
from coral.agent.config_kubernetes import Kubernetes
from coral.agent.machine.pods.node import Pods
from coral.collectors.hierarchies import hierarchies
from coral.collectors.http_latency.collector import HttpLatencyCollector
from coral.collectors.hubs.keeper import KEEPER
from tests.attaching import Called
from tests.hidden import OF_TCP, failing_if_hidden, hidden_events
from tests.http_seen import seeing_plain
from tests.network import Side, puppets, two_sides
from tests.pods import Node, made_in, runtime
from tests.support import (
    OWN_MACHINE,
    Puppet,
    compiled,
    loaded,
    nothing_new_since,
    wait_until,
)

# A client's socket `c`, a server's `s`, and what passes between them.
BOTH_ENDS: Final = r"""
import socket
listener = socket.create_server(("127.0.0.1", 0))
kept = []
def connect():
    global c, s
    c = socket.create_connection(listener.getsockname())
    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s = listener.accept()[0]
    kept.append((c, s))
def ask(data):
    c.sendall(data)
    s.recv(len(data), socket.MSG_WAITALL)
def answer(data):
    s.sendall(data)
    c.recv(len(data), socket.MSG_WAITALL)
def exchange(*pieces):
    for piece in pieces:
        ask(piece)
    answer(b"HTTP/1.1 204 No Content\r\n\r\n")
connect()
"""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [] if OWN_MACHINE else [it for it in items if it.get_closest_marker("own_machine")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [it for it in items if it not in left_out]


_HIDDEN: Final = pytest.StashKey[Callable[[], int]]()


@pytest.fixture(scope="module")
def hidden_of_tcp(request: pytest.FixtureRequest) -> Iterator[None]:
    """See `AGAIN_IF_HIDDEN`."""
    with hidden_events(OF_TCP) as hidden:
        request.node.stash[_HIDDEN] = hidden
        yield
        del request.node.stash[_HIDDEN]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    module = item.getparent(pytest.Module)
    hidden = module.stash.get(_HIDDEN, None) if module else None
    if hidden is None:
        return (yield)
    with failing_if_hidden(hidden):
        return (yield)


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Side, Side]]:
    """Two network namespaces with a cable between them."""
    with two_sides() as pair:
        yield pair


@pytest.fixture
def pair(sides: tuple[Side, Side]) -> Iterator[tuple[Puppet, Puppet]]:
    """A client in one namespace, a server in the other."""
    with sides[0].puppet() as client, sides[1].puppet() as server:
        yield client, server


@pytest.fixture
def both_ends() -> Iterator[Puppet]:
    """A process that is the client `c` and the server `s` of a connection. In it, `ask` passes
    bytes to the server and `answer` to the client, `exchange` passes a request in pieces and a
    response, and `connect` makes another connection and keeps the old one."""
    with puppets(1) as (puppet,):
        puppet.do(f"exec({BOTH_ENDS!r})")
        yield puppet


@pytest.fixture(scope="session")
def http_supported() -> None:
    """Skips a test where `http_latency` cannot run."""
    support = HttpLatencyCollector.support(bpf.probe())
    if not support.supported:
        pytest.skip(support.reason)


@pytest.fixture(scope="module")
def http_programs() -> Iterator[None]:
    """Keeps the programs of `http_latency` loaded between the tests of a module, because the kernel
    takes seconds to verify them."""
    before = loaded()
    with Puppet() as idle, seeing_plain(idle.pid):
        yield
    wait_until(lambda: nothing_new_since(before))


@pytest.fixture(scope="session")
def attaching_object() -> Path:
    """tests/bpf/attaching.bpf.c, compiled."""
    return compiled("attaching")


@pytest.fixture(scope="session")
def stages_object() -> Path:
    """tests/bpf/stages.bpf.c, compiled."""
    return compiled("stages")


@pytest.fixture
def called(programs: Path) -> Iterator[Called]:
    """A process that will call its function 1,000 times."""
    process = Called(programs / "called", "1000")
    yield process
    process.kill()


@pytest.fixture
def no_descriptors_left() -> Iterator[None]:
    """Fails if the test leaves a descriptor open in this process."""
    before = _descriptors()
    yield
    assert _descriptors() <= before  # fewer, where a thread of an earlier test closed some late


def _descriptors() -> int:
    """How many this process has open, once everything that is to be closed is."""
    gc.collect()  # gives the keeper things to close, so it comes first
    wait_until(lambda: KEEPER.is_idle)
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(params=["v2", "memory"])
def top(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup of this test in which it makes pods, in each hierarchy that there is."""
    found = next((each for each in hierarchies() if each.kind == request.param), None)
    if found is None:
        pytest.skip(f"no hierarchy {request.param} of cgroups is mounted here")
    with made_in(found.directory) as directory:
        yield directory


@pytest.fixture
def node(top: Path, tmp_path: Path) -> Iterator[Node]:
    with runtime(tmp_path) as served:
        yield Node(top, served, Pods(Kubernetes(cri=str(served.socket), api="off")))
