"""Handshakes as kernels complete them: a listener may have two sockets for one connection for a
moment."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest

from coral import bpf
from coral.collectors.contract import EventRows
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.collecting import waiting
from tests.network import Seen, Side
from tests.support import PATIENCE, at_work

pytestmark = pytest.mark.usefixtures("nothing_left")

CLOSED = 7  # enum TcpState
_RESETS = "ip saddr 127.0.0.9 tcp flags & rst == rst drop"


def test_a_handshake_that_two_segments_complete_at_once_makes_one_connection(
    sides: tuple[Side, Side], programs: Path
) -> None:
    """Each of the two makes a socket where they run at the same time, and the kernel closes one."""
    side, count = sides[0], int(200 / PATIENCE)
    command = ("ip", "netns", "exec", side.name, programs / "rivals", count)
    with side.dropping(_RESETS), waiting(*command) as program, ExitStack() as stack:
        summaries, events = (
            stack.enter_context(
                at_work(
                    TcpMetricsCollector.create(
                        {"pid": str(program.pid), "mode": mode}, None, bpf.probe()
                    )
                )
            )
            for mode in ("summaries", "events")
        )
        seen = Seen(summaries)
        program.run()
        for collector in (summaries, events):
            collector.bpf_object.detach()
        seen.drain()
        changes = events.drain().rows
    servers = [row for row in seen.rows if row.role == pb.TCP_ROLE_SERVER]
    assert Counter(row.end for row in servers if row.end) == {pb.TCP_END_RESET_LOCAL: count}
    assert sum(row.opened for row in servers) == sum(row.established for row in servers) == count
    assert isinstance(changes, EventRows)
    steps = changes.records[["role", "what", "new_state"]].tolist()
    assert steps.count((pb.TCP_ROLE_SERVER, pb.TcpStateChange.WHAT_STATE, CLOSED)) == count
    assert seen.lost == 0
