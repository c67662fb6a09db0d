"""The contract of a collector. This file is all that a new one has to know.

A collector is a synchronous core (`open`, `drain`, `close`) that tests can drive step by step, and
`run`, the async shell around it that every collector shares. To add one: a `.bpf.c`, a module with
a subclass of `Collector`, a line in `registry.py`, a message in the proto.
"""

from __future__ import annotations

import asyncio
import errno
import select
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray
from prometheus_client import Metric

from coral.bpf import BpfObject, Features, LoadError, RecordReader, Rung, Step
from coral.bpf.libbpf import release_memory
from coral.bpf.probing import capabilities
from coral.collectors.options import Option
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.columns import columns_layout

# Until the first events are out, a collector looks this often, so that whoever asked sees within
# a blink that it works; from then on at its interval.
FIRST_LOOK_S = 0.01

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EventRows:
    """Individual events as one array.

    `records` is of shape (n,), with the fields of `message`, a type of fixed-width fields only;
    fields that are indices point into `strings`. Each stands for `sample_every` events.
    """

    message: type[Message]
    records: NDArray[Any]
    strings: Sequence[str]
    sample_every: int = 1

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, slots=True)
class Summaries:
    """The summaries of one interval as columns, which is what frames, filters and metrics work on.

    `message` is the type of their columns (`pb.SyscallStatsColumns`). `columns` has arrays under
    the names of its fields: (n,) with a value for each row, (n, width) for a matrix, (k,) for one
    that is not by row. Those that are indices point into `strings`. `messages` makes the rows as
    messages of columns and strings, for subscribers that want them so.
    """

    message: type[Message]
    columns: Mapping[str, NDArray[Any]]
    strings: Sequence[str]
    messages: Callable[[Mapping[str, NDArray[Any]], Sequence[str]], Sequence[Message]]
    count: int

    def __len__(self) -> int:
        return self.count

    def take(self, index: NDArray[Any]) -> Summaries:
        """The rows at INDEX, of shape (m,): numbers of rows in any order, or a mask."""
        layout = columns_layout(self.message.DESCRIPTOR).columns
        columns = {
            name: values if layout[name].per_batch else values[index]
            for name, values in self.columns.items()
        }
        count = int(np.count_nonzero(index)) if index.dtype == bool else len(index)
        return replace(self, columns=columns, count=count)


