"""Reading a batch: whatever protobuf library wrote the bytes, and in whatever order, the rows and
the rest come out as protobuf's own parser has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from coral.client import Batch, ContractError, EndReason
from coral.client.split import _run
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.columns import columns_layout
from coral.wire.encoding import WIRE_BYTES, varint
from coral.wire.rows import RowLayout, row_layout

BATCH = pb.EbpfEventBatch.DESCRIPTOR
CALLS, CHANGES = "syscall_calls", "tcp_state_changes"
KINDS = {
    CALLS: pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
    CHANGES: pb.EBPF_COLLECTOR_KIND_TCP_METRICS,
}
UNKNOWN = varint(9_999 << 3 | WIRE_BYTES) + b"\x03new"


def head(kind: int, count: int) -> list[bytes]:
    """The fields of a batch that are not rows, each encoded by itself."""
    whole = pb.EbpfEventBatch(
        collector_id="c-1", kind=kind, first_seq=5, last_seq=4 + count, count=count,  # type: ignore[arg-type]
        strings=["read", "shop"], produced=99, interval_end_ns=7,
        losses=[pb.Loss(stage=pb.Loss.STAGE_RATE_LIMIT, count=3)],
        account=pb.StreamAccount(filtered=4),
    )  # fmt: skip
    return [_only(whole, field.name).SerializeToString() for field, _ in whole.ListFields()]


def _only(message: Message, name: str) -> Message:
    alone = type(message)()
    alone.MergeFrom(message)
    for field, _ in message.ListFields():
        if field.name != name:
            alone.ClearField(field.name)
    return alone


def records(layout: RowLayout, count: int) -> np.ndarray[Any, Any]:
    """Rows of which every value is another, and not 0."""
    made = np.zeros(count, layout.dtype)
    for column, name in enumerate(layout.dtype.names or ()):
        made[name] = np.arange(count) * 100 + column + 1
    return made


def foreign(field: str, row: Sequence[int], *, backwards: bool, extra: bytes) -> bytes:
    """A row as another library may write it: without zeros, its fields in any order."""
    message: Any = BATCH.fields_by_name[field].message_type
    names = [f.name for f in sorted(message.fields, key=lambda f: f.number)]
    made = getattr(pb, message.name)(**dict(zip(names, row, strict=False)))
    parts = [_only(made, f.name).SerializeToString() for f, _ in made.ListFields()]
    body = b"".join(reversed(parts) if backwards else parts) + extra
    return varint(BATCH.fields_by_name[field].number << 3 | WIRE_BYTES) + varint(len(body)) + body


def assert_as_parsed(wire: bytes, field: str) -> Batch:
    """The client's reading is that of protobuf's parser."""
    expected = pb.EbpfEventBatch.FromString(wire)
    rows = getattr(expected, field)
    got = Batch.parse(wire)
    names = got.events.dtype.names or ()
    assert [row.resource for row in rows] == got.row_resources.tolist()
    assert got.events.tolist() == [tuple(getattr(r, name) for name in names) for r in rows]
    assert got.rows == (field if rows else "")
    expected.ClearField(field)
    assert got.message == expected
    return got


@given(
    field=st.sampled_from([CALLS, CHANGES]),
    runs=st.lists(st.integers(1, 5), max_size=4),
    of_pods=st.booleans(),
    order=st.randoms(use_true_random=False),
    strangers=st.integers(0, 2),
)
def test_rows_are_found_wherever_they_stand(
    field: str, runs: list[int], of_pods: bool, order: Any, strangers: int
) -> None:
    layout = row_layout(BATCH, field, of_pods=of_pods)
    rows = records(layout, sum(runs))
    ends = np.cumsum(runs)
    encoded = [layout.encode(part) for part in np.split(rows, ends[:-1])] if runs else []
    pieces = head(KINDS[field], len(rows)) + encoded + [UNKNOWN] * strangers
    order.shuffle(pieces)
    assert_as_parsed(b"".join(pieces), field)


@given(
    field=st.sampled_from([CALLS, CHANGES]),
    shapes=st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=6),
    of_pods=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_rows_of_another_library_come_out_the_same(
    field: str, shapes: list[tuple[bool, bool, bool]], of_pods: bool, order: Any
) -> None:
    layout = row_layout(BATCH, field, of_pods=of_pods)
    rows = records(layout, len(shapes))
    pieces = head(KINDS[field], len(rows))
    for row, (zeros, backwards, unknown) in zip(rows, shapes, strict=True):
        values = [0 if zeros and n % 2 else value for n, value in enumerate(row.tolist())]
        extra = UNKNOWN if unknown else b""
        pieces.append(foreign(field, values, backwards=backwards, extra=extra))
    pieces.append(b"")
    order.shuffle(pieces)
    assert_as_parsed(b"".join(pieces), field)


def test_rows_together_are_a_view_of_the_bytes() -> None:
    layout = row_layout(BATCH, CALLS)
    wire = b"".join(head(KINDS[CALLS], 3)) + layout.encode(records(layout, 3))
    got = Batch.parse(wire)
    assert np.shares_memory(got.events, np.frombuffer(wire, np.uint8))
    assert not got.events.flags.writeable
    assert got.strings[got.events["syscall"] % 2].tolist() == ["shop"] * 3


def test_rows_of_128_bytes_and_more_are_found() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="long.proto", package="long", syntax="proto3")
    row = file.message_type.add(name="Row")
    fixed64 = descriptor_pb2.FieldDescriptorProto.TYPE_FIXED64
    for number in range(1, 21):
        row.field.add(name=f"f{number}", number=number, type=fixed64, label=1)
    batch = file.message_type.add(name="Batch")
    batch.field.add(name="rows", number=100, type=11, label=3, type_name=".long.Row")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    layout = row_layout(pool.FindMessageTypeByName("long.Batch"), "rows")
    assert layout.dtype.itemsize == 2 + 2 + 15 * 9 + 5 * 10
    rows = records(layout, 4)
    found = _run(layout, b"head" + layout.encode(rows) + b"\x08\x01", 4)
    assert found.tolist() == rows.tolist()


def test_a_batch_without_rows_has_an_empty_array_with_the_fields_of_its_kind() -> None:
    got = Batch.parse(b"".join(head(KINDS[CALLS], 0)))
    assert (len(got.events), got.rows, dict(got.columns)) == (0, "", {})
    assert got.events["ended_ns"].tolist() == []
    assert got.lost == {"rate_limit": 3}
    assert len(Batch.parse(b"").events) == 0


@pytest.mark.parametrize("form", ["events", "summaries"])
def test_a_batch_whose_count_is_wrong_is_refused(form: str) -> None:
    layout = row_layout(BATCH, CALLS)
    rows = layout.encode(records(layout, 2))
    if form == "summaries":
        rows = pb.EbpfEventBatch(syscall_stats=[pb.SyscallStats()] * 2).SerializeToString()
    wire = b"".join(head(KINDS[CALLS], 3)) + rows
    with pytest.raises(ContractError, match="events 5 to 7 has 2 rows, and says that it has 3"):
        Batch.parse(wire)


def test_bytes_that_are_no_batch_are_refused() -> None:
    with pytest.raises(ContractError, match="bytes that are no batch"):
        Batch.parse(b"\xff\xff\xff")
    with pytest.raises(ContractError, match="bytes that are no batch"):
        Batch.parse(varint(101 << 3 | WIRE_BYTES) + b"\x7f")


@pytest.mark.parametrize("foreign_first", [False, True])
def test_columns_are_arrays_by_name(foreign_first: bool) -> None:
    layout = columns_layout(pb.SyscallStatsColumns.DESCRIPTOR)
    columns: dict[str, np.ndarray[Any, Any]] = {
        "syscall": np.array([0, 1, 0], np.uint32),
        "call_count": np.array([10, 20, 30], np.uint64),
        "errors_by_class": np.array([[1, 0], [0, 2], [3, 0]], np.uint64),
        "error_classes": np.array([2, 3], np.uint32),
    }
    body = layout.encode(columns)
    number = pb.EbpfEventBatch.SYSCALL_STATS_COLUMNS_FIELD_NUMBER
    piece = varint(number << 3 | WIRE_BYTES) + varint(len(body)) + body
    pieces = head(KINDS[CALLS], 3)
    pieces.insert(0 if foreign_first else len(pieces), piece)
    got = Batch.parse(b"".join(pieces))
    assert got.rows == "syscall_stats"
    assert len(got.events) == 0
    assert not got.message.HasField("syscall_stats_columns")
    assert got.message.collector_id == "c-1"
    for name, values in columns.items():
        assert got.columns[name].tolist() == values.tolist(), name
    assert got.columns["pid"].tolist() == [0, 0, 0]
    assert got.columns["latency_ns"].shape == (3, 0)
    assert got.strings[got.columns["syscall"]].tolist() == ["read", "shop", "read"]

    short = b"".join(head(KINDS[CALLS], 4)) + piece
    with pytest.raises(ContractError, match="column syscall has 3 values for 4 rows"):
        Batch.parse(short)


def test_a_kind_without_resources_has_rows_of_none() -> None:
    message = pb.EbpfEventBatch(count=2)
    columns = {"pid": np.array([1, 2], np.uint32)}
    of_columns = Batch(message, np.empty(0, np.dtype([])), columns, "syscall_stats")
    of_events = Batch(message, np.zeros(2, [("pid", "<u4")]), {}, "syscall_calls")
    assert of_columns.row_resources.tolist() == of_events.row_resources.tolist() == [0, 0]


def test_a_count_without_columns_takes_no_memory() -> None:
    body = columns_layout(pb.SyscallStatsColumns.DESCRIPTOR).encode(
        {"error_classes": np.array([1, 0], np.uint32)}
    )
    number = pb.EbpfEventBatch.SYSCALL_STATS_COLUMNS_FIELD_NUMBER
    piece = varint(number << 3 | WIRE_BYTES) + varint(len(body)) + body
    with pytest.raises(ContractError, match="no column has any of 4294967295 rows"):
        Batch.parse(b"".join([piece, *head(KINDS[CALLS], 2**32 - 1)]))


def test_summaries_as_rows_stay_messages() -> None:
    rows = [pb.SyscallStats(syscall_name="read", call_count=n) for n in (1, 2)]
    wire = (
        b"".join(head(KINDS[CALLS], 2)) + pb.EbpfEventBatch(syscall_stats=rows).SerializeToString()
    )
    got = Batch.parse(wire)
    assert list(got.message.syscall_stats) == rows
    assert got.rows == "syscall_stats"
    assert len(got.events) == 0


def test_an_end_of_a_newer_agent_is_still_an_end() -> None:
    wire = (
        b"".join(head(KINDS[CALLS], 0))
        + pb.EbpfEventBatch(
            end=pb.SessionEnd(reason=77, detail="for a new reason")  # type: ignore[arg-type]
        ).SerializeToString()
    )
    batch = Batch.parse(wire)
    end = batch.end
    assert end
    numbers = "first_seq=5, last_seq=4, count=0"
    assert repr(batch) == f"Batch(syscall_stats, {numbers}, rows='', end=unspecified)"
    assert (str(EndReason.TARGET_EXITED), f"{EndReason.STOPPED}") == ("target_exited", "stopped")
    assert (end.reason, end.detail) == (EndReason.UNSPECIFIED, "for a new reason")
