"""Registers and stacks of sampled threads, copied by the kernel or by a program: cost and losses.

One thread burns CPU time below a recursion of known depth. What a sample costs in the kernel is the
time of the timer's interrupt that took it, from its first tracepoint to its last. Everything is
read by one thread in this process, into numpy.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench import Bench, compile_bpf
from benchmarks.report import Report, Samples
from coral import bpf
from coral.bpf.attaching.each_cpu import CpuEvent, EachCpu
from coral.bpf.attaching.sampling import cpu_clock

_ROUNDS: Final = 5
_FREQ_HZ: Final = 4_999
_ITERATIONS: Final = 300_000_000
_DEPTHS: Final = {"shallow": 6, "deep": 45}  # frames of about 290 bytes
_STACK_BYTES: Final = 16 << 10  # as in stacks.bpf.c
_RING_BYTES: Final = 8 << 20
_INTERVAL_S: Final = 0.018

_SAMPLE_TYPE: Final = 1 << 1 | 1 << 2 | 1 << 12 | 1 << 13  # TID, TIME, REGS_USER, STACK_USER
_REGISTERS: Final = 0xFF_0FFF  # of x86-64: all but the segments' that are always the same
_COPIED_BY_KERNEL: Final = np.dtype(
    [
        ("type", "u4"),
        ("misc", "u2"),
        ("size", "u2"),
        ("tgid", "u4"),
        ("tid", "u4"),
        ("time_ns", "u8"),
        ("abi", "u8"),
        ("registers", "u8", _REGISTERS.bit_count()),
        ("room", "u8"),
        ("stack", "u1", _STACK_BYTES),
        ("stack_bytes", "u8"),
    ]
)
_LOST: Final = 2


class _Reader(Protocol):
    """What a way's samples are read with."""

    def drain(self) -> tuple[int, int]:
        """The number of samples since the last time, and the bytes of stack in them."""

    def close(self) -> None:
        """Ends it."""

    @property
    def buffered_bytes(self) -> int:
        """What went through the buffers in total."""

    @property
    def lost(self) -> int:
        """Samples that did not fit."""


class _Nothing:
    """For programs that send nothing."""

    buffered_bytes = lost = 0

    def __init__(self, program_fd: int) -> None:
        self._events = EachCpu(partial(cpu_clock, freq_hz=_FREQ_HZ, program_fd=program_fd))

    def drain(self) -> tuple[int, int]:
        return 0, 0

    def close(self) -> None:
        self._events.close()


