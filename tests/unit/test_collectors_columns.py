"""Columns and rows of summaries say the same, for each type of row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from coral.collectors.contract import Summaries
from coral.collectors.syscall_stats import errno_class
from coral.collectors.tcp_metrics.connections import NAMES
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.columns import columns_layout
from tests.summaries import Make, connections, peers, requests, syscalls

tops = st.integers(0, 6)
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(0, 12)
every_type = pytest.mark.parametrize("make", [syscalls, connections, peers, requests])
few = settings(max_examples=25)


def columns_of(rows: Sequence[Any], summaries: Summaries) -> dict[str, NDArray[Any]]:
    """The columns that say what ROWS say, made row by row by the words of the contract alone, with
    the strings and the lists that are per batch of SUMMARIES."""
    layout = columns_layout(summaries.message.DESCRIPTOR).columns
    made = {}
    for name, column in layout.items():
        given = summaries.columns.get(name)
        if given is None:
            continue  # the resource, which only sessions have that watch pods
        if column.per_batch:
            made[name] = given
            continue
        width = given.shape[1:]
        values = [
            _value_of_requests(row, name)
            if isinstance(row, pb.HttpLatencyHistogram)
            else _value(row, name, summaries, *width)
            for row in rows
        ]
        if column.string_index:
            values = [summaries.strings.index(value) for value in values]
        made[name] = np.array(values, column.dtype).reshape(len(rows), *width)
    return made


def _value(row: Any, name: str, summaries: Summaries, width: int = 0) -> Any:
    """What a row has in the column NAME, where that is not a field of the same name."""
    if name in _COUNTED_BY:
        named = _COUNTED_BY[name]
        names = (
            [summaries.strings[at] for at in summaries.columns[named].tolist()] if named else ENDS
        )
        return [getattr(row, name).get(each, 0) for each in names]
    if name in ("delta", "total"):
        return [getattr(getattr(row, name), each) for each in NAMES]
    if name.endswith("_sum"):
        return getattr(row, name.removesuffix("_sum")).sum
    if isinstance(row, pb.SyscallStats) and name in ("syscall", "comm"):
        return row.syscall_name if name == "syscall" else row.labels.get("comm", "")
    value = getattr(row, name)
    if isinstance(value, pb.Log2Histogram | pb.BucketHistogram):
        return [*value.counts, *[0] * (width - len(value.counts))]
    return value


def _value_of_requests(row: pb.HttpLatencyHistogram, name: str) -> Any:
    if name == "outcomes":
        complete = row.count - sum(row.outcomes.values())
        named = {"complete": complete, **row.outcomes}
        return [named.get(each, 0) for each in OUTCOMES]
    if name.endswith("_ns"):
        return round(getattr(row, name.removesuffix("_ns")) * 1e6)
    return getattr(row, name)


# Columns that count by name, and the column that has the names.
_COUNTED_BY = {"errors_by_class": "error_classes", "failures": "failure_names", "ends": ""}
ENDS = [end.name.removeprefix("TCP_END_").lower() for end in pb.TcpEnd.DESCRIPTOR.values]

OUTCOMES = [
    it.name.removeprefix("HTTP_OUTCOME_").lower() for it in pb.HttpOutcome.DESCRIPTOR.values
]


@every_type
@few
@given(seed=seeds, count=counts, top=tops)
def test_rows_and_columns_say_the_same(make: Make, seed: int, count: int, top: int) -> None:
    summaries = make(seed, count, top)
    rows = summaries.as_messages()
    assert len(rows) == len(summaries)
    again = columns_of(rows, summaries)
    assert again.keys() == summaries.columns.keys()
    for name, values in again.items():
        np.testing.assert_array_equal(values, summaries.columns[name], name)
    assert summaries.messages(again, summaries.strings) == rows


@every_type
@few
@given(seed=seeds, count=counts, top=tops)
def test_rows_are_the_same_after_the_wire(make: Make, seed: int, count: int, top: int) -> None:
    summaries = make(seed, count, top)
    layout = columns_layout(summaries.message.DESCRIPTOR)
    sent = layout.encode(summaries.columns)
    parsed = summaries.message.FromString(sent)
    for name, values in summaries.columns.items():
        assert list(getattr(parsed, name)) in (values.reshape(-1).tolist(), []), name
    received = layout.decode(sent, len(summaries))
    assert summaries.messages(received, summaries.strings) == summaries.as_messages()


@every_type
@few
@given(seed=seeds, count=counts, keep=st.lists(st.booleans(), min_size=12, max_size=12))
def test_a_part_of_the_rows_is_that_part(
    make: Make, seed: int, count: int, keep: list[bool]
) -> None:
    summaries = make(seed, count, 0)
    rows, mask = summaries.as_messages(), np.array(keep[: len(summaries)], bool)
    part = summaries.take(mask)
    assert part.as_messages() == [row for row, kept in zip(rows, keep, strict=False) if kept]
    assert len(part) == mask.sum()
    order = np.arange(len(summaries))[::-1]
    assert summaries.take(order).as_messages() == rows[::-1]


@pytest.mark.parametrize("make", [syscalls, connections, peers])
@few
@given(seed=seeds, count=counts, top=st.integers(1, 6))
def test_top_sends_that_many_rows_and_other(make: Make, seed: int, count: int, top: int) -> None:
    everything, some = make(seed, count, 0).as_messages(), make(seed, count, top).as_messages()
    if len(everything) <= top:
        assert some == everything
        return
    assert some[:top] == everything[:top]
    assert len(some) == top + 1
    other: Any = some[top]
    rest: Sequence[Any] = everything[top:]
    if isinstance(other, pb.SyscallStats):
        assert (other.syscall_name, other.pid, len(other.labels)) == ("other", 0, 0)
        for name in ("call_count", "error_count", "total_duration_ns"):
            assert getattr(other, name) == sum(getattr(row, name) for row in rest)
        assert other.max_duration_ns == max(row.max_duration_ns for row in rest)
        return
    assert other.remote_address == "other"
    for name in NAMES:
        assert getattr(other.delta, name) == sum(getattr(row.delta, name) for row in rest)
    assert other.rtt_us_delta.sum == sum(row.rtt_us_delta.sum for row in rest)
    if isinstance(other, pb.TcpMetrics):
        assert not other.HasField("total")
        assert other.connections == len(rest)
        assert other.opened == sum(row.opened for row in rest)
        assert other.established == sum(row.established for row in rest)
    else:
        for name in ("opened", "closed", "failed", "open", "established"):
            name = f"connections_{name}"  # noqa: PLW2901
            assert getattr(other, name) == sum(getattr(row, name) for row in rest)
        assert sum(other.ends.values()) == other.connections_closed
        assert sum(other.failures.values()) == other.connections_failed


def test_error_classes_are_named_in_every_batch() -> None:
    summaries = syscalls(1, 3, 0)
    named = [summaries.strings[at] for at in summaries.columns["error_classes"].tolist()]
    assert tuple(named) == errno_class.NAMES
