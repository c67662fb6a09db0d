"""Every failure has the status that the contract says; nothing that a caller sends is UNKNOWN."""

from __future__ import annotations

import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.e2e.test_refusals import has_tried_the_kernel, serves_a_good_request, start_request
from tests.support import (
    PATIENCE,
    SERVICE,
    Calls,
    RunningAgent,
    code_and_text,
    held_by,
    running_agent,
    start_collector,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

METHODS: Final = pb.DESCRIPTOR.services_by_name["EbpfService"].methods
TCP_METRICS: Final = pb.EBPF_COLLECTOR_KIND_TCP_METRICS
WITH_TEXT: Final = [
    method.name
    for method in METHODS
    if any(field.type == FieldDescriptor.TYPE_STRING for field in method.input_type.fields)
]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    limits = {"ended_sessions": "100ms", "cpu_percent": 1000, "concurrent_collectors": 4}
    config = {"limits": limits, "policy": {"host_scope": False}}
    with running_agent(tmp_path_factory.mktemp("codes") / "agent", config) as running:
        has_tried_the_kernel(running)
        yield running


def send(
    channel: grpc.Channel, method: str, wire: bytes, stream_s: float = 20
) -> tuple[grpc.StatusCode, str, list[bytes]]:
    """How a call with the request WIRE ends, and its answers. A stream is left after STREAM_S."""
    streams = pb.DESCRIPTOR.services_by_name["EbpfService"].methods_by_name[method].server_streaming
    call: Any = channel.unary_stream if streams else channel.unary_unary
    answers: list[bytes] = []
    try:
        answer = call(f"/{SERVICE}/{method}")(
            wire, timeout=(stream_s if streams else 60) * PATIENCE
        )
        answers.extend(answer if streams else [answer])
    except grpc.RpcError as error:
        refusal: Any = error
        return refusal.code(), refusal.details(), answers
    return grpc.StatusCode.OK, "", answers


@pytest.fixture(scope="module")
def channel(agent: RunningAgent) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(agent.address) as channel:
        yield channel


@pytest.mark.parametrize("method", WITH_TEXT)
@pytest.mark.parametrize(
    "wire",
    [
        b"\xff",  # no tag
        b"\x0a\x05abc",  # a text that is cut off
        b"\x0a\x02\xc3\x28",  # a text that is not UTF-8
        b"\x0a\x03\xed\xa0\x80",  # a text that is a lone surrogate
        b"\x0b" * 1000,  # groups in groups
    ],
    ids=["no tag", "cut off", "not UTF-8", "surrogate", "nested"],
)
def test_bytes_that_are_no_request_are_an_invalid_argument(
    method: str, wire: bytes, channel: grpc.Channel
) -> None:
    code, text, _ = send(channel, method, wire)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith(f"request: these {len(wire)} bytes are not a coral.mesh.v1.")


NUL: Final[list[tuple[str, Message, str]]] = [
    ("StartCollector", start_request({"cgroup": "a\0b"}), "config[\"cgroup\"]: 'a\\x00b'"),
    ("StartCollector", start_request({"comm": "\0"}), "config[\"comm\"]: '\\x00'"),
    ("StartCollector", start_request({"a\0b": "1"}), "config: the key: 'a\\x00b'"),
    ("StartCollector", start_request(service_name="web\0"), "service_name: 'web\\x00'"),
    ("StartCollector", start_request(agent_id="\0"), "agent_id: '\\x00'"),
    ("StopCollector", pb.StopEbpfCollectorRequest(collector_id="a\0"), "collector_id: 'a\\x00'"),
    ("RenewCollector", pb.RenewCollectorRequest(collector_id="a\0"), "collector_id: 'a\\x00'"),
    *(
        (
            method,
            pb.EbpfEventStreamRequest(filter=pb.EventFilter(comms=["nginx", "a\0"])),
            "filter.comms: 'a\\x00'",
        )
        for method in ("StreamEvents", "StreamEventBatches")
    ),
]


@pytest.mark.parametrize(("method", "request_", "told"), NUL)
def test_a_text_with_a_nul_is_an_invalid_argument(
    method: str, request_: Message, told: str, agent: RunningAgent
) -> None:
    assert code_and_text(agent, method, request_) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{told} is not accepted; give text without NUL",
    )


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (
            start_request({"comm": "no-such-comm"}, service_name="x" * 256),
            "service_name: 256 bytes are not accepted; give at most 128",
        ),
        (
            start_request({"comm": "no-such-comm"}, agent_id="x" * 129),
            "agent_id: 129 bytes are not accepted; give at most 128",
        ),
        (
            start_request({"comm": "no-such-comm"}, service_name="a\x1b[31mb"),
            "service_name: 'a\\x1b[31mb' is not accepted; give printable text",
        ),
        (
            start_request({"comm": "a\nb"}),
            (
                "config[\"comm\"]: 'a\\nb' is not accepted; give a command name of at most 15 "
                "bytes, in printable characters"
            ),
        ),
        (
            start_request({"x" * 129: ""}),
            "config: the key: 129 bytes are not accepted; give at most 128",
        ),
        (
            start_request({f"k{number}": "" for number in range(65)}),
            "config: 65 entries are not accepted; give at most 64",
        ),
    ],
    ids=["service_name", "agent_id", "escape", "line break", "key", "keys"],
)
def test_texts_that_no_list_or_log_should_carry_are_an_invalid_argument(
    request_: Message, told: str, agent: RunningAgent
) -> None:
    assert code_and_text(agent, "StartCollector", request_) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        told,
    )


