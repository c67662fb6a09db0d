"""Every rung of the ladder gives the same figures: what a kernel lacks costs speed, not truth."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from coral import bpf
from coral.collectors.contract import Batch, EventRows
from coral.collectors.registry import COLLECTORS
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name
from tests.support import PATIENCE, RUNGS, Calls, Family, at_work, summaries, totals

pytestmark = pytest.mark.usefixtures("nothing_left")

every_rung = pytest.mark.parametrize("without", RUNGS.values(), ids=RUNGS.keys())
THREADS, CALLS = 2, int(50_000 / PATIENCE)


def collector_without(without: tuple[str, ...], **config: str) -> SyscallStatsCollector:
    features = bpf.probe().without(*without)
    support = SyscallStatsCollector.support(features)
    if not support.supported:
        pytest.skip(support.reason)
    return SyscallStatsCollector.create(config, None, features)


def seen(collector: SyscallStatsCollector, calls: Calls, *, meanwhile: bool = True) -> list[Batch]:
    """The records drained while the program runs, or only after its end."""
    with at_work(collector):
        calls.go()
        batches = []
        while meanwhile and not calls.has_ended():
            batches.append(collector.drain())
        calls.finish()
        batches.append(collector.drain())
        while collector.records and collector.records.pending_bytes:  # a drain is bounded
            batches.append(collector.drain())
    return batches


def lost(batches: list[Batch]) -> Counter[int]:
    counted: Counter[int] = Counter()
    for batch in batches:
        counted.update(batch.losses)
    return counted


@every_rung
def test_summaries_are_exact(without: tuple[str, ...], calls: Callable[..., Calls]) -> None:
    program = calls("getppid", CALLS, "openat", 500, threads=THREADS)
    batches = seen(collector_without(without, pid=str(program.pid)), program)
    counted = totals(row for batch in batches for row in summaries(batch))
    assert counted["getppid"] == THREADS * CALLS
    assert counted["openat"] == THREADS * 500
    assert counted["exit_group"] == 1
    assert not lost(batches)


@every_rung
def test_single_events_are_exact(without: tuple[str, ...], calls: Callable[..., Calls]) -> None:
    program = calls("getppid", CALLS, threads=THREADS)
    collector = collector_without(
        without, pid=str(program.pid), mode="events", include="getppid", ring="32MiB"
    )
    batches = seen(collector, program)
    events = 0
    for batch in batches:
        assert isinstance(batch.rows, EventRows)
        records = batch.rows.records
        events += len(records)
        assert (records["pid"] == program.pid).all()
        assert (records["duration_ns"] > 0).all()
        assert (records["return_value"] > 0).all()
        names = {batch.rows.strings[index] for index in set(records["syscall"].tolist())}
        assert names <= {"getppid"}
    assert (events, lost(batches)) == (THREADS * CALLS, {})


@every_rung
def test_the_account_of_losses_is_exact(
    without: tuple[str, ...], calls: Callable[..., Calls]
) -> None:
    program = calls("getppid", CALLS, threads=THREADS)
    collector = collector_without(
        without, pid=str(program.pid), mode="events", include="getppid", ring="64KiB"
    )
    batches = seen(collector, program, meanwhile=False)
    events = sum(len(batch.rows) for batch in batches)
    losses = lost(batches)
    assert set(losses) == {pb.Loss.STAGE_KERNEL_BUFFER}
    assert losses[pb.Loss.STAGE_KERNEL_BUFFER] > THREADS * CALLS // 2
    assert events + losses[pb.Loss.STAGE_KERNEL_BUFFER] == THREADS * CALLS


@every_rung
def test_children_are_followed_from_their_first_call(
    without: tuple[str, ...], programs: Path
) -> None:
    parent = Family(programs / "family", "fork")
    collector = collector_without(without, pid=str(parent.pid), include="getppid")
    with at_work(collector):
        parent.run()
        rows = [row for _ in range(2) for row in summaries(collector.drain())]
    counted = totals(rows)
    assert counted["getppid"] == parent.children * parent.calls
    assert {row.labels["comm"] for row in rows} == {"family"}


@every_rung
def test_no_program_comes_near_the_verifiers_limit(
    without: tuple[str, ...], record_property: Callable[[str, object], None]
) -> None:
    """The kernel reports how many instructions its verifier processed to accept each program."""
    features = bpf.probe().without(*without)
    kinds = {kind: it for kind, it in COLLECTORS.items() if it.support(features).supported}
    if not kinds:
        pytest.skip("no kind of collector can run here")
    for kind, cls in kinds.items():
        (accepted,) = (it.accepts for it in cls.options() if it.name == "mode")
        for mode in ("summaries", "events"):
            if mode not in accepted:
                continue
            with at_work(
                cls.create({"pid": str(os.getpid()), "mode": mode}, None, features)
            ) as collector:
                stats = collector.bpf_object.program_stats()
            assert stats
            for name, program in stats.items():
                where = f"{kind_name(kind)}: {name}, {mode}"
                record_property(where, program.verified_instructions)
                assert program.verified_instructions <= bpf.VERIFIER_LIMIT // 2, name
