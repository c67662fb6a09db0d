"""What tests of streams share: sessions of single events, and all that a subscriber got of one."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from coral.client import AgentClient, Batch, CollectorInfo, SessionEnd
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import RunningAgent

T = TypeVar("T")


@dataclass
class Received:
    """All that one subscriber got, in the order in which it came."""

    batches: list[Batch] = field(default_factory=list)

    @property
    def events(self) -> NDArray[Any]:
        """The rows, of shape (n,), with the fields of SyscallCall."""
        return np.concatenate([batch.events for batch in self.batches])

    @property
    def calls(self) -> NDArray[np.str_]:
        """The rows' system calls by name, of shape (n,)."""
        return np.concatenate([batch.strings[batch.events["syscall"]] for batch in self._full])

    @property
    def comms(self) -> NDArray[np.str_]:
        """The rows' command names, of shape (n,)."""
        return np.concatenate([batch.strings[batch.events["comm"]] for batch in self._full])

    @property
    def _full(self) -> list[Batch]:
        return [batch for batch in self.batches if batch.count]

    @property
    def seqs(self) -> NDArray[np.int64]:
        """The numbers of the rows, where no filter leaves any out."""
        return np.concatenate(
            [np.arange(b.first_seq, b.last_seq + 1) for b in self._full] or [np.empty(0, np.int64)]
        )

    @property
    def lost(self) -> Counter[str]:
        """What was told lost, by stage."""
        lost: Counter[str] = Counter()
        for batch in self.batches:
            lost.update(batch.lost)
        return lost

    @property
    def end(self) -> SessionEnd:
        """Why the session ended: told once, and last."""
        assert [batch.end is not None for batch in self.batches[-2:]] in ([True], [False, True])
        end = self.batches[-1].end
        assert end
        return end


async def start_events(client: AgentClient, *pids: int, **config: str) -> str:
    """Starts a session of single events of those processes; returns the collector's id."""
    started = await client.start(
        pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
        config={"mode": "events", "pid": ",".join(map(str, pids)), **config},
    )
    assert started.supported, started.error
    return started.collector_id


async def receive(
    client: AgentClient,
    collector_id: str,
    terms: pb.EbpfEventStreamRequest | None = None,
    *subscribed: Callable[[], None],
) -> Received:
    """Subscribes, calls what is to follow once that stands, and reads to the session's end."""
    received = Received()
    async with client.subscribe(collector_id, terms) as stream:
        for call in subscribed:
            call()
        async for batch in stream:
            received.batches.append(batch)
    return received


async def info_of(client: AgentClient, collector_id: str) -> CollectorInfo:
    """What the agent tells of that collector, with its subscribers."""
    listed = await client.collectors()
    (info,) = (one for one in listed.collectors if one.collector_id == collector_id)
    return info


async def eventually(condition: Callable[[], Awaitable[T]], timeout_s: float = 30.0) -> T:
    """What CONDITION comes to once it is true; AssertionError where it never is."""
    end = time.monotonic() + timeout_s
    while not (value := await condition()):
        assert time.monotonic() < end, f"{condition} did not come true in {timeout_s} s"
        await asyncio.sleep(0.01)
    return value


async def have_subscribed(client: AgentClient, collector_id: str, count: int) -> None:
    """Returns when that collector has so many subscribers."""

    async def have() -> bool:
        return len((await info_of(client, collector_id)).subscribers) == count

    await eventually(have)


def metric(agent: RunningAgent, series: str) -> float:
    """The value of one series, as Prometheus reads it; 0 where there is no such series."""
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{series} ")), 0)


@asynccontextmanager
async def connected(agent: RunningAgent) -> AsyncIterator[AgentClient]:
    """A client on a connection of its own."""
    async with AgentClient(agent.address) as client:
        yield client