LONG: Final[list[tuple[str, Message]]] = [
    ("StartCollector", start_request({"include": "read," * 13_200})),
    ("StopCollector", pb.StopEbpfCollectorRequest(collector_id="x" * 66_000)),
    (
        "StreamEventBatches",
        pb.EbpfEventStreamRequest(filter=pb.EventFilter(pids=range(1 << 20, (1 << 20) + 22_000))),
    ),
]


@pytest.mark.parametrize(("method", "request_"), LONG, ids=["config", "id", "filter"])
def test_a_request_of_more_than_64_kib_is_refused_with_the_limit(
    method: str, request_: Message, agent: RunningAgent
) -> None:
    code, text = code_and_text(agent, method, request_)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "65,536" in text


@pytest.mark.parametrize("field", ["pids", "tids", "comms", "syscalls"])
def test_a_list_of_more_than_1024_items_is_refused_with_the_limit(
    field: str, agent: RunningAgent
) -> None:
    items: list[Any] = ["x"] * 1025 if field in ("comms", "syscalls") else [1] * 1025
    wanted = pb.EventFilter()
    getattr(wanted, field).extend(items)
    assert code_and_text(agent, "StreamEventBatches", pb.EbpfEventStreamRequest(filter=wanted)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"filter.{field}: 1,025 items are not accepted; give at most 1,024",
    )


@pytest.mark.parametrize("method", ["StreamEvents", "StreamEventBatches"])
@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        (
            "overflow",
            7,
            "OVERFLOW_DROP_OLDEST (0), OVERFLOW_DROP_NEWEST (1), OVERFLOW_END (2)",
        ),
        ("overflow", -1, "OVERFLOW_DROP_OLDEST (0), OVERFLOW_DROP_NEWEST (1), OVERFLOW_END (2)"),
        ("summaries", 9, "SUMMARIES_ROWS (0), SUMMARIES_COLUMNS (1)"),
    ],
)
def test_a_number_that_an_enum_does_not_have_is_an_invalid_argument(
    field: str, value: int, accepted: str, method: str, agent: RunningAgent
) -> None:
    request = pb.EbpfEventStreamRequest(**{field: value})  # type: ignore[arg-type]
    assert code_and_text(agent, method, request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"{field}: {value} is not accepted; give one of {accepted}",
    )


