"""What a caller sees when something is wrong (docs: design §8), over gRPC, from real agents.

Every refusal is told by its code and its text, and leaves nothing behind: no program, map or link
in the kernel, no session, no open file, while the agent lives on.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
import yaml
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from build_hook import clang_command
from coral.bpf.probing.features import probe
from coral.collectors.hierarchies import hierarchies
from coral.collectors.procfs import comm_of
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import (
    INSECURE,
    ROOT,
    Calls,
    RunningAgent,
    code_and_text,
    held_by,
    running_agent,
    sample,
    scrape,
    streaming,
    totals,
    wait_until,
)

SYSCALL_STATS: Final = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
TCP_METRICS: Final = pb.EBPF_COLLECTOR_KIND_TCP_METRICS
HTTP_LATENCY: Final = pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
CPU_PROFILE: Final = pb.EBPF_COLLECTOR_KIND_CPU_PROFILE
AGENT_ID: Final = "node-7"
TOKEN: Final = "correct horse battery staple"
AUTHORIZED: Final = (("authorization", f"Bearer {TOKEN}"),)
NO_ONE: Final = "no-such-comm"

pytestmark = pytest.mark.usefixtures("nothing_left")

KINDS: Final = (
    "one of EBPF_COLLECTOR_KIND_SYSCALL_STATS (1), EBPF_COLLECTOR_KIND_HTTP_LATENCY (2), "
    "EBPF_COLLECTOR_KIND_CPU_PROFILE (3), EBPF_COLLECTOR_KIND_TCP_METRICS (4)"
)
OPTIONS: Final = (
    "cgroup, comm, container, entries, errors_only, exclude, follow_children, from_exec, "
    "include, interval, min_duration, mode, namespace, pid, pod, pods, ring, sample, scope, "
    "top, until_exit, workload"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refusals")


@pytest.fixture(scope="module")
def agent(directory: Path) -> Iterator[RunningAgent]:
    """One agent for the whole module: what it refuses must not wear it down."""
    services = {
        "checkout": {"pid_file": str(directory / "checkout.pid")},
        "idle": {"comm": NO_ONE},
    }
    config = {"agent_id": AGENT_ID, "services": services}
    with running_agent(directory / "agent", config) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(directory: Path) -> Iterator[RunningAgent]:
    """An agent that keeps ended streams for 50 ms."""
    config = {"limits": {"ended_sessions": "50ms"}}
    with running_agent(directory / "impatient", config) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(agent: RunningAgent) -> Iterator[None]:
    with leaving_nothing(agent):
        yield


@contextmanager
def leaving_nothing(agent: RunningAgent) -> Iterator[None]:
    """Fails unless the living agent has as many sessions (none) and open files as it had before.
    Whatever it loaded or attached, it would hold open."""
    has_tried_the_kernel(agent)
    before = _open_files(agent)
    yield
    assert not agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors
    with suppress(AssertionError):
        wait_until(lambda: _open_files(agent) == before)
    assert _open_files(agent) == before


def has_tried_the_kernel(agent: RunningAgent) -> None:
    """Waits for the end of what an agent does in the kernel when it starts."""
    wait_until(lambda: "collector available" in agent.log_path.read_text())


def _open_files(agent: RunningAgent) -> Counter[str]:
    """The agent's open files but for sockets: those are its callers' connections."""
    found: Counter[str] = Counter()
    for link in Path(f"/proc/{agent.process.pid}/fd").iterdir():
        try:
            found[str(link.readlink())] += 1
        except FileNotFoundError:
            continue
    return Counter({name: n for name, n in found.items() if not name.startswith("socket:")})


def start_request(
    config: Mapping[str, object] | None = None,
    *,
    kind: int = SYSCALL_STATS,
    duration_s: float | None = None,
    agent_id: str = "",
    service_name: str = "",
) -> pb.StartEbpfCollectorRequest:
    request = pb.StartEbpfCollectorRequest(
        kind=kind,  # type: ignore[arg-type]
        agent_id=agent_id,
        service_name=service_name,
        config={name: str(value) for name, value in (config or {}).items()},
    )
    if duration_s is not None:
        request.duration.FromNanoseconds(int(duration_s * 1e9))
    return request


def start(agent: RunningAgent, config: Mapping[str, object], kind: int = SYSCALL_STATS) -> str:
    """Starts a collector; its id."""
    answer = agent.call("StartCollector", start_request(config, kind=kind))
    assert answer.supported
    return str(answer.collector_id)


def stop(agent: RunningAgent, collector_id: str) -> None:
    agent.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=collector_id))


def serves_a_good_request(agent: RunningAgent, running: Calls) -> None:
    """A collector of RUNNING counts exactly the calls that it makes."""
    collector_id = start(agent, {"pid": running.pid, "until_exit": "true"})
    request = pb.EbpfEventStreamRequest(collector_id=collector_id)
    with streaming(agent, "StreamEventBatches", request) as batches:
        running.go()
        made = running.finish()
        counted = totals(row for batch in batches for row in batch.syscall_stats)
    assert {name: counted[name] for name in made.calls} == dict(made.calls)


# A field that is not accepted


@pytest.mark.parametrize("kind", [0, 99])
def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(
    kind: int, agent: RunningAgent
) -> None:
    assert code_and_text(agent, "StartCollector", start_request({"scope": "host"}, kind=kind)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"kind: {kind} is not accepted; give {KINDS}",
    )


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("interval", "soon", "a duration from 100ms to 1m"),
        ("interval", "99ms", "a duration from 100ms to 1m"),
        ("interval", "2m", "a duration from 100ms to 1m"),
        ("until_exit", "yes", "true or false"),
        ("top", "-1", "a whole number from 0 to 10240"),
        ("top", "1e3", "a whole number from 0 to 10240"),
        ("scope", "world", "host"),
        ("comm", "sixteen-bytes-xx", "a command name of at most 15 bytes"),
        ("pid", "self", "process ids, such as 1234 or 1234,5678"),
        ("pid", "0", "process ids, such as 1234 or 1234,5678, from 1 to 4194303"),
        (
            "include",
            "openat,opennot",
            "names of system calls, comma-separated; this kernel has no 'opennot'",
        ),
    ],
)
def test_a_malformed_value_is_refused_with_what_is_accepted(
    name: str, value: str, accepted: str, agent: RunningAgent
) -> None:
    assert code_and_text(agent, "StartCollector", start_request({name: value})) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f'config["{name}"]: {value!r} is not accepted; give {accepted}',
    )


def test_a_cgroup_that_does_not_exist_is_refused(agent: RunningAgent) -> None:
    mounts = " or ".join(str(found.mount_point) for found in hierarchies())
    why = f" below {mounts}; there is none at this path"
    if not mounts:
        why = ": no hierarchy of cgroups is mounted here"
    assert code_and_text(agent, "StartCollector", start_request({"cgroup": "/no/such"})) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"config[\"cgroup\"]: '/no/such' is not accepted; give the path of a cgroup{why}",
    )


@pytest.mark.parametrize(
    ("key", "hint"),
    [("intervall", ' (did you mean "interval"?)'), ("colour", "")],
)
def test_an_unknown_key_is_refused_with_the_nearest_and_all_that_there_are(
    key: str, hint: str, agent: RunningAgent
) -> None:
    assert code_and_text(agent, "StartCollector", start_request({"scope": "host", key: "1"})) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f'config["{key}"]: there is no such option{hint}; accepted are {OPTIONS}',
    )


@pytest.mark.parametrize(
    ("duration_s", "told"), [(0, "0s"), (-1, "-1000ms"), (300.5, "300.5s"), (3600, "60m")]
)
def test_a_duration_beyond_the_limits_is_refused_with_the_limits(
    duration_s: float, told: str, agent: RunningAgent
) -> None:
    request = start_request({"scope": "host"}, duration_s=duration_s)
    assert code_and_text(agent, "StartCollector", request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            f"duration: {told} is not accepted; give more than 0s and at most 5m, this agent's "
            "limits.max_duration"
        ),
    )


def test_a_lease_cannot_be_renewed_beyond_the_limits_and_stays_as_it_was(
    agent: RunningAgent,
) -> None:
    answer = agent.call("StartCollector", start_request({"pid": os.getpid()}, duration_s=60))
    request = pb.RenewCollectorRequest(
        collector_id=answer.collector_id, duration=Duration(seconds=301)
    )
    assert code_and_text(agent, "RenewCollector", request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            "duration: 301s is not accepted; give more than 0s and at most 5m, this agent's "
            "limits.max_duration"
        ),
    )
    (listed,) = agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors
    assert listed.expires_at == answer.expires_at
    stop(agent, answer.collector_id)


def test_a_process_that_has_ended_is_refused(agent: RunningAgent) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert code_and_text(agent, "StartCollector", start_request({"pid": process.pid})) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            f"config[\"pid\"]: '{process.pid}' is not accepted; give the ids of processes that run "
            f"now: {process.pid} does not"
        ),
    )


def test_a_thread_is_refused_with_its_process(agent: RunningAgent) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        told = code_and_text(agent, "StartCollector", start_request({"pid": thread.native_id}))
    finally:
        done.set()
        thread.join()
    assert told == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            f"config[\"pid\"]: '{thread.native_id}' is not accepted; give the ids of processes: "
            f"{thread.native_id} is a thread of process {os.getpid()}"
        ),
    )


def test_a_zombie_is_refused_with_its_parent(agent: RunningAgent) -> None:
    with subprocess.Popen(["true"]) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: ") Z " in stat.read_text())
        assert code_and_text(agent, "StartCollector", start_request({"pid": process.pid})) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            (
                f"config[\"pid\"]: '{process.pid}' is not accepted; give the ids of processes that "
                f"run now: {process.pid} has ended, and is a zombie until its parent, process "
                f"{os.getpid()}, collects its exit status"
            ),
        )


def test_a_kernel_thread_is_refused(agent: RunningAgent) -> None:
    if comm_of(2) != "kthreadd":
        pytest.skip("this machine shows no kernel threads: it is a container")
    assert code_and_text(agent, "StartCollector", start_request({"pid": 2})) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            "config[\"pid\"]: '2' is not accepted; give the ids of processes: 2 is a kernel thread "
            "(kthreadd)"
        ),
    )


def test_two_targets_at_once_are_refused(agent: RunningAgent) -> None:
    request = start_request({"pid": os.getpid(), "comm": "nginx"})
    assert code_and_text(agent, "StartCollector", request) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            "config[\"comm\"]: 'nginx' is not accepted; give only one of pid, comm, cgroup, pod, "
            "pods, namespace, workload, container, scope; pid is given too"
        ),
    )


def test_no_target_is_refused_with_the_ways_to_name_one(agent: RunningAgent) -> None:
    assert code_and_text(agent, "StartCollector", start_request()) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        (
            "config[\"scope\"]: '' is not accepted; give a service_name, or one of pid, comm, "
            'cgroup, pod, pods, namespace, workload, container, or scope "host" for all processes'
        ),
    )


@pytest.mark.parametrize("letter", ["x", "é", "\n"])
def test_a_refusal_of_a_very_long_value_still_reaches_the_caller(
    letter: str, agent: RunningAgent
) -> None:
    code, text = code_and_text(agent, "StartCollector", start_request({"comm": letter * 30_000}))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith('config["comm"]: \'')
    assert " [...] " in text
    assert text.endswith("is not accepted; give a command name of at most 15 bytes")


# Something that is not here


def test_another_agents_id_is_not_found_with_this_agents(agent: RunningAgent) -> None:
    request = start_request({"scope": "host"}, agent_id="node-8")
    assert code_and_text(agent, "StartCollector", request) == (
        grpc.StatusCode.NOT_FOUND,
        "agent_id: 'node-8' is not here; this agent is 'node-7'",
    )


def test_an_unknown_service_is_not_found_with_the_nearest_names(agent: RunningAgent) -> None:
    code, text = code_and_text(agent, "StartCollector", start_request(service_name="chekout"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert text.startswith(
        "service_name: no process belongs to 'chekout', as a configured service, systemd unit, "
        "container, pod or listening command; the nearest names are checkout"
    )


def test_a_configured_service_without_processes_is_not_found(agent: RunningAgent) -> None:
    assert code_and_text(agent, "StartCollector", start_request(service_name="idle")) == (
        grpc.StatusCode.NOT_FOUND,
        "service_name: 'idle' is configured, and no process matches its rule now",
    )


def requests_for(collector_id: str) -> Mapping[str, Message]:
    """Every method that takes a collector's id, with a request for it."""
    return {
        "StopCollector": pb.StopEbpfCollectorRequest(collector_id=collector_id),
        "RenewCollector": pb.RenewCollectorRequest(collector_id=collector_id),
        "StreamEvents": pb.EbpfEventStreamRequest(collector_id=collector_id),
        "StreamEventBatches": pb.EbpfEventStreamRequest(collector_id=collector_id),
    }