class _FromPerf:
    """Reads what the kernel copied: every record has room for the longest stack."""

    def __init__(self, program_fd: int) -> None:
        self.buffered_bytes = self.lost = 0
        self._events = EachCpu(partial(self._open, program_fd))

    @staticmethod
    def _open(program_fd: int, cpu: int) -> CpuEvent:
        return cpu_clock(
            cpu,
            _FREQ_HZ,
            program_fd=program_fd,
            ring_bytes=_RING_BYTES,
            sample_type=_SAMPLE_TYPE,
            user_registers=_REGISTERS,
            user_stack_bytes=_STACK_BYTES,
        )

    def drain(self) -> tuple[int, int]:
        count = stack_bytes = 0
        for event in self._events:
            data = event.take()
            self.buffered_bytes += len(data)
            for part in self._without_losses(data):
                samples = part.view(_COPIED_BY_KERNEL)
                count += len(samples)
                stack_bytes += int(samples["stack_bytes"].sum())
        return count, stack_bytes

    def _without_losses(self, data: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        size = _COPIED_BY_KERNEL.itemsize
        while len(data):
            whole = len(data) // size * size
            others = data[:whole].view(_COPIED_BY_KERNEL)["size"] != size
            end = int(others.argmax()) * size if others.any() else whole
            if end:
                yield data[:end]
            rest = data[end:]
            if len(rest):  # a report of losses, or that the kernel throttled the event
                type_, _, length = np.frombuffer(rest[:8].tobytes(), "u4, u2, u2")[0]
                if type_ == _LOST:
                    self.lost += int(rest[16:24].view(np.uint64)[0])
                rest = rest[length:]
            data = rest

    def close(self) -> None:
        self._events.close()


class _FromRing:
    """Reads what a program copied: records of several lengths in a ring buffer."""

    def __init__(self, it: bpf.BpfObject, program_fd: int) -> None:
        self.buffered_bytes = 0
        self._lost = partial(it.read_variable, "lost")
        self._sample = it.btf.struct_dtype("sample")
        page, fd = mmap.PAGESIZE, it.map_fd("ring")
        self._consumer_page = mmap.mmap(fd, page)
        self._pages = mmap.mmap(fd, page + 2 * _RING_BYTES, prot=mmap.PROT_READ, offset=page)
        self._consumer = np.frombuffer(self._consumer_page, np.uint64, 1)
        self._producer = np.frombuffer(self._pages, np.uint64, 1)
        self._memory = np.frombuffer(self._pages, np.uint8, offset=page)
        self._events = EachCpu(partial(cpu_clock, freq_hz=_FREQ_HZ, program_fd=program_fd))

    def drain(self) -> tuple[int, int]:
        begin = int(self._consumer[0])
        start = begin % _RING_BYTES
        data = self._memory[start : start + int(self._producer[0]) - begin].copy()
        headers = data.view(np.uint32)
        at, starts = 0, []
        while at < len(data):
            length = int(headers[at // 4])
            if length >> 31:  # being written
                break
            if not length >> 30:
                starts.append(at + 8)
            at += 8 + -(-(length & 0x3FFF_FFFF) // 8) * 8
        self._consumer[0] = begin + at
        self.buffered_bytes += at
        heads = np.array(starts)[:, None] + np.arange(self._sample.itemsize)
        samples = data[heads].view(self._sample)["stack_bytes"] if starts else np.zeros(0)
        return len(samples), int(samples.sum())

    @property
    def lost(self) -> int:
        return int(self._lost().sum())

    def close(self) -> None:
        self._events.close()
        del self._consumer, self._producer, self._memory
        self._pages.close()
        self._consumer_page.close()


@dataclass(frozen=True)
class Run:
    """One run of the burning thread."""

    samples: int  # that were read
    lost: int
    stack_bytes: int
    buffered_bytes: int
    reader_s: float
    interrupts: int  # in which a sample was taken
    interrupt_ns: int


@dataclass
class Way:
    """One way, at one depth."""

    name: str
    depth: int
    program: str
    runs: list[Run] = field(default_factory=list)

    def samples(self, figure: Callable[[Run], float]) -> Samples:
        """One figure of every run."""
        return Samples([figure(run) for run in self.runs])


async def measure(bench: Bench) -> Report:
    """The section: every way in turn, _ROUNDS times."""
    compiled = compile_bpf(bench.directory, "stacks")
    ways = [
        Way(f"{stack}: {name}", depth, program)
        for stack, depth in _DEPTHS.items()
        for name, program in (
            ("a program that does nothing", "sample_nothing"),
            ("copied by the kernel", "sample_by_kernel"),
            ("by a program, over its buffer", "sample_to_scratch"),
            ("by a program, in place", "sample_in_place"),
        )
    ]
    for turn in range(_ROUNDS):
        for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
            way.runs.append(_run(bench.program("deep"), compiled, way))
        bench.say(f"round {turn + 1} of {_ROUNDS}")
    return _report(ways)


def _run(program: Path, compiled: Path, way: Way) -> Run:
    process = subprocess.Popen(
        [program, str(way.depth), str(_ITERATIONS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        with bpf.BpfObject(
            compiled,
            programs=("timer_entry", "timer_exit"),
            walks=(way.program,),
            options={"wanted_tgid": process.pid},
            map_entries={"ring": _RING_BYTES},
        ) as it:
            it.attach()
            return _sampled(it, way.program, process)
    finally:
        process.kill()
        process.communicate()


def _sampled(it: bpf.BpfObject, program: str, process: subprocess.Popen[str]) -> Run:
    fd = it.program_fd(program)
    reader: _Reader
    if program == "sample_nothing":
        reader = _Nothing(fd)
    elif program == "sample_by_kernel":
        reader = _FromPerf(fd)
    else:
        reader = _FromRing(it, fd)
    ended = threading.Event()
    totals = np.zeros(2, np.int64)
    reader_s = 0.0

    def read() -> None:
        nonlocal reader_s
        began_s = time.thread_time()
        while not ended.wait(_INTERVAL_S):
            totals[:] += reader.drain()
        totals[:] += reader.drain()
        reader_s = time.thread_time() - began_s

    thread = threading.Thread(target=read)
    try:
        thread.start()
        process.communicate("x")
    finally:
        ended.set()
        thread.join()
        lost, buffered_bytes = reader.lost, reader.buffered_bytes
        reader.close()
    return Run(
        int(totals[0]),
        lost,
        int(totals[1]),
        buffered_bytes,
        reader_s,
        int(it.read_variable("interrupts").sum()),
        int(it.read_variable("interrupt_ns").sum()),
    )


_FIGURES: Final[dict[str, Callable[[Run], float]]] = {
    "us in the kernel": lambda run: run.interrupt_ns / 1e3 / max(run.interrupts, 1),
    "us in the reader": lambda run: run.reader_s * 1e6 / max(run.interrupts, 1),
    "bytes of stack": lambda run: run.stack_bytes / max(run.samples, 1),
    "bytes buffered": lambda run: run.buffered_bytes / max(run.samples, 1),
    "samples": lambda run: run.interrupts,
    "lost": lambda run: run.lost,
    "neither read nor lost": lambda run: run.interrupts - run.samples - run.lost,
}


def _report(ways: list[Way]) -> Report:
    return Report(
        title="Stacks of sampled threads, copied by the kernel or by a program",
        how=f"Median (middle half) of {_ROUNDS} runs of one thread sampled at {_FREQ_HZ} Hz, up to "
        f"{_STACK_BYTES >> 10} KiB of stack. In the kernel: the whole interrupt of the timer.",
        columns=("", *_FIGURES),
        rows=[
            (
                way.name,
                *(
                    way.samples(figure).show(2 if name.startswith("us") else 0)
                    for name, figure in _FIGURES.items()
                ),
            )
            for way in ways
        ],
        samples={
            f"{way.name}, {name}": way.samples(figure).values
            for way in ways
            for name, figure in _FIGURES.items()
        },
    )