def test_columns_are_of_batches_alone(agent: RunningAgent) -> None:
    collector_id = start_collector(agent, pid=str(os.getpid())).collector_id
    request = pb.EbpfEventStreamRequest(
        collector_id=collector_id, summaries=pb.EbpfEventStreamRequest.SUMMARIES_COLUMNS
    )
    refusal = code_and_text(agent, "StreamEvents", request)
    agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=collector_id))
    assert refusal == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            "summaries: SUMMARIES_COLUMNS is not accepted; give SUMMARIES_ROWS, or call "
            "StreamEventBatches: a message of StreamEvents is one event"
        ),
    )


@pytest.mark.parametrize(
    ("seconds", "nanos", "accepted"),
    [
        *((seconds, 0, "more than 0s and at most 5m") for seconds in (-(1 << 62), -1, 0, 1 << 62)),
        (300, 1, "more than 0s and at most 5m"),
        (-1, -999_999_999, "more than 0s and at most 5m"),
        (301, -(1 << 31), "nanos of less than a second and of the same sign"),
        (1, -1, "nanos of less than a second and of the same sign"),
        (1, 1_000_000_000, "nanos of less than a second and of the same sign"),
    ],
)
def test_a_duration_far_from_any_lease_is_an_invalid_argument(
    seconds: int, nanos: int, accepted: str, agent: RunningAgent
) -> None:
    collector_id = start_collector(agent, pid=str(os.getpid())).collector_id
    start = start_request({"pid": os.getpid()})
    renew = pb.RenewCollectorRequest(collector_id=collector_id)
    for method, request in (("StartCollector", start), ("RenewCollector", renew)):
        request.duration.seconds, request.duration.nanos = seconds, nanos
        code, text = code_and_text(agent, method, request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert text.startswith("duration: ")
        assert f" is not accepted; give {accepted}" in text
    agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=collector_id))


@pytest.mark.parametrize("method", ["StreamEvents", "StreamEventBatches"])
def test_a_number_that_was_not_given_out_is_out_of_range(method: str, agent: RunningAgent) -> None:
    collector_id = start_collector(agent, comm="no-such-comm").collector_id
    request = pb.EbpfEventStreamRequest(collector_id=collector_id, after_seq=1)
    assert code_and_text(agent, method, request) == (
        grpc.StatusCode.OUT_OF_RANGE,
        "after_seq: 1 is beyond 0, the last event so far",
    )
    agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=collector_id))


# Whatever a caller sends

SEED: Final = 20_261_125
FUZZ_S: Final = float(os.environ.get("CORAL_FUZZ_S", "5"))
STALL_S: Final = 0.05
TEXTS: Final = (
    *("", "a\0b", "\x7f\n", "é" * 40, "x" * 5000, "host", "true", "1", "-1", "9" * 99, "²", "1e9"),
    *("\x1b[31m", "[/x]", "a\u202eb", "/", "../..", "1,2,3", "," * 5000, "1," * 20_000, "9" * 5000),
)
# Every option of every kind, with values that are accepted, at least with some others.
OPTIONS: Final[dict[str, tuple[str, ...]]] = {
    "pid": (str(os.getpid()), str(os.getppid())),
    "comm": ("no-such-comm", "[/x]"),
    "cgroup": ("/", ".", "no/such"),
    "scope": ("host",),
    "interval": ("100ms", "1s", "60s"),
    "mode": ("events", "summaries"),
    "ring": ("64KiB", "1MiB", "256MiB"),
    "top": ("0", "1", "10240"),
    "entries": ("1", "100", "10240"),
    "include": ("read", "getppid,futex", ",".join(["openat"] * 5000)),
    "exclude": ("read", "getppid,futex"),
    "min_duration": ("0s", "1ms", "3600s"),
    "sample": ("1", "10", "1000000"),
    "by": ("connection", "peer"),
    "prometheus": ("service", "peer"),
    "routes": ("/a/{id}", "/*/b/**", "/{}"),
    "max_children": ("1", "100", "10000"),
    "frequency": ("1", "99", "999"),
    "stack_bytes": ("0", "512", "16KiB", "28KiB"),
    "event": ("cpu-clock", "cycles"),
    "pod": ("shop/web-1", "shop/web-1/app"),
    "pods": ("shop?app=web", "shop?app in (web, api),!old"),
    "namespace": ("shop",),
    "workload": ("shop/deploy/web", "shop/statefulset/db"),
    "container": ("0123456789ab",),
    **dict.fromkeys(
        (
            "follow_children",
            "until_exit",
            "from_exec",
            "errors_only",
            "tls",
            "include_query",
            "include_host",
            "traceparent",
        ),
        ("true", "false"),
    ),
}
ALLOWED: Final = {
    grpc.StatusCode.OK,
    grpc.StatusCode.PERMISSION_DENIED,  # to watch the host
    grpc.StatusCode.FAILED_PRECONDITION,  # nothing here knows the names of pods
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # of a stream that goes on
}


