"""After the end, over gRPC: streams that can still be read, lists of what ended, and watches."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.e2e.test_refusals import has_tried_the_kernel
from tests.support import (
    Calls,
    RunningAgent,
    code_and_text,
    held_by,
    running_agent,
    start_collector,
    streaming,
    totals,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

CALLS: Final = 20_000
Change = pb.CollectorChange


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("ended") / "agent") as running:
        has_tried_the_kernel(running)
        yield running


def stop(agent: RunningAgent, collector_id: str) -> None:
    agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=collector_id))


def listed(agent: RunningAgent, *, ended: bool) -> dict[str, pb.CollectorInfo]:
    """The collectors by id."""
    request = pb.ListCollectorsRequest(include_ended=ended)
    return {one.collector_id: one for one in agent.call("ListCollectors", request).collectors}


def worked(agent: RunningAgent, running: Calls, **config: str) -> str:
    """A collector that ended with RUNNING, before anybody subscribed; its id."""
    started = start_collector(agent, pid=str(running.pid), until_exit="true", **config)
    running.go()
    running.finish()
    wait_until(lambda: started.collector_id not in listed(agent, ended=False))
    return started.collector_id


def read(agent: RunningAgent, collector_id: str, after_seq: int = 0) -> list[pb.EbpfEventBatch]:
    request = pb.EbpfEventStreamRequest(collector_id=collector_id, after_seq=after_seq)
    with streaming(agent, "StreamEventBatches", request) as batches:
        return list(batches)


def test_who_subscribes_after_the_end_gets_every_event_and_then_the_end(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    collector_id = worked(
        agent, calls("getppid", CALLS), mode="events", include="getppid", interval="100ms"
    )
    *batches, last = read(agent, collector_id)
    assert sum(batch.count for batch in batches) == CALLS
    assert [batch.first_seq for batch in batches[1:]] == [b.last_seq + 1 for b in batches[:-1]]
    assert last.end == pb.SessionEnd(reason=pb.SessionEnd.REASON_TARGET_EXITED, produced=CALLS)
    for after_seq in (1, batches[0].last_seq, CALLS - 1, CALLS):
        *resumed, end = read(agent, collector_id, after_seq)
        assert sum(batch.count for batch in resumed) == CALLS - after_seq
        assert end.end == last.end
    request = pb.EbpfEventStreamRequest(collector_id=collector_id, after_seq=CALLS + 1)
    assert code_and_text(agent, "StreamEventBatches", request)[0] is grpc.StatusCode.OUT_OF_RANGE
    request.after_seq = CALLS - 3
    with streaming(agent, "StreamEvents", request) as events:
        assert [event.seq for event in events] == [CALLS - 2, CALLS - 1, CALLS, 0]


def test_summaries_are_kept_too_and_give_the_exact_count(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    collector_id = worked(agent, calls("getppid", CALLS))
    rows = [row for batch in read(agent, collector_id) for row in batch.syscall_stats]
    assert totals(rows)["getppid"] == CALLS


def test_ended_collectors_are_listed_on_request_with_their_final_account(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    collector_id = worked(agent, calls("getppid", CALLS), mode="events", include="getppid")
    assert collector_id not in listed(agent, ended=False)
    info = listed(agent, ended=True)[collector_id]
    assert (info.produced, info.map_memory_bytes, len(info.lost)) == (CALLS, 0, 0)
    assert info.end == pb.SessionEnd(reason=pb.SessionEnd.REASON_TARGET_EXITED, produced=CALLS)
    assert info.started_at.ToNanoseconds() < info.ended_at.ToNanoseconds()
    assert info.config["include"] == "getppid"


def test_what_the_ring_had_no_room_for_is_in_the_final_account(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    collector_id = worked(
        agent, calls("getppid", 200_000, threads=2), mode="events", include="getppid", ring="64KiB"
    )
    info = listed(agent, ended=True)[collector_id]
    (lost,) = info.lost
    assert lost.stage == pb.Loss.STAGE_KERNEL_BUFFER
    assert info.produced + lost.count == 400_000
    assert list(info.end.lost_in_kernel) == [lost]
    assert read(agent, collector_id)[-1].end == info.end


def test_a_watch_tells_what_works_then_what_starts_and_ends(agent: RunningAgent) -> None:
    first = start_collector(agent, comm="no-such-comm").collector_id
    with streaming(agent, "WatchCollectors", pb.WatchCollectorsRequest()) as changes:
        second = start_collector(agent, comm="no-such-comm").collector_id
        stop(agent, first)
        stop(agent, second)
        told = [next(changes) for _ in range(5)]
    assert [(change.what, change.collector.collector_id) for change in told] == [
        (Change.WHAT_PRESENT, first),
        (Change.WHAT_SYNCED, ""),
        (Change.WHAT_STARTED, second),
        (Change.WHAT_ENDED, first),
        (Change.WHAT_ENDED, second),
    ]
    assert told[0].collector.map_memory_bytes > 0
    assert told[3].collector.end.reason == pb.SessionEnd.REASON_STOPPED


def test_watchers_that_come_and_go_leave_nothing_and_see_the_same(agent: RunningAgent) -> None:
    files = Path(f"/proc/{agent.process.pid}/fd")
    request = pb.WatchCollectorsRequest()

    def open_files() -> int:
        targets = []
        for link in files.iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                targets.append(str(link.readlink()))
        return sum("socket" not in target for target in targets)

    before = open_files()
    with ExitStack() as stack:
        watches: list[Any] = [
            stack.enter_context(streaming(agent, "WatchCollectors", request)) for _ in range(50)
        ]
        for watch in watches[::2]:
            watch.cancel()
        collector_id = start_collector(agent, comm="no-such-comm").collector_id
        stop(agent, collector_id)
        for watch in watches[1::2]:
            told = [next(watch) for _ in range(3)]
            assert [change.what for change in told] == [
                Change.WHAT_SYNCED,
                Change.WHAT_STARTED,
                Change.WHAT_ENDED,
            ]
            assert {change.collector.collector_id for change in told[1:]} == {collector_id}
    wait_until(lambda: open_files() == before)
    assert not any(held_by(agent.process.pid).values())


def test_the_agents_end_is_the_end_of_every_watch(tmp_path: Path) -> None:
    with running_agent(tmp_path / "agent") as agent, ExitStack() as stack:
        collector_id = start_collector(agent, comm="no-such-comm").collector_id
        watches: list[Any] = [
            stack.enter_context(streaming(agent, "WatchCollectors", pb.WatchCollectorsRequest()))
            for _ in range(3)
        ]
        agent.process.send_signal(signal.SIGTERM)
        with ThreadPoolExecutor() as pool:
            read_all: Callable[[Any], list[Any]] = list
            for present, synced, ended in pool.map(read_all, watches):
                assert present.collector.collector_id == collector_id
                assert synced.what == Change.WHAT_SYNCED
                assert ended.collector.end.reason == pb.SessionEnd.REASON_AGENT_SHUTDOWN
        assert [watch.code() for watch in watches] == [grpc.StatusCode.OK] * 3
        assert agent.process.wait(10) == 0