@dataclass(frozen=True, slots=True)
class Batch:
    """What a collector has seen in one interval: rows of one message type, and what it lost.

    Times are Unix time in nanoseconds. `losses` are counts by `pb.Loss.Stage`. `in_detail` says
    that the request asked for measures that tell more apart than by default.
    """

    rows: Summaries | EventRows
    interval_start_ns: int
    interval_end_ns: int
    losses: Mapping[int, int] = field(default_factory=dict)
    in_detail: bool = False

    def __bool__(self) -> bool:
        return bool(len(self.rows) or self.losses)


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
    """Whether a kind of collector can run here: by which hook, or why not.

    `steps` are the rungs of the ladder that it would stand on, each with the better ones that were
    refused; `refused_options` are the options that this machine cannot do, with the reasons.
    """

    supported: bool
    hook: str = ""
    reason: str = ""
    steps: tuple[Step, ...] = ()
    refused_options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def by(cls, rung: Rung, refused_options: Mapping[str, str]) -> Support:
        """What RUNG makes possible."""
        steps = tuple(rung)
        if rung.missing:
            reason = "; ".join(f"no {step.what} ({step.why_not})" for step in rung.missing)
            return cls(False, reason=reason, steps=steps, refused_options=refused_options)
        return cls(True, rung.hook.taken, rung.hook.why_not, steps, refused_options)


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
    def needs(cls) -> Mapping[str, str]:
        """The capabilities that it cannot do without, each with what for, in the words after
        "CAP_... (". One that takes more adds its own to these, which all take."""
        return capabilities.TRACING

    @classmethod
    @abstractmethod
    def support(cls, features: Features) -> Support:
        """What FEATURES allow. That its `needs` are met was asked before."""

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

    @property
    def records(self) -> RecordReader | None:
        """The buffer that `drain` empties, where it does: then a program can ask for it before the
        interval is over."""
        return None

    @property
    def drains_on_loop(self) -> bool:
        """Whether `drain` does no more than empty `records`: that is quick enough for the event
        loop."""
        return self.records is not None

    async def run(self, emit: Emit, attached: Callable[[], None]) -> None:
        """Opens, calls ATTACHED, then drains and emits at every interval until cancelled, or until
        what it watches has ended. Either way detaches, drains once more, and closes."""
        opened = False
        try:
            await in_thread(self._open)
            opened = True
            attached()
            await in_thread(release_memory)
            with _Watch(self) as watch:
                await self._drain_until_exit(watch, emit)
        finally:
            try:
                if opened:
                    await in_thread(self.bpf_object.detach)
                    await self._drain(emit)
            finally:
                await in_thread(self.close)

    def _open(self) -> None:
        try:
            self.open()
        except OSError as error:  # a descriptor, a file of /proc
            what = f"opening {error.filename or 'a descriptor'}"
            raise LoadError(what, error.errno or errno.EIO) from error
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
            if self.drains_on_loop:
                drained.append(self.drain())
            else:
                await in_thread(lambda: drained.append(self.drain()))
        finally:
            for batch in drained:
                emit(batch)
        return bool(drained[0])

    async def _drain_until_exit(self, watch: _Watch, emit: Emit) -> None:
        loop = asyncio.get_running_loop()
        started = tick = loop.time()
        seen = False
        while not watch.exited:
            if seen:
                if tick <= loop.time():  # a wake-up does not put off the tick
                    tick = max(tick + self.interval_s, loop.time())
            else:
                tick = min(loop.time() + FIRST_LOOK_S, started + self.interval_s)
                seen = tick == started + self.interval_s
            if await watch.wait_until(tick):
                continue
            if await self._drain(emit) and not seen:
                seen, tick = True, loop.time()


class _Watch:
    """Waits for the next time to drain: a tick, a program's wake-up, or the end of all targets."""

    def __init__(self, collector: Collector) -> None:
        self.exited = False
        self._woken = asyncio.Event()
        self._running = set(collector.exit_fds())
        self._records = collector.records
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        for fd in self._running:
            self._loop.add_reader(fd, self._on_exit, fd)
        if self._records:
            wakeup = self._records.wakeup
            self._loop.add_reader(wakeup.fileno(), self._on_wakeup, wakeup)
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._running:
            self._loop.remove_reader(fd)
        if self._records:
            self._loop.remove_reader(self._records.wakeup.fileno())

    def _on_exit(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        self._running.discard(fd)
        self.exited = not self._running
        if self.exited:
            self._woken.set()

    def _on_wakeup(self, wakeup: select.epoll) -> None:
        wakeup.poll(0)
        self._woken.set()

    async def wait_until(self, tick: float) -> bool:
        """Waits until TICK, by the loop's clock, or a wake-up; whether all targets have ended."""
        try:
            async with asyncio.timeout_at(tick):
                await self._woken.wait()
        except TimeoutError:
            pass
        self._woken.clear()
        return self.exited


async def in_thread(function: Callable[[], T]) -> T:
    """Runs FUNCTION in a thread. A caller that is cancelled meanwhile still waits for its end, so
    that nothing it makes is left without an owner; then the cancellation goes on."""
    loop, taken = asyncio.get_running_loop(), threading.Lock()
    done: Future[T] = Future()

    def job() -> None:
        if taken.acquire(blocking=False):
            try:
                done.set_result(function())
            except BaseException as error:  # noqa: BLE001  told below, by result()
                done.set_exception(error)

    try:
        loop.run_in_executor(None, job)
    except RuntimeError:  # no thread can be started, yet the job stays queued: here, then, and once
        job()
    future = asyncio.wrap_future(done)
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
