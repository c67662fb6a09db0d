"""A client that is not ours: `buf curl` finds the service by reflection and speaks plain gRPC."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support import INSECURE, Calls, RunningAgent, running_agent, wait_until

SERVICE: Final = "coral.mesh.v1.EbpfService"
METHODS: Final = (
    "GetCapabilities",
    "ListCollectors",
    "ListPods",
    "RenewCollector",
    "StartCollector",
    "StopCollector",
    "StreamEventBatches",
    "StreamEvents",
    "WatchCollectors",
)
INVALID_ARGUMENT: Final = 3 << 3  # buf curl's exit status: the gRPC code, three bits to the left

# The contract as others have it, without what this project adds.
FIXED_CONTRACT: Final = """\
syntax = "proto3";
package coral.mesh.v1;
import "google/protobuf/duration.proto";
import "google/protobuf/timestamp.proto";

service EbpfService {
  rpc StartCollector(StartEbpfCollectorRequest) returns (StartEbpfCollectorResponse);
  rpc StopCollector(StopEbpfCollectorRequest) returns (StopEbpfCollectorResponse);
  rpc StreamEvents(EbpfEventStreamRequest) returns (stream EbpfEvent);
}
enum EbpfCollectorKind {
  EBPF_COLLECTOR_KIND_UNSPECIFIED = 0;
  EBPF_COLLECTOR_KIND_SYSCALL_STATS = 1;
}
message StartEbpfCollectorRequest {
  string agent_id = 1;
  string service_name = 2;
  EbpfCollectorKind kind = 3;
  map<string, string> config = 4;
  google.protobuf.Duration duration = 5;
}
message StartEbpfCollectorResponse {
  string collector_id = 1;
  google.protobuf.Timestamp expires_at = 2;
  bool supported = 3;
  string error = 4;
}
message StopEbpfCollectorRequest { string collector_id = 1; }
message StopEbpfCollectorResponse { bool success = 1; string error = 2; }
message EbpfEventStreamRequest { string collector_id = 1; }
message SyscallStats {
  string syscall_name = 1;
  uint64 call_count = 2;
  uint64 error_count = 3;
  uint64 total_duration_us = 4;
  map<string, string> labels = 5;
}
message EbpfEvent {
  google.protobuf.Timestamp timestamp = 1;
  string collector_id = 2;
  string agent_id = 3;
  string service_name = 4;
  oneof payload { SyscallStats syscall_stats = 10; }
}
"""

pytestmark = pytest.mark.usefixtures("nothing_left")


@dataclass(frozen=True)
class BufCurl:
    """`buf curl` at one address of an agent."""

    program: str
    address: str

    def command(self, *arguments: str, method: str = "", data: object = None) -> list[str]:
        url = "http://localhost"
        if self.address.startswith("unix:"):
            arguments += ("--unix-socket", self.address.removeprefix("unix:"))
        else:
            url = f"http://{self.address}"
        if data is not None:
            arguments += ("--data", json.dumps(data))
        return [
            *(self.program, "curl", "--protocol", "grpc", "--http2-prior-knowledge", *arguments),
            f"{url}/{method}" if method else url,
        ]

    def run(self, *arguments: str) -> list[str]:
        """What it prints, line by line."""
        result = subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=60, check=False
        )
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.split()

    def call(self, method: str, data: object, *arguments: str) -> Any:
        """The one answer of a method."""
        (answer,) = Stream(self, method, data, *arguments).messages()
        return answer


class Stream:
    """A call under way."""

    def __init__(self, curl: BufCurl, method: str, data: object, *arguments: str) -> None:
        self._process = subprocess.Popen(
            curl.command(*arguments, method=method, data=data),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def messages(self) -> list[Any]:
        """Waits for the end of the call, which must be good; its messages."""
        out, err = self._process.communicate(timeout=60)
        assert (self._process.returncode, err) == (0, "")
        decoder, found, rest = json.JSONDecoder(), [], out.strip()
        while rest:
            message, end = decoder.raw_decode(rest)
            found.append(message)
            rest = rest[end:].strip()
        return found


@pytest.fixture(scope="module")
def buf() -> str:
    beside_python = Path(sys.executable).with_name("buf")
    program = str(beside_python) if beside_python.exists() else shutil.which("buf")
    assert program, "buf is missing: pip install buf-bin (the extra `dev` has it)"
    return program


@pytest.fixture(scope="module")
def two_addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """An agent that listens on TCP and on a socket."""
    directory = tmp_path_factory.mktemp("generic")
    listen = ("--listen", "127.0.0.1:0", "--listen", f"unix:{directory}/agent.sock")
    with running_agent(
        directory / "agent", {"agent_id": "node-7", "auth": INSECURE}, *listen
    ) as agent:
        yield agent


@pytest.fixture(params=["tcp", "unix"])
def curl(request: pytest.FixtureRequest, buf: str, two_addresses: RunningAgent) -> BufCurl:
    (told,) = [line for line in two_addresses.log() if line["event"] == "listening"]
    addresses = told["grpc"]
    assert isinstance(addresses, list)
    return BufCurl(buf, addresses[("tcp", "unix").index(request.param)])


def syscall_calls(rows: list[Any]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for row in rows:
        counted[row["syscallName"]] += int(row["callCount"])
    return counted


def test_reflection_tells_the_services_and_their_methods(curl: BufCurl) -> None:
    assert curl.run("--list-services") == [
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    ]
    methods = curl.run("--list-methods")
    assert [m for m in methods if m.startswith(SERVICE)] == [f"{SERVICE}/{m}" for m in METHODS]


def test_health_is_serving(curl: BufCurl) -> None:
    for service in ("", SERVICE):
        answer = curl.call("grpc.health.v1.Health/Check", {"service": service})
        assert answer == {"status": "SERVING"}


def test_a_collector_is_started_read_as_events_and_as_batches_and_stopped(
    curl: BufCurl, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 12_345, "openat", 17)
    config = {"pid": str(running.pid), "interval": "100ms"}
    started = curl.call(
        f"{SERVICE}/StartCollector",
        {"kind": "EBPF_COLLECTOR_KIND_SYSCALL_STATS", "config": config, "duration": "60s"},
    )
    assert started["supported"] is True
    about = {"collectorId": started["collectorId"]}
    event_stream = Stream(curl, f"{SERVICE}/StreamEvents", about)
    batch_stream = Stream(curl, f"{SERVICE}/StreamEventBatches", about)
    running.go()
    running.finish()
    (listed,) = curl.call(f"{SERVICE}/ListCollectors", {})["collectors"]
    assert listed["collectorId"] == started["collectorId"]
    assert listed["config"] == config
    # A stream can be asked for as long as the collector is at work, and has all from its start.
    wait_for_subscribers(curl, 2)
    assert curl.call(f"{SERVICE}/StopCollector", about) == {"success": True}

    *events, last_event = event_stream.messages()
    *batches, last_batch = batch_stream.messages()
    events = [event for event in events if "seq" in event]  # others say where the stream stands
    rows = [row for batch in batches for row in batch.get("syscallStats", ())]
    for told in ([event["syscallStats"] for event in events], rows):
        counted = syscall_calls(told)
        assert (counted["getppid"], counted["openat"]) == (12_345, 17)
        errors = [row for row in told if row["syscallName"] == "openat"]
        assert sum(int(row["errorCount"]) for row in errors) == 17
        assert {row["labels"]["pid"] for row in told} == {str(running.pid)}
        assert {row["labels"]["comm"] for row in told} == {"calls"}
    assert [int(event["seq"]) for event in events] == list(range(1, len(rows) + 1))
    assert {event["agentId"] for event in events} == {"node-7"}
    end = {"reason": "REASON_STOPPED", "produced": str(len(rows))}
    assert last_event["end"] == end
    assert last_batch["end"] == end


def wait_for_subscribers(curl: BufCurl, count: int) -> None:
    def there() -> bool:
        (listed,) = curl.call(f"{SERVICE}/ListCollectors", {})["collectors"]
        return len(listed.get("subscribers", ())) == count

    wait_until(there)


def test_a_refusal_is_told_with_its_code_and_text(curl: BufCurl) -> None:
    result = subprocess.run(
        curl.command(method=f"{SERVICE}/StartCollector", data={"config": {"scope": "host"}}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == INVALID_ARGUMENT
    assert json.loads(result.stderr)["code"] == "invalid_argument"
    assert json.loads(result.stderr)["message"].startswith("kind: 0 is not accepted; give one of ")


def test_a_client_of_the_fixed_contract_alone_gets_the_exact_count(
    curl: BufCurl, calls: Callable[..., Calls], tmp_path: Path
) -> None:
    """It knows neither reflection, nor batches, nor any field that this project adds."""
    contract = tmp_path / "coral/mesh/v1/ebpf.proto"
    contract.parent.mkdir(parents=True)
    contract.write_text(FIXED_CONTRACT)
    schema = ("--schema", str(tmp_path))
    running = calls("getppid", 1_000)
    started = curl.call(
        f"{SERVICE}/StartCollector",
        {
            "agentId": "node-7",
            "serviceName": "checkout",
            "kind": "EBPF_COLLECTOR_KIND_SYSCALL_STATS",
            "config": {"pid": str(running.pid), "until_exit": "true"},
        },
        *schema,
    )
    events = Stream(
        curl, f"{SERVICE}/StreamEvents", {"collectorId": started["collectorId"]}, *schema
    )
    wait_for_subscribers(curl, 1)
    running.go()
    running.finish()
    *told, last = events.messages()
    told = [event for event in told if "syscallStats" in event]  # others have fields it cannot see
    assert syscall_calls([event["syscallStats"] for event in told])["getppid"] == 1_000
    assert {event["serviceName"] for event in told} == {"checkout"}
    # To such a client the end is an event without a payload.
    assert last.keys() == {"timestamp", "collectorId", "agentId", "serviceName"}