@pytest.mark.parametrize("collector_id", ["", "5f3a"])
def test_an_unknown_collector_is_not_found(collector_id: str, agent: RunningAgent) -> None:
    for method, request in requests_for(collector_id).items():
        assert code_and_text(agent, method, request) == (
            grpc.StatusCode.NOT_FOUND,
            f"collector_id: this agent knows no collector {collector_id!r}",
        )


@pytest.mark.parametrize("end", ["STOPPED", "EXPIRED", "TARGET_EXITED"])
def test_an_ended_collector_is_not_found_and_says_how_it_ended(
    end: str, impatient: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 1)
    request = start_request(
        {"pid": running.pid, "until_exit": str(end == "TARGET_EXITED").lower()},
        duration_s=0.05 if end == "EXPIRED" else None,
    )
    collector_id = impatient.call("StartCollector", request).collector_id
    if end == "STOPPED":
        stop(impatient, collector_id)
    if end == "TARGET_EXITED":
        running.go()
        running.finish()
    everything = pb.ListCollectorsRequest(include_ended=True)
    wait_until(lambda: not impatient.call("ListCollectors", everything).collectors)
    for method, request_ in requests_for(collector_id).items():
        assert code_and_text(impatient, method, request_) == (
            grpc.StatusCode.NOT_FOUND,
            f"collector_id: {collector_id} has ended: {end}",
        )


