"""Metrics and spans as an OTLP receiver gets them, a gRPC server of OpenTelemetry's own stubs."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import (
    metrics_service_pb2,
    metrics_service_pb2_grpc,
)
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from prometheus_client.parser import text_string_to_metric_families

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.http_servers import free_port
from tests.prometheus import Query, value_of, victoria_metrics
from tests.shop import port_of, shop, visitor
from tests.support import (
    ROOT,
    Calls,
    coral,
    running_agent,
    samples,
    scrape,
    start_collector,
    wait_until,
)

KIND: Final = pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
TRACE: Final = "0af7651916cd43dd8448eb211c80319c"
VISIT: Final = f"""
import http.client
c = http.client.HTTPConnection("127.0.0.1", {{port}})
for number, path in enumerate({{paths}}):
    headers = {{{{"traceparent": "00-{TRACE}-" + format(number + 1, "016x") + "-01"}}}}
    c.request("GET", path, headers=headers)
    c.getresponse().read()
c.request("GET", "/untraced")
c.getresponse().read()
"""

pytestmark = pytest.mark.usefixtures("nothing_left")


class Receiver(
    metrics_service_pb2_grpc.MetricsServiceServicer, trace_service_pb2_grpc.TraceServiceServicer
):
    """Keeps what it is sent. Both services have one method, Export, so the request tells them
    apart."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []
        self.spans: list[Any] = []
        self.metadata: dict[str, str] = {}
        self.refuse: grpc.StatusCode | None = None

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802  gRPC's name
        self.metadata = {one.key: one.value for one in context.invocation_metadata()}
        if self.refuse:
            context.abort(self.refuse, "not now")
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            self.spans += [
                (_attributes(resource.resource)["service.name"], span)
                for resource in request.resource_spans
                for span in resource.scope_spans[0].spans
            ]
            return trace_service_pb2.ExportTraceServiceResponse()
        self.metrics.append(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def value(self, service: str, name: str, **attributes: str) -> float | None:
        """The last value of a sum."""
        for request in self.metrics[::-1]:
            for resource in request.resource_metrics:
                if _attributes(resource.resource)["service.name"] != service:
                    continue
                for metric in resource.scope_metrics[0].metrics:
                    for point in metric.sum.data_points if metric.name == name else ():
                        if attributes.items() <= _attributes(point).items():
                            return float(point.as_double)
        return None


def _attributes(of: Any) -> dict[str, Any]:
    return {one.key: one.value.string_value or one.value.int_value for one in of.attributes}


@contextmanager
def receiving(
    address: str, receiver: Receiver, credentials: grpc.ServerCredentials | None = None
) -> Iterator[int]:
    """A server of both services; yields its port."""
    server = grpc.server(ThreadPoolExecutor(2))
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)  # type: ignore[no-untyped-call]
    if credentials:
        port = server.add_secure_port(address, credentials)
    else:
        port = server.add_insecure_port(address)
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


def tapped(pids: str) -> dict[str, str]:
    """Options of a session that sees traces."""
    return {"pid": pids, "mode": "events", "traceparent": "true", "interval": "100ms"}


def exported(agent: Any, signal: str, result: str) -> float:
    (value,) = samples(scrape(agent), f"coral_agent_otlp_{result}_total", signal=signal).values()
    return value


@contextmanager
def directly(endpoint: str, _directory: Path) -> Iterator[str]:
    """The agent sends to ENDPOINT itself."""
    yield endpoint


