"""Resident memory of the agent's process, beside peers with the same job loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benchmarks import peers
from benchmarks.bench import ENDLESS_CALLS, Bench, Tap
from benchmarks.peers import Peer, PeerError
from benchmarks.report import NOT_HERE, Aim, Report, not_measured, times
from benchmarks.startup import bcc_program
from coral.client import AgentClient

_MOST_IDLE_MB: Final = 60.0
_BATCHES: Final = 20
_IDLE, _WORKING = "coral agent, idle", "coral agent, one collector and a subscriber"
_PEERS: Final = (peers.BCC_SYSCOUNT, peers.BPFTRACE, peers.LIBBPF_SYSCOUNT)


async def measure(bench: Bench) -> Report:
    """The section."""
    found: dict[str, float] = {}
    reasons: dict[str, str] = {}
    with bench.calls(ENDLESS_CALLS) as target:
        target.go()
        with bench.agent() as agent:
            found[_IDLE] = rss_mb(agent.process.pid)
            async with (
                AgentClient(agent.address) as client,
                Tap.on(client, target.pid, interval="100ms") as tap,
            ):
                await tap.until_batches(_BATCHES)
                found[_WORKING] = rss_mb(agent.process.pid)
            found["coral agent, idle again"] = rss_mb(agent.process.pid)
        for name, started in _peers(bench, target.pid):
            try:
                with ExitStack() as stack:
                    found[name] = rss_mb(stack.enter_context(started))
            except PeerError as error:
                reasons[name] = str(error)
            bench.say(f"{name}: {reasons.get(name) or 'done'}")
    rows = [(name, f"{mb:.1f}", times(mb, found[_WORKING])) for name, mb in found.items()]
    rows += [(name, NOT_HERE, NOT_HERE) for name in reasons]
    return Report(
        title="Resident memory (VmRSS), in MB of 10^6 bytes",
        how=f"One process each. The agent at work: after {_BATCHES} intervals.",
        columns=("", "MB", "of coral's at work"),
        rows=rows,
        aims=(Aim(_IDLE, found[_IDLE], _MOST_IDLE_MB, " MB"),),
        remarks=not_measured(reasons),
        samples={f"{name}, MB": [mb] for name, mb in found.items()},
    )


def rss_mb(pid: int | str) -> float:
    """What a process holds in memory, pages that it shares with others included."""
    return _status_mb(pid, "VmRSS")


def peak_rss_mb(pid: int | str) -> float:
    """The most that a process has held so far."""
    return _status_mb(pid, "VmHWM")


def _status_mb(pid: int | str, name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1]) * 1024 / 1e6


def _peers(bench: Bench, pid: int) -> Iterator[tuple[str, AbstractContextManager[int]]]:
    yield "bcc, the same job", _bcc_pid(bench, pid)
    for peer in _PEERS:
        yield peer.name, _peer_pid(bench, peer, pid)


@contextmanager
def _bcc_pid(bench: Bench, pid: int) -> Iterator[int]:
    with bcc_program(bench, pid) as (process_id, _):
        yield process_id


@contextmanager
def _peer_pid(bench: Bench, peer: Peer, pid: int) -> Iterator[int]:
    with peers.running(bench, peer, pid) as one:
        yield one.pid