# Something that this machine or this agent cannot do


def test_a_collector_that_is_not_possible_is_an_answer_and_not_an_error(tmp_path: Path) -> None:
    without = {"CORAL_WITHOUT": "cpu_clock"}
    with running_agent(tmp_path / "agent", environment=without) as agent:
        answer = agent.call("StartCollector", start_request({"scope": "host"}, kind=CPU_PROFILE))
    assert answer == pb.StartEbpfCollectorResponse(
        supported=False, error="cpu_profile: no timer (cpu_clock: switched off by CORAL_WITHOUT)"
    )


def test_cycles_are_refused_before_anything_is_attached(tmp_path: Path) -> None:
    """On a machine that has counters, as on one that has none."""
    without = {"CORAL_WITHOUT": "cpu_cycles"} if probe()["cpu_cycles"].available else {}
    request = start_request({"scope": "host", "event": "cycles"}, kind=CPU_PROFILE)
    with running_agent(tmp_path / "agent", environment=without) as agent:
        code, text = code_and_text(agent, "StartCollector", request)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert re.fullmatch(
            r"""config\["event"\]: 'cycles' is not accepted; give `cpu-clock`: .+""", text
        )
        reason = "switched off" if without else "this machine counts no CPU cycles"
        assert reason in text
        (here,) = [
            collector
            for collector in agent.call("GetCapabilities", pb.GetCapabilitiesRequest()).collectors
            if collector.kind == CPU_PROFILE
        ]
        (event,) = [option for option in here.options if option.name == "event"]
        assert here.supported
        assert (event.accepts, event.default_value) == ("cpu-clock or cycles", "cpu-clock")
        assert event.refused in text


