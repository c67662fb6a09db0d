"""Batches of CPU profiles that no kernel gave, as the bytes that an agent sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.cpu_profile.profile import Frame, Profile
from coral.views.cpu_profile.reading import take
from coral.wire.columns import columns_layout

START_NS: Final = 1_700_000_000 * 10**9
PERIOD_NS: Final = 10_101_010  # 99 Hz
KERNEL: Final = pb.CPU_FRAME_FLAG_KERNEL
GUESS: Final = pb.CPU_FRAME_FLAG_GUESS
UNNAMED: Final = pb.CPU_FRAME_FLAG_UNNAMED
BOTTOM: Final = pb.CPU_STACK_END_BOTTOM
TOO_SHORT: Final = pb.CPU_STACK_END_COPY_TOO_SHORT
NO_INFO: Final = pb.CPU_STACK_END_NO_UNWIND_INFO
BUILD_ID: Final = "0123456789abcdef0123456789abcdef01234567"
_LAYOUT: Final = columns_layout(pb.CpuProfileColumns.DESCRIPTOR)

# The names of the worst functions: markup, separators, controls, marks of direction, length.
HOSTILE: Final = (
    "</script><script>document.title='broken out'</script>",
    "main;drive;fake 999",
    "_ZN9brokenmangle\"&'%s",
    "two\nlines\r\n and\ttab",
    "\x1b[31mred\x07\x00 end",
    "evil\u202egnp.exe\u2066",
    "<img src=x onerror=alert(1)>",
    "]]><!--&amp;\\u003c",
    "\u2028line\u2029paragraph\u00a0\u3000",
    "std::vector<int, std::allocator<int> >::push_back(int const&)",
    "x" * 4096,
    "constructor",
    "__proto__",
    " ",
)


@dataclass(frozen=True)
class Stack:
    """A row of a batch: frames are names, or frames, the outermost first."""

    frames: Sequence[str | Frame]
    count: int = 1
    thread: str = "worker"
    tid: int = 78
    process: str = "shop"
    tgid: int = 77
    end: int = BOTTOM
    unwinding: int = pb.CPU_UNWINDING_EH_FRAME

    @property
    def whole_frames(self) -> list[Frame]:
        return [
            Frame(it, "/usr/bin/shop", 0x1000 + len(it), BUILD_ID) if isinstance(it, str) else it
            for it in self.frames
        ]


def batch_of(
    *stacks: Stack,
    start_s: float = 0.0,
    end_s: float = 1.0,
    lost: int = 0,
    truncated: int = 0,
    period_ns: int = PERIOD_NS,
    period_cycles: int = 0,
) -> Batch:
    """The rows as columns, parsed from an agent's bytes."""
    message = _head(start_s, end_s, len(stacks))
    strings: dict[str, int] = {}
    frames: dict[Frame, int] = {}

    def text(value: str) -> int:
        return strings.setdefault(value, len(strings))

    numbers = [[frames.setdefault(f, len(frames)) for f in s.whole_frames] for s in stacks]
    wanted: dict[str, Sequence[int]] = {
        "stack": range(len(stacks)),
        "count": [it.count for it in stacks],
        "tgid": [it.tgid for it in stacks],
        "tid": [it.tid for it in stacks],
        "comm": [text(it.thread) for it in stacks],
        "process": [text(it.process) for it in stacks],
        "service": [text("shop") for _ in stacks],
        "end": [it.end for it in stacks],
        "unwinding": [it.unwinding for it in stacks],
        "in_kernel": [int(bool(it) and it[-1].kernel) for it in (s.whole_frames for s in stacks)],
        "stack_length": [len(it) for it in numbers],
        "stack_frames": [number for it in numbers for number in it],
        "frame_function": [text(it.function) for it in frames],
        "frame_module": [text(it.module) for it in frames],
        "frame_address": [it.address for it in frames],
        "frame_build_id": [text(it.build_id) for it in frames],
        "frame_flags": [it.flags for it in frames],
        "period_ns": [period_ns],
        "period_cycles": [period_cycles],
        "samples": [sum(it.count for it in stacks)],
        "samples_lost": [lost],
        "samples_truncated": [truncated],
    }
    columns = _LAYOUT.encode({name: np.array(values, np.uint64) for name, values in wanted.items()})
    message.cpu_profile_columns.MergeFromString(columns)
    message.strings.extend(strings)
    return Batch.parse(message.SerializeToString())


def rows_of(*stacks: Stack) -> Batch:
    """The same as rows."""
    message = _head(0, 1, len(stacks))
    for it in stacks:
        names = [frame.function for frame in it.whole_frames]
        row: dict[str, Any] = {"comm": it.thread, "process": it.process, "end": it.end}
        message.cpu_profile.add(
            stack=names, count=it.count, tgid=it.tgid, tid=it.tid, period_ns=PERIOD_NS,
            labels={"pid": str(it.tgid), "comm": it.thread}, **row,
        )  # fmt: skip
    return Batch.parse(message.SerializeToString())


def profile_of(*stacks: Stack, **head: Any) -> Profile:
    profile = Profile()
    take(batch_of(*stacks, **head), profile)
    return profile


def _head(start_s: float, end_s: float, count: int) -> pb.EbpfEventBatch:
    return pb.EbpfEventBatch(
        kind=pb.EBPF_COLLECTOR_KIND_CPU_PROFILE,
        service_name="shop",
        first_seq=1,
        last_seq=count,
        count=count,
        interval_start_ns=START_NS + int(start_s * 1e9),
        interval_end_ns=START_NS + int(end_s * 1e9),
    )
