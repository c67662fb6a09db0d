"""The contract of a collector. This file is all that a new one has to know.

A collector is a synchronous core (`open`, `drain`, `close`) that tests can drive step by step, and
`run`, the async shell around it that every collector shares. To add one: a `.bpf.c`, a module with
a subclass of `Collector`, a line in `registry.py`, a message in the proto.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from google.protobuf.message import Message
from prometheus_client import Metric

from bpf import BpfObject, Features, LoadError
from collectors.options import Option
from proto.coral.mesh.v1 import ebpf_pb2 as pb

# Until the first events are out, a collector looks this often, so that whoever asked sees within
# a blink that it works; from then on at its interval.
FIRST_LOOK_S = 0.01

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """What a collector has seen in one interval: rows of one message type, and what it lost.

    Times are Unix time in nanoseconds. `losses` are counts by `pb.Loss.Stage`.
    """

    rows: Sequence[Message]
    interval_start_ns: int
    interval_end_ns: int
    losses: Mapping[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.rows or self.losses)


Emit = Callable[[Batch], None]


class Measures(ABC):
    """What Prometheus is told of one kind of collector: counters that outlive its sessions."""

    @abstractmethod
    def observe(self, service: str, batch: Batch) -> None:
        """Adds a batch that was seen of SERVICE. Called from the event loop."""

    @abstractmethod
    def collect(self) -> Iterable[Metric]:
        """The metric families, at scrape time. Called from the scrape's thread."""


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a kind of collector can run here: by which hook, or why not."""

    supported: bool
    hook: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ServiceProcesses:
    """The processes of a service: what a collector watches where its options name no process."""

    name: str
    tgids: tuple[int, ...]


class Collector(ABC):
    """One collector at work. Made once, opened once, closed once."""

    kind: ClassVar[pb.EbpfCollectorKind]

    @classmethod
    @abstractmethod
    def options(cls) -> Sequence[Option]:
        """The options it takes, for help, checks and documentation."""

    @classmethod
    @abstractmethod
    def support(cls, features: Features) -> Support:
        """What FEATURES allow."""

    @classmethod
    @abstractmethod
    def measures(cls, max_series: int) -> Measures:
        """A new, empty set of this kind's metrics, of at most MAX_SERIES label sets."""

    @classmethod
    @abstractmethod
    def create(
        cls, config: Mapping[str, str], service: ServiceProcesses | None, features: Features
    ) -> Collector:
        """A collector for CONFIG. Raises `OptionError`; touches nothing in the kernel."""

    @property
    @abstractmethod
    def label(self) -> str:
        """What it watches, as a service's name where the request gave none."""

    @property
    @abstractmethod
    def bpf_object(self) -> BpfObject:
        """Its object, for the figures that the kernel keeps of it."""

    @property
    @abstractmethod
    def interval_s(self) -> float:
        """How often `run` drains."""

    @abstractmethod
    def open(self) -> None:
        """Loads and attaches. Blocks. Raises `BpfError`."""

    @abstractmethod
    def drain(self) -> Batch:
        """Everything since the last drain. Blocks."""

    @abstractmethod
    def close(self) -> None:
        """Detaches and frees, whatever state it is in. Blocks. Safe to call twice."""

    def exit_fds(self) -> Sequence[int]:
        """Descriptors that become readable when a watched process ends; once all have, the
        session ends. Empty where it should go on."""
        return ()

    async def run(self, emit: Emit, attached: Callable[[], None]) -> None:
        """Opens, calls ATTACHED, then drains and emits at every interval until cancelled, or until
        what it watches has ended. Either way drains once more, and closes."""
        opened = False
        try:
            await in_thread(self._open)
            opened = True
            attached()
            await self._drain_until_exit(emit)
        finally:
            try:
                if opened:
                    await self._drain(emit)
            finally:
                await in_thread(self.close)

    def _open(self) -> None:
        try:
            self.open()
        except KeyError as error:
            raise LoadError(
                f"{self.bpf_object.path.name} has no {error}: it is of another version of this "
                "agent, or damaged"
            ) from error

    async def _drain(self, emit: Emit) -> bool:
        """Drains and emits; whether there was anything. A cancellation meanwhile comes after:
        what was drained is in no map any more, and would be lost without a number."""
        drained: list[Batch] = []
        try:
            await in_thread(lambda: drained.append(self.drain()))
        finally:
            for batch in drained:
                emit(batch)
        return bool(drained[0])

    async def _drain_until_exit(self, emit: Emit) -> None:
        loop = asyncio.get_running_loop()
        exited = asyncio.Event()
        waiting = set(self.exit_fds())

        def on_exit(fd: int) -> None:
            loop.remove_reader(fd)
            waiting.discard(fd)
            if not waiting:
                exited.set()

        for fd in tuple(waiting):
            loop.add_reader(fd, on_exit, fd)
        try:
            started = loop.time()
            tick, seen = started, False
            while not exited.is_set():
                tick = tick + self.interval_s if seen else loop.time() + FIRST_LOOK_S
                if not seen:
                    tick = min(tick, started + self.interval_s)
                    seen = tick >= started + self.interval_s
                try:
                    async with asyncio.timeout_at(tick):
                        await exited.wait()
                except TimeoutError:
                    if await self._drain(emit) and not seen:
                        seen, tick = True, loop.time()
        finally:
            for fd in waiting:
                loop.remove_reader(fd)


async def in_thread(function: Callable[[], T]) -> T:
    """Runs FUNCTION in a thread. A caller that is cancelled meanwhile still waits for its end, so
    that nothing it makes is left without an owner; then the cancellation goes on."""
    future = asyncio.get_running_loop().run_in_executor(None, function)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            cancelled = error
        except Exception:  # noqa: BLE001, S110  told below, by result()
            pass
    if cancelled:
        future.exception()  # what FUNCTION raised gives way to the cancellation
        raise cancelled
    return future.result()
