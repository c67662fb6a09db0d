"""Many short connections between two namespaces whose packets are handled on every CPU: packets
interrupt programs that work for a process, and the kernel skips a program that is running on the
CPU already."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack

import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.hidden import CHANGES, hidden_events
from tests.network import Side, following, identity, listen
from tests.support import PATIENCE, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

CLIENT, SERVER = pb.TCP_ROLE_CLIENT, pb.TCP_ROLE_SERVER
SERVE = "def serve():\n  while True:\n    s, _ = l.accept(); s.recv(64); s.send(b'x'); s.close()\n"
CALL = (
    "for _ in range({count}):\n"
    "  c = socket.create_connection(({address!r}, {port})); c.send(b'x'); c.recv(64)\n"
    "  c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger); c.close()\n"
)


@pytest.mark.long
def test_connections_that_interrupt_one_another_are_seen_or_told(sides: tuple[Side, Side]) -> None:
    left, right = sides
    count, pairs = int(6_000 / PATIENCE), 3
    for side in sides:
        side.run("sh", "-c", "echo 3 > /sys/class/net/cable/queues/rx-0/rps_cpus")
    with ExitStack() as stack:
        servers = [stack.enter_context(right.puppet()) for _ in range(pairs)]
        clients = [stack.enter_context(left.puppet()) for _ in range(pairs)]
        seen = stack.enter_context(following(*servers, *clients, ring="64MiB", entries="100000"))
        ports = []
        for server, client in zip(servers, clients, strict=True):
            ports.append(listen(server, right.v4))
            server.do(f"exec({SERVE!r})")
            server.begin("serve()")
            client.do("import socket, struct; linger = struct.pack('ii', 1, 0)")
        hidden = stack.enter_context(hidden_events([CHANGES], ports))
        for client, port in zip(clients, ports, strict=True):
            call = CALL.format(count=count, address=right.v4, port=port)
            client.begin(f"exec({call!r})")
        ends: dict[tuple[int, ...], bool] = {}  # whether each was there before
        ended = Counter[int]()

        def unseen() -> int:
            return seen.lost + seen.missed + hidden()

        def all_ended() -> bool:
            ends.update({identity(row): row.preexisting for row in seen.drain() if row.end})
            seen.rows.clear()
            ended.clear()
            ended.update(role for _, role, *_ in ends)
            return ended.total() + unseen() >= 2 * pairs * count

        for client in clients:
            client.done()
        wait_until(all_ended, 60)
        assert max(ended[CLIENT], ended[SERVER]) <= pairs * count
        assert sum(ends.values()) <= unseen()
        # Nearly all: those that are missing are told, and rare.
        assert ended.total() + hidden() > 2 * pairs * count * 0.99
