"""The containers that rows are of, from the table of a batch to the client: in columns, rows and
single events, filtered, split, and for clients that know nothing of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from numpy.typing import NDArray

from coral.agent.streams import Channel, Filter, Header, Terms
from coral.agent.streams.rows import take
from coral.client import Batch as Received
from coral.collectors.contract import Batch, EventRows, Summaries
from coral.collectors.members import Members
from coral.collectors.resources import EndedGroups, EventResources, ResourceTable
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.rows import row_layout

COMMON = {"k8s.namespace.name": "shop"}
NAMES = ("web-1", "web-2", "db-1")
HEADER = Header("c-1", pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, "agent", "shop")
BATCH = pb.EbpfEventBatch.DESCRIPTOR


class Live:
    """The cgroups of a target, with the attributes of its containers by group."""

    def __init__(self, known: Mapping[int, Mapping[str, str]]) -> None:
        self.known = known

    def attributes_of(self, group: int) -> Mapping[str, str]:
        return self.known.get(group, {})


def table(known: Mapping[int, Mapping[str, str]]) -> ResourceTable:
    live: Any = Live(known)
    return ResourceTable(live, COMMON)


def resources(*names: str) -> tuple[pb.Resource, ...]:
    return tuple(pb.Resource(attributes={"k8s.pod.name": name}) for name in names)


def _messages(columns: Mapping[str, NDArray[Any]], strings: Any) -> list[pb.SyscallStats]:
    return [
        pb.SyscallStats(syscall_name=strings[0], call_count=count)
        for count in columns["call_count"].tolist()
    ]


def figures(*of: int) -> Batch:
    """A row for each of OF, numbers of resources; row i has i + 1 calls."""
    columns: dict[str, NDArray[Any]] = {
        "syscall": np.zeros(len(of), np.uint32),
        "call_count": np.arange(1, len(of) + 1),
        "resource": np.array(of, np.uint32),
    }
    rows = Summaries(
        pb.SyscallStatsColumns, columns, ("read",), _messages, len(of), resources=resources(*NAMES)
    )
    return Batch(rows, 1, 2, attributes=COMMON)


def calls(*of: int) -> Batch:
    """A call for each of OF; call i has the thread i + 1."""
    records = np.zeros(len(of), row_layout(BATCH, "syscall_calls", of_pods=True).dtype)
    records["tid"], records["resource"] = np.arange(1, len(of) + 1), of
    rows = EventRows(pb.SyscallCall, records, ("",), resources=resources(*NAMES))
    return Batch(rows, 1, 2, attributes=COMMON)


def received(batch: Batch, *, columns: bool = False, **terms: Any) -> Received:
    """What a subscriber gets of BATCH."""
    channel = Channel(HEADER, 1 << 20)
    reader = channel.subscribe(Terms(**terms))
    channel.publish(batch)
    frame = reader.take()
    assert frame
    return Received.parse(frame.wire(columns=columns))


def pods(batch: Received) -> list[str]:
    """The pod of each row."""
    told = [batch.resources[at] for at in batch.row_resources.tolist()]
    assert all(each["k8s.namespace.name"] == "shop" for each in told)
    return [each.get("k8s.pod.name", "") for each in told]


def test_a_table_has_each_container_once_with_what_is_beyond_the_common_attributes() -> None:
    one, two = {**COMMON, "k8s.pod.name": "a"}, {"k8s.namespace.name": "bank"}
    made = table({7: one, 8: two, 9: COMMON})
    assert made.indices(np.array([7, 0, 8, 7, 5, 9])).tolist() == [1, 0, 2, 1, 0, 0]
    assert [dict(each.attributes) for each in made.resources] == [{"k8s.pod.name": "a"}, two]


@pytest.mark.parametrize("make", [figures, calls])
def test_a_pod_that_has_gone_gets_no_names_of_the_one_that_runs(make: Any) -> None:
    common = {**COMMON, "k8s.pod.name": "web-2", "k8s.deployment.name": "web"}
    gone = {**COMMON, "k8s.pod.name": "bare"}
    live: Any = Live({7: gone, 8: common})
    table = ResourceTable(live, common)
    batch = make(*table.indices(np.array([7, 8])).tolist())
    rows = replace(batch.rows, resources=table.resources)
    batch = replace(batch, rows=rows, attributes=common)
    got = received(batch)
    assert [got.resources[at] for at in got.row_resources.tolist()] == [gone, common]
    channel = Channel(HEADER, 1 << 20)
    reader = channel.subscribe()
    channel.publish(batch)
    frame = reader.take()
    assert frame
    events = [pb.EbpfEvent.FromString(wire) for wire in frame.events()]
    assert [dict(event.attributes) for event in events] == [gone, common]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("make", [figures, calls])
def test_a_subscriber_learns_of_each_row_which_pod_it_is_of(make: Any, columns: bool) -> None:
    got = received(make(2, 0, 3, 2), columns=columns)
    assert pods(got) == ["web-2", "", "db-1", "web-2"]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("make", [figures, calls])
def test_a_filter_of_pods_leaves_their_rows_and_resources_alone(make: Any, columns: bool) -> None:
    wanted = Filter(pods=frozenset({"db-1", "web-9"}))
    got = received(make(2, 0, 3, 2, 3), columns=columns, wanted=wanted)
    assert pods(got) == ["db-1", "db-1"]
    assert [dict(each.attributes) for each in got.message.resources] == [{"k8s.pod.name": "db-1"}]


def test_a_filter_of_pods_counts_what_all_rows_have_in_common() -> None:
    batch = Batch(figures(0, 0).rows, 1, 2, attributes={"k8s.pod.name": "web-1"})
    for name, count in (("web-1", 2), ("web-2", 0)):
        mask = Filter(pods=frozenset({name})).mask(batch.rows, batch.attributes)
        assert mask.sum() == count


@pytest.mark.parametrize("make", [figures, calls])
def test_a_part_of_the_rows_has_their_resources_alone(make: Any) -> None:
    rows = take(make(3, 1, 0, 1, 2).rows, np.array([1, 2, 3]))
    values = rows.records if isinstance(rows, EventRows) else rows.columns
    assert values["resource"].tolist() == [1, 0, 1]
    assert [each.attributes["k8s.pod.name"] for each in rows.resources] == ["web-1"]


def test_summaries_as_rows_name_their_pod_in_the_labels() -> None:
    rows = received(figures(2, 0)).message.syscall_stats
    assert [(row.resource, dict(row.labels)) for row in rows] == [
        (2, {"k8s.pod.name": "web-2"}), (0, {})
    ]  # fmt: skip


@pytest.mark.parametrize("make", [figures, calls])
def test_events_one_by_one_have_all_attributes_of_their_row(make: Any) -> None:
    channel = Channel(HEADER, 1 << 20)
    reader = channel.subscribe()
    channel.publish(make(2, 0))
    frame = reader.take()
    assert frame
    events = [pb.EbpfEvent.FromString(wire) for wire in frame.events()]
    assert [dict(event.attributes) for event in events] == [
        {**COMMON, "k8s.pod.name": "web-2"}, COMMON
    ]  # fmt: skip
    for event in events:
        assert not getattr(event, event.WhichOneof("payload") or "").resource


def test_rows_without_pods_are_on_the_wire_as_before() -> None:
    bare, full = (row_layout(BATCH, "syscall_calls", of_pods=pods) for pods in (False, True))
    assert "resource" not in (bare.dtype.names or ())
    assert full.dtype.itemsize == bare.dtype.itemsize + 5
    rows = EventRows(pb.SyscallCall, np.zeros(3, bare.dtype), ("",))
    got = received(Batch(rows, 1, 2))
    assert got.events.dtype == bare.dtype
    assert got.row_resources.tolist() == [0, 0, 0]
    assert got.resources == ({},)


def test_a_client_of_the_contract_before_reads_all_but_the_pods() -> None:
    file = descriptor_pb2.FileDescriptorProto()
    BATCH.file.CopyToProto(file)
    file.name, file.package = "before.proto", "before"
    for message in file.message_type:
        kept = [field for field in message.field if field.name not in ("resource", "resources")]
        for field in kept:
            _rename(field)
        for nested in message.nested_type:
            for field in nested.field:
                _rename(field)
        del message.field[:]
        message.field.extend(kept)
    del file.service[:]
    file.dependency.remove("coral/mesh/v1/options.proto")
    _without_options(file)
    pool = descriptor_pool.DescriptorPool()
    for imported in ("google/protobuf/duration.proto", "google/protobuf/timestamp.proto"):
        known = descriptor_pool.Default().FindFileByName(imported)
        copy = descriptor_pb2.FileDescriptorProto()
        known.CopyToProto(copy)
        pool.Add(copy)
    pool.Add(file)
    before: Any = message_factory.GetMessageClass(
        pool.FindMessageTypeByName("before.EbpfEventBatch")
    )
    channel = Channel(HEADER, 1 << 20)
    reader = channel.subscribe()
    channel.publish(calls(2, 0, 3))
    channel.publish(figures(1, 2))
    single, summed = (frame.wire() for frame in iter(reader.take, None))
    assert [row.tid for row in before.FromString(single).syscall_calls] == [1, 2, 3]
    read = before.FromString(summed)
    assert [row.call_count for row in read.syscall_stats] == [1, 2]
    assert dict(read.attributes) == COMMON


def _rename(field: descriptor_pb2.FieldDescriptorProto) -> None:
    if field.type_name:
        field.type_name = field.type_name.replace(".coral.mesh.v1.", ".before.")


def _without_options(file: descriptor_pb2.FileDescriptorProto) -> None:
    for message in file.message_type:
        for field in message.field:
            field.ClearField("options")


def test_the_group_of_a_process_outlives_it() -> None:
    def members(*known: tuple[int, int]) -> Members:
        keys = np.array([key for key, _ in known], np.uint64)
        comms = np.array([b"shop"] * len(known), "S16")
        return Members(keys, comms, np.array([group for _, group in known], np.uint32))

    ended = EndedGroups()
    tgids, born = np.array([7, 9, 11]), np.array([3, 5, 1])
    first = members((7, 70), (5 << 32 | 9, 90))
    ended.note(first)
    assert ended.groups_of(first, tgids, born).tolist() == [70, 90, 0]
    assert ended.groups_of(members((7, 71)), tgids, born).tolist() == [71, 90, 0]
    assert ended.groups_of(members(), tgids, born).tolist() == [0, 90, 0]


def test_a_process_that_has_ended_is_not_of_the_container_that_has_its_id_now() -> None:
    def member(key: int, group: int) -> Members:
        values = np.array([b"shop"]), np.array([group], np.uint32)
        return Members(np.array([key], np.uint64), *values)

    ended, of = EndedGroups(), (np.array([9, 9]), np.array([5, 6]))
    last, now = member(5 << 32 | 9, 90), member(9, 91)
    ended.note(last)
    assert ended.groups_of(now, *of).tolist() == [90, 91]
    assert ended.groups_of(last | now, *of).tolist() == [90, 91]


def test_single_events_are_of_the_group_that_records_tell() -> None:
    changes = np.array([(7, 3, 30), (9, 5, 50)], [("tgid", "u4"), ("born", "u4"), ("group", "u4")])

    class Targets:
        def resource_table(self) -> ResourceTable:
            return table({30: {"k8s.pod.name": "a"}, 50: {"k8s.pod.name": "b"}})

        def group_of(self, process: int) -> int:
            return 50 if process == (1 << 32 | 4) else 0

    targets: Any = Targets()
    events = EventResources(targets)
    events.begin(changes)
    pids, born = np.array([9, 7, 4, 8, 9]), np.array([5, 3, 1, 1, 5])
    assert events.of_processes(pids, born).tolist() == [2, 1, 2, 0, 2]
    events.begin(changes[:0])
    assert events.of_processes(pids[:1], born[:1]).tolist() == [1]
    assert [each.attributes["k8s.pod.name"] for each in events.resources] == ["b"]
