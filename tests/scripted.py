"""A supervisor without a kernel: its collectors do what a test tells them to."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Self

import numpy as np

from coral.agent.access.target import Ownership, Target
from coral.agent.caller import Caller
from coral.agent.config import Config, Continuous, Limits
from coral.agent.sessions.admission import Admitted
from coral.agent.sessions.session import End, Session, StartRequest
from coral.agent.sessions.supervisor import Supervisor
from coral.agent.streams import Terms
from coral.bpf import Features
from coral.collectors.contract import Batch, Collector, EventRows, Measures, Support
from coral.collectors.options import Option
from coral.mesh.v1 import ebpf_pb2 as pb

STATS = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
STOPPED = End(pb.SessionEnd.REASON_STOPPED)
Change = pb.CollectorChange


def calls(count: int, lost: int = 0) -> Batch:
    """COUNT system calls, after the kernel lost LOST."""
    fields = {"ended_ns": "i8", "duration_ns": "u8", "return_value": "i8"}
    fields |= dict.fromkeys(("pid", "tid", "syscall_number", "syscall", "comm"), "u4")
    records: Any = np.zeros(count, list(fields.items()))
    losses: dict[int, int] = {pb.Loss.STAGE_KERNEL_BUFFER: lost} if lost else {}
    return Batch(EventRows(pb.SyscallCall, records, ("read",)), 1, 2, losses)


class Scripted(Collector):
    """A collector that does what a test tells it to, in place of a kernel's programs."""

    kind = STATS

    def __init__(
        self,
        *,
        map_bytes: int = 1000,
        last: Batch | None = None,
        failure: Exception | None = None,
        exits: bool = False,
    ) -> None:
        self.detaching = threading.Event()
        self.may_detach = threading.Event()
        self.may_detach.set()
        self._pending: deque[Batch] = deque()
        self._last = calls(0) if last is None else last
        self._failure = failure
        self._exited = os.eventfd(1) if exits else None
        self._bpf_object = SimpleNamespace(
            map_memory_bytes=map_bytes, program_stats=dict, shares={}, detach=self._detach
        )

    async def emit(self, batch: Batch) -> None:
        """Returns when the batch has been drained."""
        self._pending.append(batch)
        await until(lambda: not self._pending)

    def _detach(self) -> None:
        self.detaching.set()
        self.may_detach.wait()
        self._pending.append(self._last)

    def open(self) -> None:
        if self._failure:
            raise self._failure

    def drain(self) -> Batch:
        return self._pending.popleft() if self._pending else calls(0)

    def close(self) -> None:
        if self._exited is not None:
            os.close(self._exited)
            self._exited = None

    def exit_fds(self) -> Sequence[int]:
        return () if self._exited is None else (self._exited,)

    @property
    def bpf_object(self) -> Any:
        return self._bpf_object

    @property
    def drains_on_loop(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return "scripted"

    @property
    def interval_s(self) -> float:
        return 0.001

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


def admitted(made: Collector, request: StartRequest, caller: Caller) -> Admitted:
    """MADE, as one that CALLER may open."""
    by = "" if request.continuous else caller.identity.principal
    target = Target(made.kind, made.watched)
    return Admitted(made, target, Ownership(by, request.continuous), None)


class Desk:
    """A supervisor whose admission hands out scripted collectors, in place of the kernel's."""

    def __init__(self, limits: Limits | None = None, *continuous: Continuous) -> None:
        self.supervisor = Supervisor(Config(limits=limits or Limits(), continuous=continuous))
        self.made: list[Scripted] = []
        self.script: dict[str, Any] = {}
        self.preparing = asyncio.Event()  # set: preparing takes no time
        self.preparing.set()
        self.supervisor._admission.create = self._create  # type: ignore[method-assign,assignment]

    async def _create(
        self, _type: type[Collector], request: StartRequest, caller: Caller
    ) -> Admitted:
        await self.preparing.wait()
        if isinstance(failure := self.script.get("refusal"), Exception):
            raise failure
        made = Scripted(**self.script)
        self.made.append(made)
        return admitted(made, request, caller)

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
    """Waits until CONDITION is true."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  it says nothing when it changes
            await asyncio.sleep(0.0005)
