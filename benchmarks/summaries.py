"""What summaries cost as rows and as columns, on the agent's side and on the client's, beside what
plain protobuf takes for the same.

The rows are a collector's own, drained from a program that fills it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

import numpy as np

from benchmarks import many
from benchmarks.bench import Bench
from benchmarks.report import Aim, Report, Samples, times
from coral.agent.streams import Channel, Frame
from coral.client import Batch as Read
from coral.collectors.contract import Batch, Summaries
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import field_of

_COUNTS: Final = (64, 512, many.ROWS)
ROUNDS: Final = 5
_ROWS_A_ROUND: Final = 10_240
_WRITE_ROWS: Final = "write: coral, as rows"
_WRITE_COLUMNS: Final = "write: coral, as columns"
_READ_ROWS: Final = "read: coral's client, rows, every field"
_READ_COLUMNS: Final = "read: coral's client, columns to numpy"
_MOST_READ_NS: Final = 50.0

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """Rows of one type, as the agent has them and as they arrive."""

    rows: Summaries

    def batch(self) -> Batch:
        """The rows as a collector emits them."""
        return Batch(self.rows, 1, 2)

    def frames(self) -> Sequence[Frame]:
        """The messages that they are sent in."""
        channel = Channel(many.header_of(self.rows), 1 << 30)
        channel.publish(self.batch())
        return list(channel.kept)

    def wires(self, *, columns: bool) -> list[bytes]:
        """The same, encoded."""
        return [frame.wire(columns=columns) for frame in self.frames()]


async def measure(bench: Bench) -> Report:
    """The section: every way, of every type and number of rows, ROUNDS times."""
    samples: dict[tuple[str, str, int], list[float]] = {}
    for name, workload in many.WORKLOADS.items():
        with workload(bench) as program:
            (drained,) = program.fill()
        for count in _COUNTS:
            case = Case(drained.take(np.arange(count)))
            _check(case)
            ways = {way: prepare(case) for way, prepare in _WAYS.items()}
            for _ in range(ROUNDS):
                for way, run in ways.items():
                    samples.setdefault((way, name, count), []).append(_ns_a_row(run, count))
        bench.say(f"{name}: {ROUNDS} rounds of {len(_WAYS)} ways")
    return _report({key: Samples(values) for key, values in samples.items()})


def _report(of: dict[tuple[str, str, int], Samples]) -> Report:
    cases = [(name, count) for name in many.WORKLOADS for count in _COUNTS]
    largest = many.ROWS
    rows = []
    for way in _WAYS:
        reference = _WRITE_COLUMNS if way.startswith("write") else _READ_COLUMNS
        cells = [of[way, name, count].show(0) for name, count in cases]
        ratios = [
            times(of[way, name, largest].median, of[reference, name, largest].median)
            for name in many.WORKLOADS
        ]
        rows.append((way, *cells, *ratios))
    return Report(
        title="Summaries as rows and as columns, in ns a row",
        how=f"Median (middle half) of {ROUNDS} rounds, CPU time of one thread. A message has at "
        f"most 512 rows, so {many.ROWS:,} rows are at least 20 of them.",
        columns=(
            "",
            *(f"{name}, {count:,} rows" for name, count in cases),
            *(f"{name}: of columns'" for name in many.WORKLOADS),
        ),
        rows=rows,
        aims=[
            Aim(
                f"{name}, {count:,} rows, {_READ_COLUMNS}",
                of[_READ_COLUMNS, name, count].median,
                _MOST_READ_NS,
                " ns a row",
            )
            for name, count in cases
            if count > min(_COUNTS)
        ],
        samples={
            f"{way}, {name}, {count} rows, ns": values.values
            for (way, name, count), values in of.items()
        },
    )


def _publish(case: Case) -> Run:
    def run() -> None:
        Channel(many.header_of(case.rows), 1 << 30).publish(case.batch())

    return run


def _write(*, columns: bool) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        frames = case.frames()
        for frame in frames:
            frame.stop_sharing()  # or only the first round would encode

        def run() -> None:
            for frame in frames:
                frame.wire(columns=columns)

        return run

    return prepare


def _write_by_protobuf(case: Case) -> Run:
    """The message of columns, filled from lists as protobuf's API needs them."""
    message: Any = case.rows.message
    parts = [frame.rows for frame in case.frames()]

    def run() -> None:
        for part in parts:
            assert isinstance(part, Summaries)
            lists = {name: values.ravel().tolist() for name, values in part.columns.items()}
            message(**lists).SerializeToString()

    return run


def _read(*, columns: bool, every_field: bool = False) -> Callable[[Case], Run]:
    def prepare(case: Case) -> Run:
        wires = case.wires(columns=columns)
        read_fields = _reader_of_fields(case.rows)

        def run() -> None:
            for wire in wires:
                batch = Read.parse(wire)
                if every_field:
                    for row in getattr(batch.message, batch.rows):
                        read_fields(row)

        return run

    return prepare


def _read_by_protobuf(case: Case) -> Run:
    """The columns through protobuf's own parser, and from there to numpy."""
    wires = case.wires(columns=True)
    field = field_of(case.rows.message.DESCRIPTOR).name
    names = list(case.rows.columns)

    def run() -> None:
        for wire in wires:
            columns = getattr(pb.EbpfEventBatch.FromString(wire), field)
            for name in names:
                np.array(getattr(columns, name))

    return run


_WAYS: Final[dict[str, Callable[[Case], Run]]] = {
    "agent: number and split (`Channel.publish`)": _publish,
    _WRITE_ROWS: _write(columns=False),
    "write: protobuf, columns from lists": _write_by_protobuf,
    _WRITE_COLUMNS: _write(columns=True),
    "read: coral's client, rows, parsed only": _read(columns=False),
    _READ_ROWS: _read(columns=False, every_field=True),
    "read: protobuf, columns to numpy": _read_by_protobuf,
    _READ_COLUMNS: _read(columns=True),
}


def _reader_of_fields(rows: Summaries) -> Callable[[Any], object]:
    """A function that reads every field of a row's message, into numbers, strings and lists."""
    row_field = field_of(rows.message.DESCRIPTOR).same_as
    row: Any = pb.EbpfEventBatch.DESCRIPTOR.fields_by_name[row_field].message_type
    single = attrgetter(*_paths(row, repeated=False))
    repeated = attrgetter(*_paths(row, repeated=True))
    return lambda message: (single(message), [list(values) for values in repeated(message)])


def _paths(
    message: Any,
    *,
    repeated: bool,
) -> Iterator[str]:
    """The fields of a descriptor MESSAGE and of the messages in it, with dots between the names."""
    for field in message.fields:
        if field.is_repeated:
            if repeated:
                yield field.name
        elif field.message_type:
            for path in _paths(field.message_type, repeated=repeated):
                yield f"{field.name}.{path}"
        elif not repeated:
            yield field.name


def _check(case: Case) -> None:
    """Rows and columns, as the client reads them, say the same."""
    for wire, other in zip(case.wires(columns=False), case.wires(columns=True), strict=True):
        as_rows, as_columns = Read.parse(wire), Read.parse(other)
        rows = getattr(as_rows.message, as_rows.rows)
        assert as_rows.rows == as_columns.rows
        assert [row.pid for row in rows] == as_columns.columns["pid"].tolist()


def _ns_a_row(run: Run, count: int) -> float:
    times_over = max(1, _ROWS_A_ROUND // count)
    began_ns = time.thread_time_ns()
    for _ in range(times_over):
        run()
    return (time.thread_time_ns() - began_ns) / times_over / count