IN_LEAVE: Final = "RAW_PROGRAM(coral_leave, struct pt_regs *regs, long ret)\n{\n"
UNCHECKED_POINTER: Final = """\
	__u32 key = ret;
	struct syscall_session *found = bpf_map_lookup_elem(map_of(syscall_sessions), &key);

	found->since = 0;
"""
ENDLESS_LOOP: Final = """\
	for (volatile int i = 1; i; i++)
		;
"""


def objects(directory: Path, edit: Callable[[str], str]) -> Path:
    """DIRECTORY with the agent's objects, where syscall_stats is made of an edited source."""
    original = (ROOT / "bpf/programs/syscall_stats/syscall_stats.bpf.c").read_text()
    source = directory / "syscall_stats.bpf.c"
    source.write_text(edit(original))
    assert source.read_text() != original
    subprocess.run(clang_command(source, source.with_suffix(".o")), check=True)
    copy_others(directory)
    return directory


def copy_others(directory: Path) -> None:
    """Copies the agent's objects, except that of system calls."""
    for name in ("features", "processes", "tcp_metrics"):
        shutil.copy(ROOT / f"bpf/programs/{name}/{name}.bpf.o", directory)


@contextmanager
def refusing_agent(directory: Path, objects_: Path, **environment: str) -> Iterator[RunningAgent]:
    """An agent with those objects, which must leave nothing behind while it lives."""
    environment["CORAL_BPF_OBJECTS"] = str(objects_)
    with running_agent(directory / "agent", environment=environment) as agent:
        scrape(agent)  # libuv keeps a descriptor in reserve from the first connection on
        with leaving_nothing(agent):
            yield agent


