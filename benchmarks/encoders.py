"""What it costs to write a row of single events as protobuf, and to read it: four ways to write,
three to read, of the same rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from numpy.typing import NDArray

from benchmarks.bench import Bench
from benchmarks.report import Aim, Report, Samples, times
from coral.agent.streams.frame import Frame, Header
from coral.client import Batch as Read
from coral.collectors.contract import EventRows
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.rows import row_layout

_COUNTS: Final = (512, 4096)
_ROUNDS: Final = 9
_ROWS_A_ROUND: Final = 50_000
_MOST_NS: Final = 38.0  # design, section 5: 14 to 38
_LAYOUT: Final = row_layout(pb.EbpfEventBatch.DESCRIPTOR, "syscall_calls")
_NAMES: Final = _LAYOUT.dtype.names or ()
_HEADER: Final = Header("bench", pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, "bench", "bench")
_OURS: Final = "write: coral, rows by array"
_MESSAGES: Final = "write: a message object a row"


@dataclass(frozen=True)
class Way:
    """One way: PREPARE makes from the records what is measured, each call of it one batch."""

    name: str
    prepare: Callable[[NDArray[Any]], Callable[[], object]]


async def measure(bench: Bench) -> Report:
    """The section."""
    ways = _ways()
    samples: dict[tuple[str, int], list[float]] = {}
    for count in _COUNTS:
        records = _records(count)
        _check(records)
        ready = [(way, way.prepare(records)) for way in ways]
        for _ in range(_ROUNDS):
            for way, run in ready:
                samples.setdefault((way.name, count), []).append(_ns_a_row(run, count))
    bench.say(f"{_ROUNDS} rounds of {len(ways)} ways")
    of = {key: Samples(values) for key, values in samples.items()}
    rows = []
    for way in ways:
        reference = _OURS if way.name.startswith("write") else ways[-1].name
        small, large = (of[way.name, count] for count in _COUNTS)
        ratio = times(large.median, of[reference, _COUNTS[-1]].median)
        rows.append((way.name, small.show(1), large.show(1), ratio))
    return Report(
        title="Encoding and decoding, in ns a row of SyscallCall",
        how=f"Median (middle half) of {_ROUNDS} rounds, CPU time of one thread; batches of "
        f"{_COUNTS[0]} and of {_COUNTS[1]} rows.",
        columns=("", *(f"{count} rows" for count in _COUNTS), "of coral's"),
        rows=rows,
        aims=[
            Aim(f"coral, write, {count} rows", of[_OURS, count].median, _MOST_NS, " ns a row")
            for count in _COUNTS
        ],
        samples={f"{name}, {count} rows, ns": values for (name, count), values in samples.items()},
    )


def _ways() -> list[Way]:
    columns = _columns_message()

    def of_messages(records: NDArray[Any]) -> Callable[[], object]:
        def run() -> bytes:
            batch = pb.EbpfEventBatch()
            for values in records[list(_NAMES)].tolist():
                batch.syscall_calls.add(**dict(zip(_NAMES, values, strict=True)))
            return batch.SerializeToString()

        return run

    def of_columns(records: NDArray[Any]) -> Callable[[], object]:
        def run() -> bytes:
            lists = {name: records[name].tolist() for name in _NAMES}
            return columns(**lists).SerializeToString()

        return run

    def of_frame(records: NDArray[Any]) -> Callable[[], object]:
        return lambda: _frame(records)

    def of_wire(read: Callable[[bytes], object]) -> Callable[[NDArray[Any]], Callable[[], object]]:
        def prepare(records: NDArray[Any]) -> Callable[[], object]:
            wire = _frame(records).wire()
            return lambda: read(wire)

        return prepare

    def to_columns(wire: bytes) -> object:
        rows = pb.EbpfEventBatch.FromString(wire).syscall_calls
        return [[getattr(row, name) for row in rows] for name in _NAMES]

    return [
        Way(_MESSAGES, of_messages),
        Way("write: packed columns from lists", of_columns),
        Way("write: coral, the whole message", of_frame),
        Way(_OURS, lambda records: lambda: _LAYOUT.encode(records)),
        Way("read: protobuf, every field of every row", of_wire(to_columns)),
        Way("read: protobuf, parsed only", of_wire(pb.EbpfEventBatch.FromString)),
        Way("read: coral's client, to numpy", of_wire(Read.parse)),
    ]


def _frame(records: NDArray[Any]) -> Frame:
    rows = EventRows(pb.SyscallCall, records, ("getppid", "calls"))
    return Frame(_HEADER, 1, len(records), 1, 2, rows)


def _records(count: int) -> NDArray[Any]:
    """Rows such as a drain gives them: aligned, without tags, of a C structure's size."""
    formats = [_LAYOUT.dtype[name] for name in _NAMES]
    records = np.zeros(count, np.dtype({"names": _NAMES, "formats": formats}, align=True))
    records["ended_ns"] = time.time_ns() + np.arange(count) * 700
    records["duration_ns"] = 200 + np.arange(count) % 97
    records["return_value"] = 4711
    records["pid"] = records["tid"] = 12345
    records["syscall_number"] = 110
    records["comm"] = 1
    return records


def _check(records: NDArray[Any]) -> None:
    """What is written is what any protobuf library reads."""
    row = pb.EbpfEventBatch.FromString(_frame(records).wire()).syscall_calls[-1]
    assert all(getattr(row, name) == records[name][-1] for name in _NAMES)


def _ns_a_row(run: Callable[[], object], count: int) -> float:
    times_over = max(1, _ROWS_A_ROUND // count)
    began_ns = time.thread_time_ns()
    for _ in range(times_over):
        run()
    return (time.thread_time_ns() - began_ns) / times_over / count


def _columns_message() -> Callable[..., Message]:
    """A message with a packed repeated field for each of a row's."""
    file = descriptor_pb2.FileDescriptorProto(
        name="benchmarks/columns.proto", package="benchmarks", syntax="proto3"
    )
    message = file.message_type.add(name="Columns")
    for field in pb.SyscallCall.DESCRIPTOR.fields:
        message.field.add(
            name=field.name,
            number=field.number,
            type=field.type,
            label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
        )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("benchmarks.Columns"))
