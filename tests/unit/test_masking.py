"""Streams without the other ends of connections: in rows, columns, single events and the replay,
and made once for all that may not see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coral.agent.access.quotas import CallerQuotas
from coral.agent.caller import Allowance
from coral.agent.streams import Channel, Filter, Frame, Header, Subscription, Terms
from coral.agent.streams.masking import REDACTED, masked
from coral.agent.streams.rows import layout_of
from coral.client import Batch as Received
from coral.collectors.contract import Batch, EventRows, Summaries
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.mesh.v1 import options_pb2 as options
from coral.wire.kinds import fields_meaning
from tests.summaries import connections, peers, syscalls

TCP = pb.EBPF_COLLECTOR_KIND_TCP_METRICS
HEADER = Header("id", TCP, "agent", "shop")
SECRET = "203.0.113.77"
HIDDEN = Terms(masked=True)


def channel(replay_bytes: int = 4 << 20) -> Channel:
    return Channel(HEADER, replay_bytes, lambda: 0.0)


def state_changes(count: int) -> EventRows:
    random = np.random.default_rng(count)
    empty = EventRows(pb.TcpStateChange, np.zeros(0), ())
    records: Any = np.zeros(count, layout_of(empty).dtype)
    for name in records.dtype.names:
        records[name] = random.integers(1, 2**31, count)
    records["comm"], records["reason"] = 0, 1
    return EventRows(pb.TcpStateChange, records, ("shop", ""))


def requests(count: int) -> EventRows:
    empty = EventRows(pb.HttpRequest, np.zeros(0), ())
    records: Any = np.zeros(count, layout_of(empty).dtype)
    for name in ("remote_high", "remote_low", "remote_port", "local_low"):
        records[name] = np.arange(1, count + 1)
    strings = ("", "shop", "/items", f"{SECRET}:8080")
    for at, name in enumerate(("query", "comm", "path", "host")):
        records[name] = at
    return EventRows(pb.HttpRequest, records, strings)


def take_all(subscription: Subscription) -> list[Frame]:
    frames = []
    while frame := subscription.take():
        frames.append(frame)
    return frames


def peer_fields(rows: EventRows | Summaries) -> set[str]:
    return {field.name for field in fields_meaning(rows.message.DESCRIPTOR, options.MEANING_PEER)}


@pytest.mark.parametrize("make", [state_changes, requests])
def test_single_events_are_the_same_but_for_the_peer(make: Any) -> None:
    rows = make(100)
    before = rows.records.tobytes()
    hidden = masked(rows)
    assert isinstance(hidden, EventRows)
    assert rows.records.tobytes() == before
    of_peer = peer_fields(rows)
    assert {"remote_high", "remote_low", "remote_port"} <= of_peer
    indices = {"comm", "reason", "path", "query", "host", "route", "trace_id", "parent_span_id"}
    for name in rows.records.dtype.names:
        old, new = rows.records[name], hidden.records[name]
        if name in indices:
            texts = [rows.strings[at] for at in old]
            if name in of_peer:
                texts = [REDACTED if text else "" for text in texts]
            assert [hidden.strings[at] for at in new] == texts
        else:
            assert (new == (0 if name in of_peer else old)).all()
    assert not any(SECRET in text for text in hidden.strings)


@pytest.mark.parametrize("make", [connections, peers])
@pytest.mark.parametrize("top", [0, 3])
def test_summaries_are_the_same_but_for_the_peer(make: Any, top: int) -> None:
    for seed in range(20):
        rows = make(seed, 12, top)
        hidden = masked(rows)
        assert isinstance(hidden, Summaries)
        for one, other in zip(rows.as_messages(), hidden.as_messages(), strict=True):
            if one.remote_address not in ("", "other"):
                one.remote_address = REDACTED
            if hasattr(one, "remote_port"):
                one.remote_port = 0
            assert one == other
        addresses = {row.remote_address for row in rows.as_messages()} - {"", "other"}
        own = {getattr(row, "local_address", "") for row in rows.as_messages()}
        assert not (addresses - own) & set(hidden.strings)


def test_rows_without_a_peer_are_left_as_they_are() -> None:
    rows = syscalls(1, 8, 0)
    assert masked(rows) is rows
    stream = channel()
    one, other = stream.subscribe(), stream.subscribe(HIDDEN)
    stream.publish(Batch(rows, 1, 2))
    assert take_all(one)[0] is take_all(other)[0]


@pytest.mark.parametrize("columns", [False, True])
def test_no_form_of_a_stream_has_the_address(columns: bool) -> None:
    stream = channel()
    early = stream.subscribe(Terms(masked=True, columns=columns))
    plain = stream.subscribe(Terms(columns=columns))
    rows = connections(3, 12, 0)
    strings = [SECRET if text.startswith("10.") else text for text in rows.strings]
    assert SECRET in strings
    local = rows.columns["local_address"]
    at = len(strings)
    rows = Summaries(
        rows.message, {**rows.columns, "local_address": np.full_like(local, at)},
        (*strings, "192.0.2.1"), rows.messages, rows.count,
    )  # fmt: skip
    stream.publish(Batch(rows, 1, 2))
    late = stream.subscribe(Terms(masked=True, columns=columns))  # from the replay
    for reader, has_it in ((plain, True), (early, False), (late, False)):
        (frame,) = take_all(reader)
        wire = reader.message(frame)
        assert (SECRET.encode() in wire) is has_it
        assert (REDACTED.encode() in wire) is not has_it
        events = b"".join(frame.events())
        assert (SECRET.encode() in events) is has_it
        assert frame.count == 12


def test_single_events_on_the_wire_are_masked_from_the_replay_and_after_a_resume() -> None:
    stream = channel()
    stream.publish(Batch(state_changes(50), 1, 2))
    for after_seq in (0, 20):
        reader = stream.subscribe(Terms(masked=True, after_seq=after_seq))
        (frame,) = take_all(reader)
        wire = reader.message(frame)
        message = pb.EbpfEventBatch.FromString(wire)
        assert [row.remote_low for row in message.tcp_state_changes] == [0] * (50 - after_seq)
        assert all(row.local_low for row in message.tcp_state_changes)
        events = Received.parse(wire).events
        assert not events["remote_high"].any()
        assert (frame.first_seq, frame.last_seq) == (after_seq + 1, 50)


def test_all_that_may_not_see_them_share_one_encoding_apart_from_those_that_may() -> None:
    stream = channel()
    hidden = [stream.subscribe(HIDDEN) for _ in range(3)]
    plain = [stream.subscribe() for _ in range(2)]
    stream.publish(Batch(connections(5, 12, 0), 1, 2))
    wires = [reader.message(take_all(reader)[0]) for reader in hidden]
    assert wires[0] is wires[1] is wires[2]
    open_wires = [reader.message(take_all(reader)[0]) for reader in plain]
    assert open_wires[0] is open_wires[1]
    assert open_wires[0] != wires[0]


def test_a_filter_and_the_account_are_the_same_with_and_without_addresses() -> None:
    stream = channel()
    wanted = Filter(comms=frozenset({"cron"}))
    readers = [stream.subscribe(Terms(wanted=wanted, masked=m)) for m in (False, True, True)]
    rows = connections(7, 40, 0)
    stream.publish(Batch(rows, 1, 2, {pb.Loss.STAGE_MAP_FULL: 3}))
    frames = [take_all(reader) for reader in readers]
    one, hidden, same = (each[0] for each in frames)
    assert 0 < one.count < 40
    assert one.count == hidden.count
    assert hidden is same
    assert readers[0].account == readers[1].account == readers[2].account
    assert one.losses == hidden.losses


def test_a_masked_stream_gives_its_memory_back() -> None:
    stream = channel()
    readers = [stream.subscribe(HIDDEN) for _ in range(2)]
    before = stream.buffered_bytes
    for _ in range(5):
        stream.publish(Batch(state_changes(100), 1, 2))
    shared = stream.buffered_bytes
    kept = sum(frame.memory_bytes for frame in stream.kept)
    assert shared > before + kept  # the masked rows, once for both
    assert shared < before + 2.5 * kept
    for reader in readers:
        reader.close()
    assert stream.buffered_bytes == kept


def test_a_rate_of_a_caller_is_for_all_its_streams_together() -> None:
    quotas, stream = CallerQuotas(), channel()
    rate = quotas.rate("token:ci", Allowance(bytes_per_second=2_000))
    other = quotas.rate("token:other", Allowance(bytes_per_second=2_000))
    readers = [stream.subscribe(Terms(shared_rate=each)) for each in (rate, rate, other)]
    for _ in range(60):
        stream.publish(Batch(state_changes(10), 1, 2))
    size = stream.kept[0].size_bytes
    passed = [60 - reader.account.lost[pb.Loss.STAGE_RATE_LIMIT] // 10 for reader in readers]
    within = -(-2_000 // size)
    assert passed[0] + passed[1] == within
    assert passed[2] == within


def test_the_smaller_of_two_rates_counts() -> None:
    stream = channel()
    shared = CallerQuotas().rate("a", Allowance(bytes_per_second=100_000))
    reader = stream.subscribe(Terms(shared_rate=shared, rate_bytes_s=2_000))
    for _ in range(60):
        stream.publish(Batch(state_changes(10), 1, 2))
    size = stream.kept[0].size_bytes
    assert reader.account.lost == {pb.Loss.STAGE_RATE_LIMIT: 600 - 10 * -(-2_000 // size)}