def test_what_the_verifier_rejects_is_told_with_its_last_lines(tmp_path: Path) -> None:
    edited = objects(
        tmp_path, lambda source: source.replace(IN_LEAVE, IN_LEAVE + UNCHECKED_POINTER)
    )
    with refusing_agent(tmp_path, edited) as agent:
        request = start_request({"pid": os.getpid()})
        code, text = code_and_text(agent, "StartCollector", request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    first, *tail = text.splitlines()
    assert first == "loading syscall_stats.bpf.o: EACCES (Permission denied)"
    assert len(tail) == 12
    assert tail[-2] == "R0 invalid mem access 'map_value_or_null'"
    assert tail[-1].startswith("processed ")
    # The agent's log has all that the verifier said, from the first instruction on.
    (logged,) = wait_until(
        lambda: [line for line in agent.log() if line["event"] == "refused by the kernel"]
    )
    assert str(logged["said"]).rstrip().endswith("\n".join(tail))
    assert "\n0: " in str(logged["said"])
    assert "\n0: " not in text


def with_unknown_hook(directory: Path) -> Path:
    """The objects, where a program of syscall_stats is for a tracepoint that no kernel has."""
    hook = 'SEC("raw_tp/sys_enter")'
    return objects(directory, lambda source: source.replace(hook, 'SEC("raw_tp/coral_no_such")'))


def test_a_typed_program_without_its_tracepoint_is_refused_with_both_names(tmp_path: Path) -> None:
    with refusing_agent(tmp_path, with_unknown_hook(tmp_path)) as agent:
        request = start_request({"pid": os.getpid()})
        code, text = code_and_text(agent, "StartCollector", request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert text == "loading coral_enter for the tracepoint coral_no_such: ESRCH (No such process)"


def test_a_hook_that_cannot_be_taken_is_tried_three_times_and_detaches_the_others(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    edited = with_unknown_hook(tmp_path)
    with refusing_agent(tmp_path, edited, CORAL_WITHOUT="tp_btf") as agent:
        request = start_request({"pid": os.getpid()})
        assert code_and_text(agent, "StartCollector", request) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "attaching coral_enter to coral_no_such (3 tries): ENOENT (No such file or directory)",
        )
        # It never was at work, so it counts neither as started nor as ended.
        assert sample(agent, "coral_agent_sessions_started_total") == 0
        assert sample(agent, "coral_agent_sessions_ended_total", reason="failed") == 0
        # The agent is as good as before: with the right object the same request succeeds.
        shutil.copy(ROOT / "bpf/programs/syscall_stats/syscall_stats.bpf.o", edited)
        serves_a_good_request(agent, calls("getppid", 1_000))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda _: b"", "it is no ELF object"),
        (lambda data: b"#!/bin/sh\n" + data[:-1], "it is no ELF object"),
        (lambda data: data[: len(data) // 2], "it is truncated"),
        (
            lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
            "its checksum is not that of the build",
        ),
    ],
    ids=["empty", "not-an-object", "truncated", "one-bit"],
)
def test_a_damaged_object_is_refused_with_its_name(
    damage: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    copy_others(tmp_path)
    data = (ROOT / "bpf/programs/syscall_stats/syscall_stats.bpf.o").read_bytes()
    (tmp_path / "syscall_stats.bpf.o").write_bytes(damage(data))
    with refusing_agent(tmp_path, tmp_path) as agent:
        request = start_request({"pid": os.getpid()})
        code, text = code_and_text(agent, "StartCollector", request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert text == f"opening syscall_stats.bpf.o: {said}; install the agent anew"


@pytest.mark.parametrize(
    ("name", "renamed", "lacking"),
    [
        (r"\bcoral_enter\b", "coral_begin", r"\bcoral_enter\b"),
        (r"(PERCPU_HASH, |map_of_session\()stats\b", r"\1figures", r"\bstats\b"),
    ],
    ids=["program", "map"],
)
def test_an_object_of_another_version_is_refused_with_what_it_lacks(
    name: str, renamed: str, lacking: str, tmp_path: Path
) -> None:
    edited = objects(tmp_path, lambda source: re.sub(name, renamed, source))
    with refusing_agent(tmp_path, edited) as agent:
        request = start_request({"pid": os.getpid()})
        code, text = code_and_text(agent, "StartCollector", request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "syscall_stats.bpf.o" in text
    assert re.search(lacking, text)


# Limits


def test_more_collectors_than_the_limit_are_refused_with_the_limit_and_the_request(
    tmp_path: Path,
) -> None:
    # The environment goes before the file.
    config = {"limits": {"concurrent_collectors": 3}}
    environment = {"CORAL__LIMITS__CONCURRENT_COLLECTORS": "1"}
    with running_agent(tmp_path / "agent", config, environment=environment) as agent:
        first = start(agent, {"pid": os.getpid()})
        request = start_request({"pid": os.getpid()})
        assert code_and_text(agent, "StartCollector", request) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            (
                "limits.concurrent_collectors is 1, and 1 are at work: stop one (`coral "
                "collectors` lists them, `coral stop ID` ends one), or wait for its lease to end, "
                "before you start this syscall_stats"
            ),
        )
        stop(agent, first)
        stop(agent, start(agent, {"pid": os.getpid()}))


def test_a_collector_that_is_just_starting_counts_once(tmp_path: Path) -> None:
    """The verifier takes its time with an endless loop; meanwhile one of two places is free."""
    edited = objects(tmp_path, lambda source: source.replace(IN_LEAVE, IN_LEAVE + ENDLESS_LOOP))
    request = start_request({"pid": os.getpid()})
    with (
        running_agent(
            tmp_path / "agent",
            {"limits": {"concurrent_collectors": 2}},
            environment={"CORAL_BPF_OBJECTS": str(edited)},
        ) as agent,
        ThreadPoolExecutor() as pool,
    ):
        has_tried_the_kernel(agent)
        first = pool.submit(code_and_text, agent, "StartCollector", request)
        wait_until(lambda: held_by(agent.process.pid)["map"])  # which it makes before
        second = start(agent, {"pid": os.getpid()}, kind=TCP_METRICS)
        assert not first.done(), "the second did not come while the first was starting"
        stop(agent, second)
        code, text = first.result()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "\nBPF program is too large. Processed 1000001 insn\n" in text


# Permission


def audit(agent: RunningAgent) -> list[tuple[object, object, object, object]]:
    """Level, code, method and reason of every refusal in the agent's log; each names its peer."""
    lines = [line for line in agent.log() if line["event"] == "refused"]
    assert all(str(line["peer"]).startswith(("unix:", "ipv4:127.0.0.1:")) for line in lines)
    return [(line["level"], line["code"], line.get("method"), line["reason"]) for line in lines]


def counted_refusals(agent: RunningAgent) -> int:
    """How many refusals the agent's log tells of, by lines and by numbers of lines left out."""
    counted = 0
    for line in agent.log():
        if line["event"] == "refused":
            counted += 1 + int(str(line.get("left_out", 0)))
        elif line["event"] == "refusals were left out of the log":
            counted += int(str(line["count"]))
    return counted


def test_what_the_policy_does_not_allow_is_denied_and_audited(tmp_path: Path) -> None:
    config = {"policy": {"collectors": ["syscall_stats"], "host_scope": False}}
    reasons = [
        "kind: http_latency is not allowed by this agent's policy.collectors, syscall_stats",
        "config[\"scope\"]: 'host' is not allowed by this agent's policy.host_scope",
    ]
    with running_agent(tmp_path / "agent", config) as agent, leaving_nothing(agent):
        for request, reason in zip(
            [start_request({"comm": NO_ONE}, kind=HTTP_LATENCY), start_request({"scope": "host"})],
            reasons,
            strict=True,
        ):
            assert code_and_text(agent, "StartCollector", request) == (
                grpc.StatusCode.PERMISSION_DENIED,
                reason,
            )
        wait_until(lambda: len(audit(agent)) == len(reasons))
        assert audit(agent) == [("warning", "PERMISSION_DENIED", None, r) for r in reasons]
        stop(agent, start(agent, {"comm": NO_ONE}))


@pytest.fixture(scope="module")
def guarded(directory: Path) -> Iterator[RunningAgent]:
    """An agent on TCP that wants a token."""
    (directory / "token").write_text(TOKEN + "\n")
    config = {"auth": {"token_file": str(directory / "token")}}
    with running_agent(directory / "guarded", config, "--listen", "127.0.0.1:0") as running:
        assert running.address.startswith("127.0.0.1:")
        has_tried_the_kernel(running)
        yield running


ALL_METHODS: Final = {
    method.name: getattr(pb, method.input_type.name)()
    for method in pb.DESCRIPTOR.services_by_name["EbpfService"].methods
}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "authorization: no token"),
        ("Bearer wrong", "authorization: the token is wrong"),
        (TOKEN, "authorization: the token is wrong"),
        (f"Bearer {TOKEN} ", "authorization: the token is wrong"),
        ("Bearer ", "authorization: the token is wrong"),
    ],
)
def test_without_the_token_every_method_is_refused_and_audited(
    given: str | None, reason: str, guarded: RunningAgent
) -> None:
    audited, counted = len(audit(guarded)), counted_refusals(guarded)
    metadata = [("authorization", given)] if given else []
    for method, request in ALL_METHODS.items():
        assert code_and_text(guarded, method, request, metadata) == (
            grpc.StatusCode.UNAUTHENTICATED,
            f"{reason}; send `authorization: Bearer TOKEN` with this agent's token",
        )
    wait_until(lambda: counted_refusals(guarded) == counted + len(ALL_METHODS))
    expected = [
        ("warning", "UNAUTHENTICATED", f"/coral.mesh.v1.EbpfService/{method}", reason)
        for method in ALL_METHODS
    ]
    logged = audit(guarded)[audited:]  # those that the log's rate leaves out are counted there
    assert logged == [line for line in expected if line in logged]
    assert TOKEN not in guarded.log_path.read_text()