@contextmanager
def by_a_collector(endpoint: str, directory: Path) -> Iterator[str]:
    """A collector that decodes what it gets over gRPC, and sends it on to ENDPOINT; yields its
    own."""
    program = Path(str(files("rotel") / "rotel-agent"))
    program.chmod(0o755)  # as its package does
    grpc_port, http_port = free_port(), free_port()
    options = {
        "otlp-grpc-endpoint": f"127.0.0.1:{grpc_port}",
        "otlp-http-endpoint": f"127.0.0.1:{http_port}",
        "exporter": "otlp", "otlp-exporter-endpoint": endpoint,
        "pid-file": directory / "rotel.pid", "log-file": directory / "rotel.log",
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    log = (directory / "rotel.out").open("wb")
    with log, subprocess.Popen([program, "start", *words], stdout=log, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{grpc_port}"
        finally:
            process.terminate()


@pytest.mark.parametrize("way", [directly, by_a_collector])
def test_each_traced_request_is_a_span_of_either_side(
    way: Callable[[str, Path], AbstractContextManager[str]], tmp_path: Path
) -> None:
    receiver = Receiver()
    with (
        receiving("127.0.0.1:0", receiver) as port,
        way(f"http://127.0.0.1:{port}", tmp_path) as endpoint,
        running_agent(tmp_path / "agent", {"otlp": {"endpoint": endpoint}}) as agent,
        shop() as server,
        visitor() as client,
    ):
        pids = f"{server.pid},{client.pid}"
        start_collector(agent, 60, "shop", KIND, **tapped(pids))
        paths = ["/orders/1", "/missing", "/bad", "/slow"]
        client.do(f"exec({VISIT.format(port=port_of(server), paths=paths)!r})")
        wait_until(lambda: len(receiver.spans) >= 8, timeout_s=30)
        wait_until(lambda: exported(agent, "spans", "sent") == 8, timeout_s=30)
        assert exported(agent, "spans", "lost") == 0
        shop_port = port_of(server)
    assert {service for service, _ in receiver.spans} == {"shop"}
    spans = [span for _, span in receiver.spans]
    assert len({span.span_id for span in spans}) == len(spans) == 8
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    for kind_of_span, pid in (
        (Span.SPAN_KIND_SERVER, server.pid),
        (Span.SPAN_KIND_CLIENT, client.pid),
    ):
        mine = sorted((s for s in spans if s.kind == kind_of_span), key=lambda s: s.parent_span_id)
        assert [int.from_bytes(span.parent_span_id) for span in mine] == [1, 2, 3, 4]
        found = [_attributes(span) for span in mine]
        assert [one["url.path"] for one in found] == paths
        assert [one["http.response.status_code"] for one in found] == [200, 404, 503, 200]
        assert {one["process.pid"] for one in found} == {pid}
        assert {one["server.port"] for one in found} == {shop_port}
        assert {one["network.peer.address"] for one in found} == {"127.0.0.1"}
        serves = kind_of_span == Span.SPAN_KIND_SERVER
        failed = [span.status.code == Status.STATUS_CODE_ERROR for span in mine]
        assert failed == [False, not serves, True, False]
        assert [one.get("error.type", "") for one in found] == [
            "",
            "" if serves else "404",
            "503",
            "",
        ]
        slow_ns = mine[3].end_time_unix_nano - mine[3].start_time_unix_nano
        assert slow_ns >= 50_000_000  # the server sleeps for that long
        if serves:
            assert mine[0].name == "GET /orders/{id}"
            assert found[0]["http.route"] == "/orders/{id}"
        else:
            assert mine[0].name == "GET"


def test_metrics_are_exact_and_carry_headers_over_tls(
    calls: Callable[..., Calls], tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-subj", "/CN=receiver", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    headers = tmp_path / "headers"
    headers.write_text("# for the receiver\nX-Api-Key: secret:1\n\n")
    receiver = Receiver()
    pair = [(key.read_bytes(), certificate.read_bytes())]
    running = calls("getppid", 123_456)
    with receiving("127.0.0.1:0", receiver, grpc.ssl_server_credentials(pair)) as port:
        otlp = {
            "endpoint": f"https://127.0.0.1:{port}", "ca_file": str(certificate),
            "headers_file": str(headers), "interval": "200ms",
        }  # fmt: skip
        with running_agent(tmp_path / "agent", {"otlp": otlp}) as agent:
            start_collector(agent, pid=str(running.pid), interval="100ms", until_exit="true")
            running.go()
            running.finish()
            wait_until(
                lambda: (
                    receiver.value("calls", "coral.syscall.calls", syscall="getppid") == 123_456
                ),
                timeout_s=30,
            )
            wait_until(lambda: exported(agent, "metrics", "sent") > 0, timeout_s=30)
        assert receiver.metadata["x-api-key"] == "secret:1"
    assert receiver.value("coral-agent", "coral.agent.sessions_started", kind="syscall_stats") == 1


def test_a_real_receiver_has_the_names_and_figures_of_prometheus(
    calls: Callable[..., Calls], tmp_path: Path
) -> None:
    running = calls("getppid", 123_456, "openat", 78)
    with victoria_metrics(tmp_path / "victoria") as (endpoint, query):
        otlp = {"endpoint": endpoint, "protocol": "http", "interval": "200ms"}
        with running_agent(tmp_path / "agent", {"otlp": otlp}) as agent:
            start_collector(agent, pid=str(running.pid), interval="100ms", until_exit="true")
            running.go()
            running.finish()
            of = '{syscall="getppid"}'
            name = "coral_syscall_calls_total"
            wait_until(lambda: value_of(query(f"sum({name}{of})")) == 123_456, timeout_s=60)
            seconds = "coral_syscall_duration_seconds"
            assert value_of(query(f"sum({seconds}_count{of})")) == 123_456
            assert value_of(query(f'sum({seconds}_bucket{of[:-1]},le="+Inf"}})')) == 123_456
            failed = 'sum(coral_syscall_errors_total{syscall="openat",class="not_found"})'
            assert value_of(query(failed)) == 78
            exposed = {
                one.name
                for family in text_string_to_metric_families(scrape(agent))
                for one in family.samples
            }
            # Each export carries everything that there was at its moment.
            wait_until(lambda: exposed <= stored_names(query), timeout_s=60)
            assert exported(agent, "metrics", "sent") > 0


def stored_names(query: Query) -> set[str]:
    """The names of all metrics that were stored."""
    return {
        one["metric"]["name"]
        for one in query(
            'label_replace(count by (__name__) ({__name__!=""}), "name", "$1", "__name__", "(.*)")'
        )
    }


def test_spans_wait_for_a_receiver_that_comes_later_and_refused_ones_are_counted(
    tmp_path: Path,
) -> None:
    receiver = Receiver()
    with receiving("127.0.0.1:0", Receiver()) as port:
        pass  # nobody listens there now
    with (
        running_agent(
            tmp_path / "agent", {"otlp": {"endpoint": f"http://127.0.0.1:{port}"}}
        ) as agent,
        shop() as server,
        visitor() as client,
    ):
        start_collector(agent, 60, "shop", KIND, **tapped(str(server.pid)))
        visit = VISIT.format(port=port_of(server), paths=["/a", "/b", "/c"])
        client.do(f"exec({visit!r})")
        told = wait_until(
            lambda: [line for line in agent.log() if line["event"] == "otlp: not accepted"],
            timeout_s=30,
        )
        assert told[0]["code"] == "UNAVAILABLE"
        with receiving(f"127.0.0.1:{port}", receiver):
            wait_until(lambda: len(receiver.spans) == 3, timeout_s=90)
            assert Counter(span.kind for _, span in receiver.spans) == {Span.SPAN_KIND_SERVER: 3}
            receiver.refuse = grpc.StatusCode.INVALID_ARGUMENT
            client.do(f"exec({visit!r})")
            wait_until(lambda: exported(agent, "spans", "lost") == 3, timeout_s=30)
            assert exported(agent, "spans", "sent") == 3
            receiver.refuse = None
            client.do(f"exec({visit!r})")
            wait_until(lambda: len(receiver.spans) == 6, timeout_s=30)
        assert agent.stop() == 0


@pytest.mark.parametrize(
    ("otlp", "problem"),
    [
        (
            "endpoint: collector",
            "otlp.endpoint: 'collector' is not accepted; give http://HOST:PORT",
        ),
        ("endpoint: ftp://a:1", "otlp.endpoint: 'ftp://a:1' is not accepted"),
        ("{endpoint: 'https://a:1', ca_file: /nowhere}", "otlp.ca_file: /nowhere: No such file"),
        ("{endpoint: 'http://a:1', headers_file: HEADERS}", "HEADERS: line 2 is not accepted"),
        ("interval: never", "otlp.interval: 'never'"),
    ],
)
def test_what_is_not_accepted_is_named(otlp: str, problem: str, tmp_path: Path) -> None:
    headers, config = tmp_path / "headers", tmp_path / "agent.yaml"
    headers.write_text("a: b\nno colon\n")
    config.write_text(f"otlp:\n  {otlp}\n".replace("HEADERS", str(headers)))
    if otlp.startswith("{"):
        config.write_text(f"otlp: {otlp}\n".replace("HEADERS", str(headers)))
    ran = subprocess.run(
        [*coral("agent"), "--listen", f"unix:{tmp_path}/agent.sock", "--metrics", "",
         "--config", str(config)],
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 2
    assert problem.replace("HEADERS", str(headers)) in ran.stderr
