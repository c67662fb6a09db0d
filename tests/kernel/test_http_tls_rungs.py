"""`http_latency` of HTTP inside of TLS: the ways in which kernels differ."""

from __future__ import annotations

import subprocess

import pytest

from coral.bpf import probe
from coral.collectors.http_latency.collector import HttpLatencyCollector
from tests.http_seen import CLIENT, COMPLETE, SERVER, seeing
from tests.openssl import openssl_program
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("http_supported", "nothing_left", "no_descriptors_left")

LATE = "coral_ssl_enter"  # one of the programs at functions of OpenSSL


@pytest.mark.parametrize("without", [(), ("uprobe_multi",)], ids=["best", "perf_events"])
def test_every_request_inside_of_tls_is_seen_once_on_each_rung(without: tuple[str, ...]) -> None:
    features = probe().without(*without)
    steps = HttpLatencyCollector.support(features).steps
    way = "uprobe_multi" if features["uprobe_multi"].available else "perf_events"
    assert ("uprobes", way) in [(step.what, step.taken) for step in steps]
    with subprocess.Popen(
        [openssl_program(), "plain", "40"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        port = int(process.stdout.readline())
        with seeing(process.pid, without=without) as seen:
            process.stdin.write("x")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            for role in (SERVER, CLIENT):
                found = seen.wait_for(40, role)
                assert [it.path for it in found] == [f"/said/{i}" for i in range(40)]
                assert [it.status for it in found] == [200 + i for i in range(40)]
                assert port in {found[0].remote_port, found[0].local_port}
            assert seen.lost == 0
        process.stdin.write("x")


def test_programs_of_tls_are_only_loaded_for_a_session_that_wants_them() -> None:
    """The first has none, a second one adds them to the same hub, and a third finds them there."""
    with subprocess.Popen(
        [openssl_program(), "plain", "5"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdout.readline()
        with seeing(process.pid, tls="false") as plain:
            assert LATE not in plain.collector.bpf_object.program_stats()
            with seeing(process.pid) as seen, seeing(process.pid) as other:
                assert seen.collector.bpf_object.hub is plain.collector.bpf_object.hub
                assert LATE in plain.collector.bpf_object.program_stats()
                process.stdin.write("x")
                process.stdin.flush()
                assert process.stdout.readline() == "done\n"
                for one in (seen, other):
                    assert len(one.wait_for(5, CLIENT)) == 5
                wait_until(
                    lambda: not seen.collector.bpf_object.object.map("ssl_objects").read()[0].size
                )
            plain.drain()
            assert plain.requests == []
        process.stdin.write("x")


def test_what_the_kernel_encrypts_is_seen_with_its_bodies() -> None:
    """Kernels without TLS leave it to OpenSSL, which asks them for it all the same."""
    with subprocess.Popen(
        [openssl_program(), "kernel", "20"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        port = int(process.stdout.readline())
        with seeing(process.pid) as seen:
            process.stdin.write("x")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            for role in (SERVER, CLIENT):
                found = seen.wait_for(20, role)
                assert [it.path for it in found] == [f"/said/{i}" for i in range(20)]
                assert {it.response_body_bytes for it in found} == {1000}
                assert {(it.tls, it.status, it.outcome) for it in found} == {(1, 200, COMPLETE)}
                assert port in {found[0].remote_port, found[0].local_port}
        process.stdin.write("x")