def test_with_the_token_every_method_answers(
    guarded: RunningAgent, calls: Callable[..., Calls]
) -> None:
    audited = len(audit(guarded))
    running = calls("getppid", 10)
    request = start_request({"pid": running.pid})
    collector_id = guarded.call("StartCollector", request, AUTHORIZED).collector_id
    about = requests_for(collector_id)
    running.go()
    running.finish()
    with (
        streaming(guarded, "StreamEvents", about["StreamEvents"], AUTHORIZED) as events,
        streaming(
            guarded, "StreamEventBatches", about["StreamEventBatches"], AUTHORIZED
        ) as batches,
    ):
        listed = guarded.call("ListCollectors", pb.ListCollectorsRequest(), AUTHORIZED)
        assert [len(info.subscribers) for info in listed.collectors] == [2]
        guarded.call("GetCapabilities", pb.GetCapabilitiesRequest(), AUTHORIZED)
        guarded.call("RenewCollector", about["RenewCollector"], AUTHORIZED)
        with streaming(
            guarded, "WatchCollectors", pb.WatchCollectorsRequest(), AUTHORIZED
        ) as changes:
            assert next(changes).collector.collector_id == collector_id
        guarded.call("StopCollector", about["StopCollector"], AUTHORIZED)
        assert totals(event.syscall_stats for event in events)["getppid"] == 10
        assert totals(row for batch in batches for row in batch.syscall_stats)["getppid"] == 10
    assert len(audit(guarded)) == audited


