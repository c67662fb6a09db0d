"""/metrics as a real Prometheus stores it, and as its linter judges it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coral.bpf import probe
from coral.collectors.hubs import has_cgroups
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.prometheus import program, prometheus, value_of
from tests.support import (
    Calls,
    Puppet,
    RunningAgent,
    running_agent,
    sample,
    samples,
    scrape,
    start_collector,
    streaming,
    totals,
    wait_until,
    watching,
)

ENDS: Final = {"expired", "stopped", "failed", "preempted", "agent_shutdown", "target_exited"}
PROFILE: Final = pb.EBPF_COLLECTOR_KIND_CPU_PROFILE
STAGES: Final = {
    *("kernel_buffer", "map_full", "program_missed", "kernel_busy", "truncated"),
    *("rate_limit", "subscriber_queue", "replay_evicted"),
}

pytestmark = pytest.mark.usefixtures("nothing_left")


def linted(text: str) -> tuple[int, str]:
    """The verdict of `promtool check metrics`: its exit status and its complaints."""
    result = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout + result.stderr


def test_prometheus_has_the_exact_count_of_calls(
    agent: RunningAgent, calls: Callable[..., Calls], tmp_path: Path
) -> None:
    running = calls("getppid", 123_456, "openat", 78)
    with prometheus(tmp_path / "prometheus", agent) as query:
        start_collector(agent, pid=str(running.pid), interval="100ms", until_exit="true")
        running.go()
        running.finish()
        of = '{service="calls",syscall="getppid"}'
        wait_until(
            lambda: value_of(query(f"sum(coral_syscall_calls_total{of})")) == 123_456, timeout_s=60
        )
        seconds = "coral_syscall_duration_seconds"
        assert value_of(query(f"sum({seconds}_count{of})")) == 123_456
        assert value_of(query(f'sum({seconds}_bucket{of[:-1]},le="+Inf"}})')) == 123_456
        assert 0 < (value_of(query(f"sum({seconds}_sum{of})")) or 0) < 60
        (errors,) = query('coral_syscall_errors_total{service="calls",syscall="openat"}')
        assert errors["metric"]["class"] == "not_found"
        assert value_of([errors]) == 78
    # It stored every sample that it scraped: none was a duplicate or out of order.
    assert "ingesting" not in (tmp_path / "prometheus/log").read_text()


def test_promtool_has_no_complaint_while_a_collector_works_or_after(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    assert linted(scrape(agent)) == (0, "")
    running = calls("getppid", 1_000, "openat", 10, "nanosleep", 1_000)
    with watching(agent, pid=str(running.pid)) as watch:
        running.go()
        watch.read_until_calls("getppid", 1_000)
        while not watch.calls_of("nanosleep"):
            watch.read()
        assert sample(agent, "coral_agent_sessions_active", kind="syscall_stats") == 1
        assert linted(scrape(agent)) == (0, "")
        running.finish()
        watch.stop()
    assert sample(agent, "coral_agent_sessions_active", kind="syscall_stats") == 0
    assert linted(scrape(agent)) == (0, "")


def test_the_agents_own_figures_follow_its_sessions(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    text = scrape(agent)

    def own(name: str, **labels: str) -> float:
        labels["kind"] = "syscall_stats"
        (value,) = samples(text, f"coral_agent_{name}", **labels).values()
        return value

    assert [own(name) for name in ("sessions_active", "subscribers", "map_memory_bytes")] == [0] * 3
    assert [own(name) for name in ("sessions_started_total", "events_total")] == [0] * 2

    running, quiet = calls("getppid", 1_000), calls()
    pid = str(running.pid)
    with watching(agent, pid=pid) as watch, watching(agent, pid=pid, until_exit="true") as other:
        request = pb.EbpfEventStreamRequest(collector_id=watch.collector_id)
        with streaming(agent, "StreamEvents", request):
            text = scrape(agent)
            assert own("subscribers") == 3
        wait_until(lambda: sample(agent, "coral_agent_subscribers") == 2)
        text = scrape(agent)
        assert own("sessions_active") == own("sessions_started_total") == 2
        listed = agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors
        assert own("map_memory_bytes") == sum(info.map_memory_bytes for info in listed) > 0
        running.go()
        running.finish()
        assert other.read_to_end().reason == pb.SessionEnd.REASON_TARGET_EXITED
        watch.stop()
    start_collector(agent, 0.05, pid=str(quiet.pid))
    wait_until(lambda: sample(agent, "coral_agent_sessions_active") == 0)

    text = scrape(agent)
    ended = {reason: own("sessions_ended_total", reason=reason) for reason in ENDS}
    assert ended == dict.fromkeys(ENDS, 0) | {"stopped": 1, "target_exited": 1, "expired": 1}
    assert own("sessions_started_total") == 3
    assert own("sessions_starting") == 0
    assert own("subscribers") == own("map_memory_bytes") == 0
    assert watch.end
    assert other.end
    assert own("events_total") == watch.end.produced + other.end.produced > 0
    assert {stage: own("events_lost_total", stage=stage) for stage in STAGES} == dict.fromkeys(
        STAGES, 0
    )


def test_runs_are_counted_by_program(agent: RunningAgent, calls: Callable[..., Calls]) -> None:
    """The agent samples run-time statistics every few seconds."""
    runs_total = "coral_agent_program_runs_total"
    running = calls("getppid", 200_000_000)
    with watching(agent, pid=str(running.pid)):
        running.go()
        text = wait_until(
            lambda: text if samples(text := scrape(agent), runs_total) else "", timeout_s=60
        )
        running.kill()
    runs = _by_program(samples(text, runs_total))
    seconds = _by_program(samples(text, "coral_agent_program_run_seconds_total"))
    of_calls = {"coral_enter", "coral_leave"}
    of_processes = {"coral_fork", "coral_rename", "coral_exec", "coral_exit"}
    of_cgroups = {"coral_attach", "coral_mkdir", "coral_rmdir"} if has_cgroups() else set()
    of_threads = set[str]() if probe()["task_storage"].available else {"coral_forget"}
    assert runs.keys() == seconds.keys() == of_calls | of_processes | of_cgroups | of_threads
    # A tenth of a second holds tens of thousands of calls, and a run takes 1 ns to 10 us.
    for name in of_calls:
        assert runs[name] > 10_000
        assert 1e-9 < seconds[name] / runs[name] < 1e-5


def _by_program(found: Mapping[frozenset[tuple[str, str]], float]) -> dict[str, float]:
    assert {dict(labels)["kind"] for labels in found} == {"syscall_stats"}
    return {dict(labels)["program"]: value for labels, value in found.items()}


def test_no_label_names_a_process(agent: RunningAgent, calls: Callable[..., Calls]) -> None:
    running = calls("getppid", 10)
    with watching(agent, pid=str(running.pid)) as watch:
        running.go()
        watch.read_until_calls("getppid", 10)
        text = scrape(agent)
        running.finish()
    labels = [
        label
        for family in text_string_to_metric_families(text)
        for one in family.samples
        for label in one.labels.items()
    ]
    assert ("service", "calls") in labels
    assert not {name for name, _ in labels} & {"pid", "tgid", "tid", "collector_id", "session"}
    assert str(running.pid) not in {value for _, value in labels}


def test_series_beyond_the_limit_are_added_up_and_the_sum_stays_exact(
    calls: Callable[..., Calls], tmp_path: Path
) -> None:
    config = {"limits": {"prometheus_series": 3}}
    jobs = {"getppid": 5_000, "openat": 300, "write": 200, "futile": 10}
    running = calls(*(word for job in jobs.items() for word in job))
    with (
        running_agent(tmp_path / "capped", config) as agent,
        watching(agent, pid=str(running.pid), until_exit="true") as watch,
    ):
        running.go()
        running.finish()
        watch.read_to_end()
        text = scrape(agent)
    counted = totals(watch.rows)
    assert (counted["getppid"], counted["openat"], counted["unknown"]) == (5_000, 300, 10)
    series = {
        (dict(labels)["service"], dict(labels)["syscall"]): count
        for labels, count in samples(text, "coral_syscall_calls_total").items()
    }
    rest = series.pop(("other", "other"))
    assert len(series) == 3
    assert series == {("calls", name): counted[name] for _, name in series}
    assert rest == counted.total() - sum(series.values()) > 0
    observed = samples(text, "coral_syscall_duration_seconds_count")
    assert len(observed) == 4
    assert sum(observed.values()) == counted.total()
    errors = samples(text, "coral_syscall_errors_total")
    assert sum(errors.values()) == sum(row.error_count for row in watch.rows)


def test_a_profile_is_in_prometheus_to_the_sample(agent: RunningAgent) -> None:
    """Seconds, methods and functions add up to the samples that a client has."""
    compute = "end = time.process_time() + 0.6\nwhile time.process_time() < end: sum(range(1000))"
    with Puppet() as puppet, watching(agent, 60.0, "shop", PROFILE, pid=str(puppet.pid)) as watch:
        puppet.do(f"import time; exec({compute!r})")
        wait_until(lambda: min(cache_bytes(agent, "symbols", "names", "unwind_tables")) > 1000, 60)
        assert min(cache_bytes(agent, "kernel_symbols", "perf_maps")) >= 0
        watch.stop()
    rows = [row for batch in watch.batches for row in batch.cpu_profile]
    counted, period_s = sum(row.count for row in rows), rows[0].period_ns / 1e9
    assert counted > 20
    text = scrape(agent)
    total = {
        name: sum(samples(text, f"coral_profile_{name}_total", service="shop").values())
        for name in (
            *(f"samples_{it}" for it in ("taken", "lost", "truncated", "unwound")),
            *("cpu_seconds", "function_cpu_seconds"),
        )
    }
    assert total["samples_taken"] == total["samples_unwound"] == counted
    assert total["samples_lost"] == 0
    assert total["samples_truncated"] <= counted
    assert total["cpu_seconds"] == pytest.approx(counted * period_s)
    with_frames = sum(row.count for row in rows if row.stack)
    assert total["function_cpu_seconds"] == pytest.approx(with_frames * period_s)
    assert linted(text) == (0, "")


def cache_bytes(agent: RunningAgent, *caches: str) -> list[float]:
    """The size of each of CACHES; -1 for one that is not told."""
    found = samples(scrape(agent), "coral_profile_cache_bytes")
    return [found.get(frozenset({("cache", cache)}), -1) for cache in caches]
