"""A supervisor without a kernel: its collectors do what a test tells them to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from coral.agent.config import Config, Continuous, Limits
from coral.agent.sessions.session import End, Session, StartRequest
from coral.agent.sessions.supervisor import Supervisor
from coral.agent.streams import Terms
from coral.bpf import Features
from coral.collectors.contract import Batch, Collector, Emit, EventRows, Measures, Support
from coral.collectors.options import Option
from coral.mesh.v1 import ebpf_pb2 as pb

STATS = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
STOPPED = End(pb.SessionEnd.REASON_STOPPED)
Change = pb.CollectorChange


def calls(count: int, lost: int = 0) -> Batch:
    """COUNT system calls, after the kernel lost LOST."""
    fields = {"ended_ns": "i8", "duration_ns": "u8", "return_value": "i8"}
    fields |= dict.fromkeys(("pid", "tid", "syscall_number", "syscall", "comm"), "u4")
    records = np.zeros(count, list(fields.items()))
    losses: dict[int, int] = {pb.Loss.STAGE_KERNEL_BUFFER: lost} if lost else {}
    return Batch(EventRows(pb.SyscallCall, records, ("read",)), 1, 2, losses)


@dataclass
class Scripted(Collector):
    """A collector that does what a test tells it to, in place of a kernel's programs."""

    kind = STATS

    map_bytes: int = 1000
    at_exit: Batch = field(default_factory=lambda: calls(0))
    failure: Exception | None = None
    leaves_at_once: bool = False
    closing: asyncio.Event = field(default_factory=asyncio.Event)  # set: closing takes no time
    reached_close: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.closing.set()
        self._emit: Emit | None = None

    def emit(self, batch: Batch) -> None:
        assert self._emit
        self._emit(batch)

    async def run(self, emit: Emit, attached: Callable[[], None]) -> None:
        self._emit = emit
        if self.failure:
            raise self.failure
        try:
            attached()
            if not self.leaves_at_once:
                await asyncio.Event().wait()
        finally:
            self.reached_close.set()
            while not self.closing.is_set():
                try:
                    await self.closing.wait()
                except asyncio.CancelledError:
                    continue
            emit(self.at_exit)

    @property
    def bpf_object(self) -> Any:
        return SimpleNamespace(map_memory_bytes=self.map_bytes, program_stats=dict)

    @property
    def label(self) -> str:
        return "scripted"

    @property
    def interval_s(self) -> float:
        return 1.0

    def open(self) -> None: ...

    def drain(self) -> Batch:
        return calls(0)

    def close(self) -> None: ...

    @classmethod
    def options(cls) -> Sequence[Option]:
        return ()

    @classmethod
    def support(cls, _features: Features) -> Support:
        return Support(True)

    @classmethod
    def measures(cls, max_series: int) -> Measures:
        raise NotImplementedError

    @classmethod
    def create(cls, config: Mapping[str, str], service: object, features: Features) -> Self:
        raise NotImplementedError


class Desk:
    """A supervisor whose admission hands out scripted collectors, in place of the kernel's."""

    def __init__(self, limits: Limits | None = None, *continuous: Continuous) -> None:
        self.supervisor = Supervisor(Config(limits=limits or Limits(), continuous=continuous))
        self.made: list[Scripted] = []
        self.script: dict[str, Any] = {}
        self.preparing = asyncio.Event()  # set: preparing takes no time
        self.preparing.set()
        self.supervisor._admission.create = self._create  # type: ignore[method-assign,assignment]

    async def _create(self, _type: type[Collector], _request: StartRequest) -> Collector:
        await self.preparing.wait()
        if isinstance(failure := self.script.get("refusal"), Exception):
            raise failure
        self.made.append(Scripted(**self.script))
        return self.made[-1]

    async def start(self, duration_s: float | None = None, **script: Any) -> Session:
        self.script = script
        return await self.supervisor.start(StartRequest("syscall_stats", duration_s=duration_s))

    def changes(self, watch: Any) -> list[tuple[int, str]]:
        """What is waiting for WATCH, taken: what happened to which session."""
        found = []
        while change := watch.take():
            found.append((change.what, change.collector.collector_id))
        return found


def frames(session: Session, after_seq: int = 0) -> list[pb.EbpfEventBatch]:
    """What a new subscriber of an ended session gets, to its end."""
    subscription = session.subscribe(Terms(after_seq=after_seq))
    found = []
    try:
        while True:
            frame = subscription.take()
            assert frame
            found.append(pb.EbpfEventBatch.FromString(subscription.message(frame)))
    except EOFError:
        return found
    finally:
        subscription.close()


async def until(condition: Callable[[], object]) -> None:
    """Waits, by steps of the event loop, for what happens without waiting for anything else."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{condition} did not come true")