def test_health_needs_no_token(guarded: RunningAgent) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "coral.mesh.v1.EbpfService"):
            request = health_pb2.HealthCheckRequest(service=service)
            serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
            assert health.Check(request, timeout=30) == serving
            watch = health.Watch(request, timeout=30)
            assert next(watch) == serving
            watch.cancel()


def test_reflection_needs_the_token(guarded: RunningAgent) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(guarded.address) as channel:
        reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        with pytest.raises(grpc.RpcError) as refused:
            next(reflect(iter([request]), timeout=30))
        refusal: Any = refused.value
        assert refusal.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = next(reflect(iter([request]), timeout=30, metadata=AUTHORIZED))
    names = {service.name for service in answer.list_services_response.service}
    assert "coral.mesh.v1.EbpfService" in names


# An agent that does not start


def refused_start(
    directory: Path,
    *arguments: str,
    config: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What an agent that must refuse to start says, on one line."""
    path = directory / "agent.yaml"
    path.write_text(yaml.safe_dump(dict(config or {})))
    result = subprocess.run(
        [
            *(sys.executable, "-W", "error", "-P", "-m", "coral.cli.main", "agent"),
            *("--metrics", "127.0.0.1:0", "--config", str(path), *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_an_agent_does_not_listen_beyond_loopback_without_tls(address: str, tmp_path: Path) -> None:
    socket = tmp_path / "agent.sock"
    listen = ("--listen", f"unix:{socket}", "--listen", address)
    assert refused_start(tmp_path, *listen) == (
        f"coral agent: listen: '{address}' is beyond loopback, and without TLS whoever is on the "
        "way reads and changes everything, tokens too: set tls.certificate and tls.key, or accept "
        "that with tls.insecure_plaintext: true"
    )
    # Even then, not without a token; the switch for loopback is for loopback.
    environment = {"CORAL__TLS__INSECURE_PLAINTEXT": "true", "CORAL__AUTH__INSECURE_LOOPBACK": "1"}
    assert refused_start(tmp_path, *listen, environment=environment) == (
        f"coral agent: listen: {address}: without a token or certificates of clients, whoever "
        "reaches it could trace what this agent can: set tls.client_ca, or auth.token_file"
    )
    assert not socket.exists()


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:65536"])
def test_an_address_that_is_none_is_refused(address: str, tmp_path: Path) -> None:
    assert refused_start(tmp_path, "--listen", address) == (
        f"coral agent: --listen: listen: '{address}' is not accepted; give unix:PATH or HOST:PORT"
    )
    assert refused_start(tmp_path, "--metrics", address) == (
        f"coral agent: --metrics: metrics: '{address}' is not accepted; give HOST:PORT, or nothing"
    )


def test_a_second_agent_on_the_same_socket_is_refused_and_the_first_goes_on(
    agent: RunningAgent, tmp_path: Path
) -> None:
    assert refused_start(tmp_path, "--listen", agent.address) == (
        f"coral agent: listen: {agent.address}: another agent is listening there"
    )
    agent.call("ListCollectors", pb.ListCollectorsRequest())


def test_a_second_agent_on_the_same_port_is_refused(guarded: RunningAgent, tmp_path: Path) -> None:
    told = refused_start(tmp_path, "--listen", guarded.address, config={"auth": INSECURE})
    assert told == (
        f"coral agent: listen: {guarded.address}: Failed to bind to address {guarded.address}: "
        "Address already in use"
    )
    told = refused_start(
        tmp_path, "--listen", f"unix:{tmp_path}/agent.sock", "--metrics", guarded.metrics
    )
    assert told == f"coral agent: metrics: {guarded.metrics}: Address already in use"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"limit": {}}, "limit: no such key; did you mean `limits`? accepted are agent_id, "),
        (
            {"limits": {"concurrent": 1}},
            "limits.concurrent: no such key; did you mean `concurrent_collectors`? accepted are ",
        ),
        (
            {"services": {"checkout": {"command": "nginx"}}},
            "services.checkout.command: no such key; did you mean `comm`? accepted are comm, ",
        ),
        (
            {"limits": {"max_duration": "soon"}},
            "limits.max_duration: 'soon' is not accepted; give a duration such as 500ms, 30s or 5m",
        ),
    ],
)
def test_a_configuration_that_is_not_accepted_is_told_with_the_path_to_the_key(
    config: Mapping[str, object], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "agent.yaml"
    assert refused_start(tmp_path, config=config).startswith(f"coral agent: {path}: {told}")


def test_a_variable_of_the_environment_that_means_nothing_is_refused(tmp_path: Path) -> None:
    told = refused_start(tmp_path, environment={"CORAL__LIMITS__CONCURRENT": "1"})
    assert told.startswith(
        "coral agent: CORAL__LIMITS__CONCURRENT: limits.concurrent: no such key; did you mean "
        "`concurrent_collectors`? accepted are concurrent_collectors, max_duration, "
    )


@pytest.mark.parametrize(("token", "why"), [(None, "No such file or directory"), ("\n", "empty")])
def test_an_agent_without_its_token_does_not_start(
    token: str | None, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    if token is not None:
        path.write_text(token)
    told = refused_start(
        tmp_path,
        *("--listen", f"unix:{tmp_path}/agent.sock"),
        config={"auth": {"token_file": str(path)}},
    )
    assert told.startswith(f"coral agent: auth.token_file: {path}")
    assert told.endswith(why)


# And after all that


def test_the_socket_is_its_owners_alone(agent: RunningAgent) -> None:
    mode = Path(agent.address.removeprefix("unix:")).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_after_every_refusal_a_good_request_is_served(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    serves_a_good_request(agent, calls("getppid", 100_000, "openat", 100))


def test_a_service_that_runs_is_found_by_its_name(
    agent: RunningAgent, directory: Path, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 100)
    (directory / "checkout.pid").write_text(f"{running.pid}\n")
    request = start_request({"until_exit": "true"}, service_name="checkout")
    collector_id = agent.call("StartCollector", request).collector_id
    subscription = pb.EbpfEventStreamRequest(collector_id=collector_id)
    with streaming(agent, "StreamEventBatches", subscription) as messages:
        running.go()
        running.finish()
        batches = list(messages)
    assert {batch.service_name for batch in batches} == {"checkout"}
    assert {batch.agent_id for batch in batches} == {AGENT_ID}
    assert totals(row for batch in batches for row in batch.syscall_stats)["getppid"] == 100
    assert batches[-1].end.reason == pb.SessionEnd.REASON_TARGET_EXITED
