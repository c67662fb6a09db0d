"""The colony's rollups in a real Prometheus and a real VictoriaMetrics."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from coral.colony.export.exporter import OTLP, REMOTE_WRITE, Exporter
from coral.colony.export.settings import ExportSettings, Receiver
from tests.colony_process import running_colony
from tests.prometheus import Query, value_of, victoria_metrics, written_prometheus
from tests.rollups import of_all_kinds
from tests.support import INSECURE, PATIENCE, Puppet, running_agent, wait_until

OF_WEB = 'service="web",namespace="shop",workload="deployment/web",container="app"'
# What was made by hand, and what a receiver must answer.
FIGURES = {
    f'coral_syscall_calls_total{{{OF_WEB},syscall="read"}}': 15,
    f'coral_syscall_errors_total{{{OF_WEB},class="not_found"}}': 3,
    f"coral_syscall_duration_seconds_sum{{{OF_WEB}}}": 4e-6,
    f'coral_syscall_duration_seconds_bucket{{{OF_WEB},le="2.56e-07"}}': 8,
    f'coral_syscall_duration_seconds_bucket{{{OF_WEB},le="+Inf"}}': 15,
    'coral_syscall_duration_seconds_bucket{service="cron",le="17.179869184"}': 0,
    'coral_syscall_duration_seconds_count{service="cron"}': 1,
    f'http_server_request_duration_seconds_count{{{OF_WEB},http_response_status_code="200"}}': 30,
    f'http_server_request_duration_seconds_bucket{{{OF_WEB},http_route="/a",le="0.25",'
    'http_request_method="GET",http_response_status_code="200"}': 25,
    f'http_server_request_duration_seconds_sum{{{OF_WEB},error_type="503"}}': 1,
    f'http_server_request_duration_seconds_count{{{OF_WEB},error_type="aborted_by_client"}}': 1,
    f'sum(http_server_response_body_size_bytes_sum{{{OF_WEB}}})': 904,
    f'system_network_tcp_io_bytes_total{{{OF_WEB},role="client",direction="transmit"}}': 101,
    f'system_network_tcp_connections_total{{{OF_WEB},role="client",error_type=""}}': 7,
    f'system_network_tcp_connections_total{{{OF_WEB},error_type="refused"}}': 2,
    f'system_network_tcp_connections_total{{{OF_WEB},error_type="timed_out"}}': 4,
    f'system_network_tcp_retransmits_total{{{OF_WEB},role="server",type="handshake"}}': 5,
    f'system_network_tcp_listen_drops_total{{{OF_WEB},role="server"}}': 9,
    f'system_network_tcp_rtt_duration_seconds_bucket{{{OF_WEB},role="client",le="0.0005"}}': 6,
    f'system_network_tcp_rtt_duration_seconds_sum{{{OF_WEB},role="client"}}': 0.005,
    f'system_network_tcp_handshake_duration_seconds_count{{{OF_WEB},role="client"}}': 3,
    f"coral_profile_cpu_seconds_total{{{OF_WEB}}}": 2,
}  # fmt: skip


@asynccontextmanager
async def exporting(exporter: Exporter) -> AsyncIterator[None]:
    running = asyncio.create_task(exporter.run())
    try:
        yield
        if running.done():
            running.result()
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def until(condition: Callable[[], Any], timeout_s: float = 60) -> None:
    """Returns when CONDITION, which blocks, is true."""
    end = time.monotonic() + timeout_s * PATIENCE
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end, condition
        await asyncio.sleep(0.05)


def is_there(query: Query) -> bool:
    """Whether the last of the samples has come."""
    return bool(query("coral_profile_samples_lost_total"))


def assert_figures(query: Query) -> None:
    wrong = {
        expression: found
        for expression, expected in FIGURES.items()
        if (found := value_of(query(expression))) != pytest.approx(expected)
    }
    assert wrong == {}


async def test_a_prometheus_that_is_written_to_has_the_agents_names_and_exact_figures(
    tmp_path: Path,
) -> None:
    with written_prometheus(tmp_path / "prometheus") as (url, query):
        settings = ExportSettings("east", remote_write=Receiver(url), interval_s=0.2)
        exporter = Exporter(settings)
        exporter.observe(of_all_kinds())
        async with exporting(exporter):
            await until(lambda: is_there(query))
            assert_figures(query)
            found = query('coral_syscall_calls_total{service="cron"}')
            assert found[0]["metric"] == {
                "__name__": "coral_syscall_calls_total", "service": "cron", "syscall": "read",
                "job": "coral-colony", "instance": "east",
            }  # fmt: skip
            # The next minute goes on from there; a service of another namespace is another.
            exporter.observe(of_all_kinds())
            of_web = f'coral_syscall_calls_total{{{OF_WEB},syscall="read"}}'
            await until(lambda: value_of(query(of_web)) == 30)
            assert exporter.counts.sent[REMOTE_WRITE] > 0
            assert exporter.counts.lost[REMOTE_WRITE] == 0


async def test_victoria_metrics_has_the_same_by_both_ways(tmp_path: Path) -> None:
    with victoria_metrics(tmp_path / "victoria") as (otlp, query):
        written = otlp.replace("/opentelemetry", "/api/v1/write")
        east = ExportSettings(
            "east", otlp=Receiver(otlp), otlp_protocol="http", interval_s=0.2,
            resource={"deployment.environment.name": "test"},
        )  # fmt: skip
        west = ExportSettings(
            "west", remote_write=Receiver(written), interval_s=0.2, labels={"job": "x"}
        )
        exporters = Exporter(east), Exporter(west)
        for exporter in exporters:
            exporter.observe(of_all_kinds())
        async with exporting(exporters[0]), exporting(exporters[1]):
            sent = [it.counts.sent for it in exporters]
            await until(lambda: sent[0][OTLP] and sent[1][REMOTE_WRITE])
            # VictoriaMetrics remembers for 10 s what it did not have: each question is another.
            name, asked = "coral_profile_cpu_seconds_total", count()
            await until(lambda: len(query(f'{name}{{asked!="{next(asked)}"}}')) == 2)
        of_web = 'service_name="web",k8s_namespace_name="shop",k8s_deployment_name="web"'
        of_web += ',coral_colony_name="east",deployment_environment_name="test"'
        seconds = "http_server_request_duration_seconds"
        for expression, expected in {
            f'sum(coral_syscall_calls_total{{{of_web},syscall="read"}})': 15,
            f'{seconds}_count{{{of_web},http_response_status_code="200"}}': 30,
            f'{seconds}_bucket{{{of_web},http_response_status_code="200",le="0.25"}}': 25,
            'sum(coral_syscall_calls_total{job="x",instance="west"})': 16,
        }.items():
            assert value_of(query(expression)) == expected


async def test_samples_wait_for_their_receiver_within_a_bound() -> None:
    nowhere = Receiver("http://127.0.0.1:1/api/v1/write")
    settings = ExportSettings(
        "east", otlp=Receiver("http://127.0.0.1:1"), remote_write=nowhere, interval_s=0.05,
        queue_bytes=3_000, timeout_s=1.0,
    )  # fmt: skip
    exporter = Exporter(settings)
    exporter.observe(of_all_kinds())
    async with exporting(exporter):
        await until(lambda: exporter.counts.lost[REMOTE_WRITE] and exporter.counts.lost[OTLP])
        counts = exporter.counts
        assert counts.failures[REMOTE_WRITE] > 0
        assert counts.failures[OTLP] > 0
        assert counts.sent == {}
        waiting = counts.waiting
        assert waiting > 0
    assert exporter.counts.lost[REMOTE_WRITE] >= waiting


async def test_an_otlp_receiver_that_does_not_answer_delays_no_remote_write() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stalled:
        settings = ExportSettings(
            "east", otlp=Receiver(f"http://127.0.0.1:{stalled.getsockname()[1]}"),
            otlp_protocol="http", remote_write=Receiver("http://127.0.0.1:1/api/v1/write"),
            interval_s=0.05, queue_bytes=3_000, timeout_s=3600.0,
        )  # fmt: skip
        exporter = Exporter(settings)
        exporter.observe(of_all_kinds())
        async with exporting(exporter):
            connection, _ = await asyncio.to_thread(stalled.accept)
            before = exporter.counts.lost.copy()
            # Later exports go on: more samples give way, and OTLP's own are counted.
            await until(lambda: exporter.counts.lost[REMOTE_WRITE] > before[REMOTE_WRITE])
            await until(lambda: exporter.counts.lost[OTLP] > before[OTLP])
            assert exporter.counts.failures[OTLP] == 0
        connection.close()


def test_the_end_does_not_wait_for_receivers_that_do_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as stalled, capture_logs() as logged:
        url = f"http://127.0.0.1:{stalled.getsockname()[1]}"
        settings = ExportSettings(
            "east", otlp=Receiver(url), otlp_protocol="http", remote_write=Receiver(f"{url}/write"),
            interval_s=0.05, timeout_s=3600.0,
        )  # fmt: skip
        exporter = Exporter(settings)
        exporter.observe(of_all_kinds())

        async def life() -> None:
            async with exporting(exporter):
                taken.append(await asyncio.to_thread(stalled.accept))
                taken.append(await asyncio.to_thread(stalled.accept))  # both are under way

        taken: list[tuple[socket.socket, Any]] = []
        asyncio.run(life())  # which waits for the threads of asyncio
        for connection, _ in taken:
            connection.close()
        wait_until(lambda: not any(it.name == "coral-export" for it in threading.enumerate()))
    (line,) = (it for it in logged if it["event"] == "metrics were not sent before the end")
    assert line["remote_write_samples"] == exporter.counts.lost[REMOTE_WRITE] > 0


@pytest.mark.soak
@pytest.mark.timeout(400)
async def test_a_colony_sends_its_minutes_to_prometheus(tmp_path: Path) -> None:
    limits = {"auth": INSECURE}
    with (
        running_agent(tmp_path / "agent", limits, "--listen", "127.0.0.1:0") as agent,
        written_prometheus(tmp_path / "prometheus") as (url, query),
        Puppet() as puppet,
    ):
        watched = {"pid": puppet.pid, "interval": "1s"}
        config = {
            "name": "east",
            "agents": {"addresses": [agent.address]},
            "collect": [{"kind": "syscall_stats", "service": "shop", "config": watched}],
            "export": {"interval": "1s", "remote_write": {"endpoint": url}},
        }
        with running_colony(tmp_path / "colony", config) as colony:
            await until(lambda: colony.total("coral_colony_sessions") == 1)
            puppet.getppid(12_345)
            calls = 'coral_syscall_calls_total{syscall="getppid",service="shop",instance="east"}'
            await until(lambda: value_of(query(calls)) == 12_345, timeout_s=200)
            # Prometheus answers questions before the colony has read that it took the samples.
            sent = "coral_colony_export_sent_samples_total"
            await until(lambda: colony.total(sent, signal="remote_write") > 0)
            assert colony.total("coral_colony_export_lost_samples_total") == 0
