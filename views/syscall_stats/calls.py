"""Rows of `syscall_stats` as data, and single calls as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from coral.client import Batch, Histogram
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.errnos import errno_name, is_errno, is_failure
from coral.views.text import format_clock, format_ns, shorten, styled
from coral.wire.kinds import kind_name
from coral.wire.text import safe

QUANTILES: Final = {"P50": 0.5, "P95": 0.95, "P99": 0.99}
_WHO_WIDTHS: Final = (8, 22)  # least, most
_NAME_WIDTHS: Final = (8, 20)
_OUTCOME_WIDTH: Final = 14
_DURATION_WIDTH: Final = 7
_GAPS: Final = len("    =  ")
_NARROW: Final = 72  # terminals that are narrower have the time to the millisecond
_MILLISECONDS: Final = len("HH:MM:SS.mmm")
_ADDRESS: Final = 1 << 32  # results from here on are addresses, such as those of mmap


def records(batch: Batch) -> Iterator[dict[str, Any]]:
    """Each row as plain data: a summary with its quantiles, or a single call."""
    yield from _summary_records(batch.message)
    yield from _call_records(batch)


def call_lines(batch: Batch, width: int | None = None) -> Iterator[str]:
    """A line for each single call, of WIDTH columns at most."""
    for call in _call_records(batch):
        yield call_line(call, width)


def call_line(call: Mapping[str, Any], width: int | None = None) -> str:
    """A single call for people: when, whose, its name, its outcome, how long it took."""
    value, syscall = call["return_value"], call["syscall"]
    error = errno_name(-value) if is_errno(value) else ""
    colour = "red" if error and is_failure(syscall, error) else ""
    clock = format_clock(call["ended_ns"])
    if width is not None and width < _NARROW:
        clock = clock[:_MILLISECONDS]
    who_width, name_width = _widths(width and width - len(clock))
    thread = f"/{call['tid']}"
    who = shorten(f"{safe(call['comm'])}{thread}", who_width, len(thread))
    result = error or (hex(value) if value >= _ADDRESS else str(value))
    if width is not None:
        result = shorten(result, _OUTCOME_WIDTH)
    outcome = f"{result:<{_OUTCOME_WIDTH}}"
    return (
        f"{clock}  {who:<{who_width}} "
        f"{shorten(syscall, name_width):<{name_width}} = "
        f"{styled(outcome, colour) if colour else outcome} "
        f"{format_ns(call['duration_ns']):>{_DURATION_WIDTH}}"
    )


def _widths(width: int | None) -> tuple[int, int]:
    """How wide the columns of the process and of the name are, on a terminal that has WIDTH columns
    beside the clock."""
    (least_who, most_who), (least_name, most_name) = _WHO_WIDTHS, _NAME_WIDTHS
    if width is None:
        return most_who, most_name
    room = width - _GAPS - _OUTCOME_WIDTH - _DURATION_WIDTH
    who = min(max(room // 2, least_who), most_who)
    return who, min(max(room - who, least_name), most_name)


def _call_records(batch: Batch) -> Iterator[dict[str, Any]]:
    events = batch.events
    if not len(events):
        return
    syscalls, comms = batch.strings[events["syscall"]], batch.strings[events["comm"]]
    sample_every = batch.message.sample_every or 1
    for event, syscall, comm in zip(
        events.tolist(), syscalls.tolist(), comms.tolist(), strict=True
    ):
        call = dict(zip(events.dtype.names or (), event, strict=True))
        value = call["return_value"]
        yield {
            "collector": kind_name(batch.message.kind),
            "service": batch.message.service_name,
            "ended_ns": call["ended_ns"],
            "pid": call["pid"],
            "tid": call["tid"],
            "comm": comm,
            "syscall": syscall,
            "return_value": value,
            "error": errno_name(-value) if is_errno(value) else "",
            "duration_ns": call["duration_ns"],
            "sample_every": sample_every,
        }


def _summary_records(batch: pb.EbpfEventBatch) -> Iterator[dict[str, Any]]:
    for index, stats in enumerate(batch.syscall_stats):
        latency = Histogram()
        latency.add(stats.latency_ns, stats.max_duration_ns)
        yield {
            "collector": kind_name(batch.kind),
            "service": batch.service_name,
            "seq": batch.first_seq + index,
            "interval_start_ns": batch.interval_start_ns,
            "interval_end_ns": batch.interval_end_ns,
            "pid": stats.pid,
            "comm": stats.labels.get("comm", ""),
            "syscall": stats.syscall_name,
            "calls": stats.call_count,
            "errors": stats.error_count,
            "errors_by_class": dict(stats.errors_by_class),
            "total_ns": stats.total_duration_ns,
            # A call that never returns, such as exit, has a duration of 0, which is no latency.
            "max_ns": stats.max_duration_ns or None,
            **{
                f"{name.lower()}_ns": round(latency.quantile_ns(q)) if latency.max_ns else None
                for name, q in QUANTILES.items()
            },
        }
