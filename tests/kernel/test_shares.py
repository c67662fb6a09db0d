"""Sessions that share programs share what these cost: each second of run time is charged once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from coral.agent.machine.program_stats import ProgramStatsSampler, ProgramUse, Sampled
from coral.bpf import probe
from coral.bpf.loading.object import enable_run_time_stats
from coral.collectors.hubs import HUBS
from coral.collectors.hubs.keeper import KEEPER
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from coral.collectors.tcp_metrics.collector import TcpMetricsCollector
from tests.support import Puppet, at_work, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def puppets() -> Iterator[tuple[Puppet, Puppet]]:
    with Puppet() as busy, Puppet() as idle:
        yield busy, idle


def counting(puppet: Puppet, **config: str) -> SyscallStatsCollector:
    config = {"pid": str(puppet.pid), "interval": "60s", **config}
    return SyscallStatsCollector.create(config, None, probe())


@pytest.mark.parametrize("mode", ["summaries", "events"])
def test_sessions_share_the_cost_by_their_calls(puppets: tuple[Puppet, Puppet], mode: str) -> None:
    busy, idle = puppets
    with at_work(counting(busy, mode=mode)) as much, at_work(counting(idle)) as little:
        for _ in range(3):
            busy.getppid(30_000)
            much.drain()
            little.drain()
        of_much, of_little = much.bpf_object.shares, little.bpf_object.shares
        assert of_much.keys() == of_little.keys() == much.bpf_object.program_stats().keys()
        for program, share in of_much.items():
            assert share + of_little[program] == pytest.approx(1), program
        assert of_much["coral_enter"] > 0.9
        assert of_much["coral_fork"] == 0.5  # it works for both alike
        little.close()
        assert set(much.bpf_object.shares.values()) == {1.0}
        assert little.bpf_object.shares == {}


def test_kinds_share_the_programs_that_both_use(puppets: tuple[Puppet, Puppet]) -> None:
    with (
        at_work(counting(puppets[0])) as calls,
        at_work(
            TcpMetricsCollector.create({"pid": str(puppets[1].pid)}, None, probe())
        ) as connections,
    ):
        of_calls, of_connections = calls.bpf_object.shares, connections.bpf_object.shares
        assert of_calls["coral_exit"] == of_connections["coral_exit"] == 0.5
        assert of_calls["coral_enter"] == of_connections["coral_state"] == 1
        assert "coral_enter" not in of_connections


@pytest.mark.parametrize("without", [(), ("ring_buffer",)])
def test_a_session_is_charged_its_own_memory_and_its_part_of_the_hub(
    puppets: tuple[Puppet, Puppet], without: tuple[str, ...]
) -> None:
    features = probe().without(*without)

    def collector(puppet: Puppet, **config: str) -> SyscallStatsCollector:
        return SyscallStatsCollector.create({"pid": str(puppet.pid), **config}, None, features)

    with at_work(collector(puppets[0])) as first:
        first.drain()
        wait_until(lambda: KEEPER.is_idle)  # the maps of a next session are charged as well
        alone = first.bpf_object.map_memory_bytes
        with at_work(collector(puppets[1], mode="events", ring="16MiB")) as second:
            second.drain()
            wait_until(lambda: KEEPER.is_idle)
            # What is the hub's is shared now.
            wait_until(lambda: first.bpf_object.map_memory_bytes < alone)
            other = second.bpf_object.map_memory_bytes
            assert 16 << 20 < other < alone + (17 << 20)
        assert first.bpf_object.map_memory_bytes == pytest.approx(alone, rel=0.01)
    assert first.bpf_object.map_memory_bytes == 0


def test_maps_that_wait_for_a_session_are_charged_until_they_are_given_up(
    puppets: tuple[Puppet, Puppet],
) -> None:
    config = {"mode": "events", "ring": "4MiB", "include": "getppid"}
    with at_work(counting(puppets[0], **config)) as only:
        if not only.bpf_object.prepares_next:
            pytest.skip("programs serve few sessions here: no maps are made before their session")
        alone = only.bpf_object.map_memory_bytes
        assert 4 << 20 < alone < 8 << 20
        only.drain()
        wait_until(lambda: KEEPER.is_idle)
        assert only.bpf_object.map_memory_bytes > alone + (4 << 20)
        HUBS.give_up_prepared()
        assert only.bpf_object.map_memory_bytes == pytest.approx(alone, rel=0.01)
        with at_work(counting(puppets[1], **config)) as other:
            puppets[1].getppid(1_000)
            assert len(other.drain().rows) == 1_000
        puppets[0].getppid(1_000)
        assert len(only.drain().rows) == 1_000


def test_a_collector_that_is_never_opened_takes_no_place(puppets: tuple[Puppet, Puppet]) -> None:
    unopened = [counting(puppets[0]) for _ in range(70)]  # more than a hub has slots
    with at_work(counting(puppets[1])) as opened:
        assert set(opened.bpf_object.shares.values()) == {1.0}
    for each in unopened:
        each.close()
        assert each.bpf_object.map_memory_bytes == 0
        assert each.bpf_object.program_stats() == {}


@pytest.mark.long  # in a guest, more happens before and after a window than in it
async def test_the_run_time_of_a_shared_program_is_counted_once(
    puppets: tuple[Puppet, Puppet],
) -> None:
    """The sampler counts no more and no less for two sessions than the kernel does in all."""
    busy, idle = puppets
    with ExitStack() as stack:
        stack.callback(os.close, enable_run_time_stats())
        collectors = [stack.enter_context(at_work(counting(each))) for each in (busy, idle)]
        slots = [collector.bpf_object for collector in collectors]
        uses = [ProgramUse(counted_until_s=1e12) for _ in slots]  # windows stand for themselves
        sampler = ProgramStatsSampler(
            lambda: [Sampled(1, slot, use) for slot, use in zip(slots, uses, strict=True)]
        )
        busy.begin("for _ in range(300_000): os.getppid()")
        before = slots[0].program_stats()
        await sampler._sample()
        after = slots[0].program_stats()
        busy.done()
        ran = after["coral_enter"].run_count - before["coral_enter"].run_count
        counted = sampler.estimates[1, "coral_enter"].runs
        assert 0.5 * ran < counted <= ran
