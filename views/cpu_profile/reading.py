"""Batches of `cpu_profile`, taken into a profile: columns with tables of stacks and frames, or
rows, which have the names of functions alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.cpu_profile.profile import UNKNOWN, Frame, Origin, Profile, Sampled
from coral.views.data import short_name
from coral.views.pods import row_pods
from coral.wire.kinds import kind_name

_ROW_COLUMNS: Final = (
    *("stack", "count", "process", "tgid", "comm", "tid", "end", "unwinding", "in_kernel"),
)
_FRAME_COLUMNS: Final = (
    *("frame_function", "frame_module", "frame_address", "frame_build_id", "frame_flags"),
)


def take(batch: Batch, *profiles: Profile) -> None:
    """Adds a batch to each of PROFILES."""
    columns, period = batch.columns, _period(batch)
    for origin, frames, count in samples(batch):
        for profile in profiles:
            profile.add(origin, frames, count, *period)
    lost, truncated = (_single(columns, f"samples_{name}") for name in ("lost", "truncated"))
    for profile in profiles:
        profile.account(lost=lost, truncated=truncated)


def samples(batch: Batch) -> Iterator[Sampled]:
    """The rows of a batch, each with its stack."""
    pods = row_pods(batch)
    if batch.columns:
        yield from _of_columns(batch.columns, list(batch.message.strings), pods)
    for row, pod in zip(batch.message.cpu_profile, pods, strict=False):
        yield _of_row(row, pod)


def _of_columns(
    columns: Mapping[str, NDArray[Any]], strings: list[str], pods: Iterable[str]
) -> Iterator[Sampled]:
    frames = [
        Frame(strings[function] or UNKNOWN, strings[module], address, strings[build_id], flags)
        for function, module, address, build_id, flags in _table(columns, _FRAME_COLUMNS)
    ]
    ends = np.cumsum(columns["stack_length"], dtype=np.int64)
    cuts = np.split(columns["stack_frames"].astype(np.int64), ends[:-1])
    stacks = [[frames[number] for number in cut.tolist()] for cut in cuts]
    rows = _table(columns, _ROW_COLUMNS)
    for (stack, count, process, tgid, comm, tid, end, unwinding, kernel), pod in zip(
        rows, pods, strict=False
    ):
        name = strings[comm]
        called = _in_pod(strings[process] or name, pod)
        origin = Origin(called, tgid, name, tid, end, unwinding, bool(kernel))
        yield Sampled(origin, stacks[stack], count)


def _in_pod(process: str, pod: str) -> str:
    """What a process is called: with its pod, where the session watches several."""
    return f"{process} ({pod})" if pod else process


def _table(columns: Mapping[str, NDArray[Any]], names: tuple[str, ...]) -> Iterator[Any]:
    """The values of columns side by side; one that is shorter, because all that it would have are
    zeros, is filled with zeros."""
    length = max(len(columns[name]) for name in names)
    arrays = [columns[name] for name in names]
    whole = [it.tolist() if len(it) == length else [0] * length for it in arrays]
    return zip(*whole, strict=True)


def _of_row(row: pb.CpuProfileSample, pod: str) -> Sampled:
    """A row; of a frame it has the text alone. Clients of other agents fill in labels only."""
    labels = row.labels
    comm = row.comm or labels.get("comm", "")
    pid, tid = (row.tgid or _number(labels, "pid")), (row.tid or _number(labels, "tid"))
    process = _in_pod(row.process or labels.get("process", "") or comm, pod)
    origin = Origin(process, pid, comm, tid, row.end, row.unwinding, row.in_kernel)
    return Sampled(origin, [Frame(text or UNKNOWN) for text in row.stack], row.count)


def _number(labels: Mapping[str, str], name: str) -> int:
    text = labels.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def _period(batch: Batch) -> tuple[int, int]:
    """What each sample of a batch stands for, in ns of CPU time and in cycles: one of them is 0, or
    both where nothing says so."""
    if rows := batch.message.cpu_profile:
        return rows[0].period_ns, rows[0].period_cycles
    return _single(batch.columns, "period_ns"), _single(batch.columns, "period_cycles")


def _single(columns: Mapping[str, NDArray[Any]], name: str) -> int:
    """A column of one value."""
    values = columns.get(name)
    return int(values[0]) if values is not None and len(values) else 0


def records(batch: Batch) -> Iterator[dict[str, Any]]:
    """Each row as plain data."""
    message = batch.message
    period_ns, period_cycles = _period(batch)
    for index, (origin, frames, count) in enumerate(samples(batch)):
        yield {
            "collector": kind_name(message.kind),
            "service": message.service_name,
            "seq": message.first_seq + index,
            "interval_start_ns": message.interval_start_ns,
            "interval_end_ns": message.interval_end_ns,
            "process": origin.process,
            "pid": origin.tgid,
            "comm": origin.thread,
            "tid": origin.tid,
            "count": count,
            "period_ns": period_ns,
            "period_cycles": period_cycles,
            "in_kernel": origin.in_kernel,
            "end": short_name(pb.CpuStackEnd.DESCRIPTOR, origin.end),
            "unwinding": short_name(pb.CpuUnwinding.DESCRIPTOR, origin.unwinding),
            "stack": [_frame_record(frame) for frame in frames],
        }


def _frame_record(frame: Frame) -> dict[str, Any]:
    marks = ("kernel", "guessed", "unnamed")
    record: dict[str, Any] = {"function": frame.function, "module": frame.module}
    record |= {"address": f"{frame.address:#x}", "build_id": frame.build_id}
    return record | {mark: True for mark in marks if getattr(frame, mark)}