# Without these, the fuzzer would not have come far.
EXPECTED: Final = (
    ("StartCollector", "OK"),
    ("StartCollector", "INVALID_ARGUMENT"),
    ("StopCollector", "OK"),
    ("RenewCollector", "OK"),
    ("RenewCollector", "NOT_FOUND"),
    ("StreamEvents", "DEADLINE_EXCEEDED"),
    ("StreamEventBatches", "DEADLINE_EXCEEDED"),
    ("StreamEventBatches", "INVALID_ARGUMENT"),
    ("WatchCollectors", "DEADLINE_EXCEEDED"),
    ("ListCollectors", "OK"),
    ("GetCapabilities", "OK"),
)


class Fuzzer:
    """Random requests: good ones with a few odd values or many options, messages of odd values, or
    odd bytes."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.ids = deque(["5f3a"], maxlen=2)  # of collectors, some of them at work

    def wire(self, message: type[Message]) -> bytes:
        """A request for a method that takes a MESSAGE."""
        choice = self._random.random()
        if choice < 0.1:
            return self._random.randbytes(self._random.randrange(60))
        made = self._good(message) if choice < 0.6 else message()
        self._change(made, 0.15 if choice < 0.6 else 0.7)
        wire = bytearray(made.SerializeToString())
        for _ in range(self._random.randrange(4) if choice < 0.2 and wire else 0):
            wire[self._random.randrange(len(wire))] = self._random.randrange(256)
        return bytes(wire)

    def _good(self, message: type[Message]) -> Message:
        """A request that is served, if its collector is at work."""
        if message is pb.StartEbpfCollectorRequest:
            config = {"pid": str(os.getpid())}
            for _ in range(self._random.choice([0, 0, 1, 2, 4])):
                config.update([self._option()])
            kind = self._random.choice([pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, TCP_METRICS])
            return start_request(config, kind=kind, duration_s=10)
        made = message()
        if "collector_id" in message.DESCRIPTOR.fields_by_name:
            made.collector_id = self._random.choice(self.ids)  # type: ignore[attr-defined]
        return made

    def _change(self, made: Message, share: float) -> None:
        for field in made.DESCRIPTOR.fields:
            if self._random.random() < share:
                self._fill(made, field)

    def _fill(self, made: Message, field: Any) -> None:
        if field.message_type and field.message_type.GetOptions().map_entry:
            for _ in range(self._random.randrange(3)):
                key, value = self._option()
                getattr(made, field.name)[self._text(key)] = value
        elif field.message_type:
            self._change(getattr(made, field.name), 0.7)
        elif field.is_repeated:
            getattr(made, field.name).extend(
                self._value(field) for _ in range(self._random.randrange(4))
            )
        else:
            setattr(made, field.name, self._value(field))

    def _option(self) -> tuple[str, str]:
        key = self._random.choice(sorted(OPTIONS))
        return key, self._text(*OPTIONS[key])

    def _value(self, field: FieldDescriptor) -> object:
        if field.type == FieldDescriptor.TYPE_STRING:
            known = self.ids if field.name == "collector_id" else ["", "no-such-service"]
            return self._text(*known)
        if field.type == FieldDescriptor.TYPE_BOOL:
            return self._random.random() < 0.5
        if field.enum_type:
            return self._random.choice([0, 0, 1, 1, 1, 2, 4, 7, 99, -1, (1 << 31) - 1])
        bits = 31 if field.type == FieldDescriptor.TYPE_INT32 else 63
        unsigned = field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64)
        if unsigned:
            return self._random.choice([0, 1, 5, 1 << 16, (1 << 32) - 1])
        most = 1 << bits
        return self._random.choice([0, 1, 1, 10, 299, -1, most - 1, -most])

    def _text(self, *likely: str) -> str:
        if self._random.random() < 0.7:
            return self._random.choice(likely)
        return self._random.choice(TEXTS)


@pytest.mark.timed
@pytest.mark.timeout(FUZZ_S * PATIENCE + 120)
def test_no_request_is_unknown_or_internal_and_the_agent_lives_on(
    agent: RunningAgent, channel: grpc.Channel, calls: Callable[..., Calls]
) -> None:
    answers: Counter[tuple[str, str]] = Counter()
    until_s = time.monotonic() + FUZZ_S * PATIENCE

    def fuzz(seed: int) -> None:
        fuzzer = Fuzzer(seed)
        while time.monotonic() < until_s:
            for method in METHODS:
                wire = fuzzer.wire(getattr(pb, method.input_type.name))
                code, text, messages = send(channel, method.name, wire, stream_s=0.05)
                assert code in ALLOWED, (method.name, seed, wire, text)
                answers[method.name, code.name] += 1
                if code is grpc.StatusCode.OK and method.name == "StartCollector":
                    started = pb.StartEbpfCollectorResponse.FromString(messages[0])
                    fuzzer.ids.append(started.collector_id)

    with ThreadPoolExecutor(5) as pool:
        probed = pool.submit(probe, agent, until_s)
        list(pool.map(fuzz, range(SEED, SEED + 4)))
        latencies_s = probed.result()
    print(f"{sum(answers.values())} requests:", *sorted(answers.items()), sep="\n")
    stalls = sum(latency_s > STALL_S for latency_s in latencies_s)
    print(
        f"{len(latencies_s)} calls of another client, {stalls} longer than {STALL_S:g} s, the "
        f"longest {max(latencies_s):.3f} s"
    )
    # Every one of them succeeded. Most come in time on a busy machine too, where four threads of
    # this process compete with the probe.
    assert len(latencies_s) > FUZZ_S
    assert stalls < len(latencies_s) / 4
    for method, code in EXPECTED:
        assert answers[method, code], f"the fuzzer had no {code} of {method}"
    stop_everything(agent)
    # A session that has ended detaches what took long to attach after its answer.
    wait_until(lambda: not any(held_by(agent.process.pid).values()))
    assert [line for line in agent.log() if line["level"] in ("error", "critical")] == []
    serves_a_good_request(agent, calls("getppid", 1234))


def probe(agent: RunningAgent, until_s: float) -> list[float]:
    """How long the calls of a well-behaved client take, in seconds, until that time of the
    monotonic clock."""
    latencies_s = []
    with grpc.insecure_channel(agent.address) as channel:
        call: Any = channel.unary_unary(f"/{SERVICE}/StopCollector")
        wire = pb.StopEbpfCollectorRequest(collector_id="5f3a").SerializeToString()
        while time.monotonic() < until_s:
            began_s = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                call(wire, timeout=60 * PATIENCE)
            latencies_s.append(time.monotonic() - began_s)
            refusal: Any = caught.value
            assert refusal.code() is grpc.StatusCode.NOT_FOUND
            time.sleep(0.01)
    return latencies_s


def test_the_fuzzer_knows_every_option(agent: RunningAgent) -> None:
    answer = agent.call("GetCapabilities", pb.GetCapabilitiesRequest())
    options = {option.name for kind in answer.collectors for option in kind.options}
    assert options == set(OPTIONS)


def stop_everything(agent: RunningAgent) -> None:
    """Stops what the fuzzer has started, and waits until nothing is at work."""
    for info in agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors:
        with suppress(grpc.RpcError):  # its lease may end before
            agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=info.collector_id))
    wait_until(lambda: not agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors)
