"""Faults while a collector starts, injected one by one into real agents: the refusal names what
failed, nothing is left behind, and the next collector counts exactly."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import psutil
import pytest

from coral.bpf.loading import seal
from coral.bpf.loading.object_file import object_path
from coral.bpf.rung import HOOKS
from coral.collectors.hubs import has_cgroups
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.e2e.test_refusals import (
    copy_others,
    has_tried_the_kernel,
    leaving_nothing,
    objects,
    refusing_agent,
    start_request,
)
from tests.faults import Call, Faults
from tests.support import (
    SERVICE,
    Calls,
    RunningAgent,
    code_and_text,
    collectors_at_work,
    held_by,
    running_agent,
    streaming,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

CALLS: Final = 1_000
HEADERS: Final = Path("/usr/src")
LOADING: Final = "loading processes.bpf.o"
MEMORY: Final = (
    "there is not enough memory: ask for smaller buffers, or raise the agent's MemoryMax or its "
    "container's limit"
)
FILES: Final = "the agent has reached its limit of open files: raise LimitNOFILE (ulimit -n)"
PERMISSION: Final = (
    "it needs CAP_BPF and CAP_PERFMON, must not be forbidden by a security policy or kernel "
    "lockdown, and for locked memory needs CAP_IPC_LOCK or a sufficient LimitMEMLOCK"
)
# How a refusal may begin.
STEPS: Final = (
    r"(opening|loading|mapping|enabling|writing|putting|attaching|making|sharing|compiling|"
    r"reading) "
)
MAPPINGS: Final = re.compile(r"bpf-map|perf_event")

# By rung: the features that count as missing, and the mode.
RUNGS: Final = {
    "best": ("", "events"),
    "summaries": ("task_storage", "summaries"),
    "perf_buffer": ("ring_buffer,task_storage,batch,elements_on_demand", "events"),
    "bcc": ("", "events"),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def faults(directory: Path) -> Faults:
    return Faults(directory)


@pytest.fixture(scope="module")
def any_headers(directory: Path) -> Path:
    """A kernel's headers in one directory, as bcc needs them; Debian splits them in two."""
    halves = sorted(HEADERS.glob("linux-headers-*-common"))
    merged = directory / "headers"
    shutil.copytree(halves[-1], merged, copy_function=os.symlink)
    (other,) = HEADERS.glob(halves[-1].name.replace("-common", "-[a-z0-9]*[!n]"))
    shutil.copytree(other, merged, copy_function=_symlink_anew, dirs_exist_ok=True)
    return merged


def _symlink_anew(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    Path(target).symlink_to(source)


@contextmanager
def faulty_agent(directory: Path, faults: Faults, **environment: str) -> Iterator[RunningAgent]:
    # The many starts in a row exceed 5 % of a CPU.
    config = {"limits": {"cpu_percent": 100}}
    with running_agent(
        directory, config, environment={**faults.environment, **environment}
    ) as agent:
        has_tried_the_kernel(agent)
        yield agent


def start(agent: RunningAgent, running: Calls, **config: str) -> str:
    """Starts a collector that watches RUNNING and ends with it; returns its id."""
    request = start_request({"pid": running.pid, "until_exit": "true", **config})
    answer = agent.call("StartCollector", request)
    assert answer.supported, answer.error
    return str(answer.collector_id)


class EndedEarlyError(AssertionError):
    """A session that did not end with its process."""

    def __init__(self, end: pb.SessionEnd) -> None:
        super().__init__(str(end))
        self.end = end


def counts_exactly(agent: RunningAgent, collector_id: str, running: Calls) -> None:
    """Asserts that the collector, of either mode, reports every getppid that RUNNING makes."""
    counted = 0
    request = pb.EbpfEventStreamRequest(collector_id=collector_id)
    with streaming(agent, "StreamEventBatches", request) as batches:
        running.go()
        made = running.finish()
        for batch in batches:
            counted += sum(
                row.call_count for row in batch.syscall_stats if row.syscall_name == "getppid"
            )
            counted += sum(batch.strings[row.syscall] == "getppid" for row in batch.syscall_calls)
            end = batch.end
            assert not batch.losses
    if end.reason != pb.SessionEnd.REASON_TARGET_EXITED:
        raise EndedEarlyError(end)
    assert counted == made.calls["getppid"]


def failed_in_a_drain(agent: RunningAgent, collector_id: str, running: Calls) -> bool:
    """Whether the collector ended with an error in a drain. If it did not, asserts that it counts
    exactly."""
    try:
        counts_exactly(agent, collector_id, running)
    except grpc.RpcError as error:
        refusal: Any = error
        said = refusal.details().partition("has ended: FAILED: ")[2]
    except EndedEarlyError as ended:
        said = ended.end.detail
    else:
        return False
    assert "Cannot allocate memory" in said
    return True


def holds_nothing(agent: RunningAgent) -> None:
    """Asserts that the agent holds no program, map, link or buffer, and has no session."""
    assert not collectors_at_work(agent)
    assert held_by(agent.process.pid) == {"prog": set(), "map": set(), "link": set()}
    mappings = Path(f"/proc/{agent.process.pid}/maps").read_text()
    assert not MAPPINGS.search(mappings), mappings


def refusals(agent: RunningAgent) -> list[dict[str, object]]:
    return [line for line in agent.log() if line["event"] == "refused by the kernel"]


def has_logged(agent: RunningAgent, key: str, value: str) -> None:
    """Waits until a refusal with that VALUE is in the log."""
    wait_until(lambda: value in [line[key] for line in refusals(agent)])


@pytest.mark.soak
@pytest.mark.timeout(600)  # some two hundred starts, most of which load the hub anew
@pytest.mark.parametrize(
    "rung",
    [pytest.param(rung, marks=pytest.mark.needs_bcc if rung == "bcc" else ()) for rung in RUNGS],
)
def test_each_call_that_a_start_makes_may_fail(
    rung: str,
    faults: Faults,
    tmp_path: Path,
    calls: Callable[..., Calls],
    request: pytest.FixtureRequest,
) -> None:
    """In one start the first call fails, in the next only the second, and so on to the last. Either
    the collector starts all the same and counts exactly, or it is refused and leaves nothing."""
    without, mode = RUNGS[rung]
    environment = {"CORAL_WITHOUT": without}
    if rung == "bcc":
        headers = request.getfixturevalue("any_headers")
        environment |= {"CORAL_LOADER": "bcc", "BCC_KERNEL_SOURCE": str(headers)}
    refused, survived = set(), 0
    with faulty_agent(tmp_path / "agent", faults, **environment) as agent, leaving_nothing(agent):
        if rung == "bcc":  # compiles now, so that later starts do not
            counts_exactly(agent, start(agent, warm := calls("getppid", 1)), warm)
        number, running = 1, calls("getppid", CALLS)
        while True:
            with faults.failing(number, errno.ENOMEM):
                try:
                    collector_id = start(agent, running, mode=mode, include="getppid")
                except grpc.RpcError as error:
                    refusal: Any = error
                    collector_id = ""
            if not faults.failed:
                break
            call = faults.call(number)
            number += 1
            if collector_id:
                drained = not failed_in_a_drain(agent, collector_id, running)
                running = calls("getppid", CALLS)
                survived += drained
                if drained:
                    continue
                # the last calls are those of its first drain
            else:
                text = refusal.details()
                assert refusal.code() in (
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    grpc.StatusCode.FAILED_PRECONDITION,
                )
                assert re.match(STEPS, text), text
                assert "Cannot allocate memory" in text
                what = text.split(": E")[0]
                has_logged(agent, "what", what)
            holds_nothing(agent)
            if call not in refused:
                counts_exactly(agent, start(agent, running, mode=mode, include="getppid"), running)
                running = calls("getppid", CALLS)
            refused.add(call)
        counts_exactly(agent, collector_id, running)
    # The agent prepares maps for its next session meanwhile, so that a kind of call that a start
    # makes once may be passed over.
    assert {Call.MAP_CREATE, Call.MMAP_ANONYMOUS, Call.MAP_UPDATE} <= refused
    # A start survives failures of probes for optional features, and of steps that can wait.
    assert survived > 10


def test_a_process_whose_end_cannot_be_awaited_is_refused(
    faults: Faults, tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", CALLS)
    with faulty_agent(tmp_path / "agent", faults) as agent, leaving_nothing(agent):
        with (
            faults.failing(1, call=Call.PIDFD_OPEN),
            pytest.raises(grpc.RpcError, match="Cannot allocate memory"),
        ):
            start(agent, running)
        assert faults.failed
        holds_nothing(agent)
        counts_exactly(agent, start(agent, running), running)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_program_that_cannot_be_attached_is_named(
    hook: str, faults: Faults, tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    better = ",".join(HOOKS[: HOOKS.index(hook)])
    names = {
        "coral_fork": "sched_process_fork",
        "coral_rename": "task_rename",
        "coral_exec": "sched_process_exec",
        "coral_exit": "sched_process_exit",
    }
    if has_cgroups():
        names |= {
            "coral_attach": "cgroup_attach_task",
            "coral_mkdir": "cgroup_mkdir",
            "coral_rmdir": "cgroup_rmdir",
        }
    names |= {"coral_leave": "sys_exit", "coral_enter": "sys_enter"}
    running = calls("getppid", CALLS)
    with (
        faulty_agent(tmp_path / "agent", faults, CORAL_WITHOUT=better) as agent,
        leaving_nothing(agent),
    ):
        for number, (name, hook_name) in enumerate(names.items(), start=1):
            attaching = Call.RAW_TRACEPOINT_OPEN
            with faults.failing(number, errno.EBUSY, call=attaching, all_after=True):
                code, text = code_and_text(
                    agent, "StartCollector", start_request({"pid": running.pid})
                )
            assert faults.failed == 3
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            what = f"attaching {name} to {hook_name} (3 tries)"
            assert text == f"{what}: EBUSY (Device or resource busy)"
            has_logged(agent, "what", what)
            holds_nothing(agent)
        counts_exactly(agent, start(agent, running), running)


@dataclass(frozen=True)
class Fault:
    """Calls of the type CALL fail with ERROR; the other fields are parts of the refusal."""

    call: Call
    error: int
    what: str
    remedy: str = ""
    said: str = ""


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Call.MAP_CREATE, errno.EPERM, "making map members", PERMISSION),
        Fault(
            Call.PROG_LOAD, errno.EPERM, LOADING, PERMISSION, "Couldn't load trivial BPF program"
        ),
        Fault(Call.MMAP_FD, errno.EAGAIN, "opening the ring buffer rings"),
        Fault(Call.EPOLL_CREATE, errno.EMFILE, "opening the ring buffer rings", FILES),
        Fault(Call.PIDFD_OPEN, errno.ENOMEM, "opening a descriptor", MEMORY),
    ],
    ids=lambda fault: fault.call.name,
)
def test_a_lasting_failure_is_reported_with_its_remedy(
    fault: Fault, faults: Faults, plain_agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    agent, running = plain_agent, calls("getppid", CALLS)
    config = {"pid": running.pid, "mode": "events", "until_exit": "true"}
    with (
        leaving_nothing(agent),
        faults.failing(1, fault.error, call=fault.call, all_after=True),
    ):
        code, text = code_and_text(agent, "StartCollector", start_request(config))
    permanent = fault.error == errno.EPERM
    assert code is (
        grpc.StatusCode.FAILED_PRECONDITION if permanent else grpc.StatusCode.RESOURCE_EXHAUSTED
    )
    first, *log = text.splitlines()
    told = f"{fault.what}: {errno.errorcode[fault.error]} ({os.strerror(fault.error)})"
    assert first == (f"{told}; {fault.remedy}" if fault.remedy else told)
    assert fault.said in "\n".join(log)
    wait_until(
        lambda: any(str(r["said"]).strip().endswith("\n".join(log)) for r in refusals(agent))
    )
    holds_nothing(agent)
    counts_exactly(agent, start(agent, running, mode="events"), running)


@pytest.fixture(scope="module")
def plain_agent(directory: Path, faults: Faults) -> Iterator[RunningAgent]:
    with faulty_agent(directory / "agent", faults) as running:
        yield running


def test_a_first_start_for_which_everything_fails_spoils_none_after_it(
    faults: Faults, tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    """libbpf probes the kernel once for the whole process, and takes any failure for a missing
    feature."""
    running = calls("getppid", CALLS)
    request = start_request({"pid": running.pid})
    with faulty_agent(tmp_path / "agent", faults) as agent, leaving_nothing(agent):
        # From the load of its types on: after an earlier failure it would not probe at all.
        with faults.failing(1, call=Call.BTF_LOAD, all_after=True, of_any_type=True):
            code, text = code_and_text(agent, "StartCollector", request)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert re.match(rf"{STEPS}.*: ENOMEM ", text), text
        assert faults.failed > 1
        for mode in ("events", "summaries"):
            counts_exactly(agent, start(agent, running, mode=mode), running)
            running = calls("getppid", CALLS)


@pytest.mark.parametrize(
    ("mode", "call", "what"),
    [
        ("summaries", Call.MAP_LOOKUP_BATCH, "reading map members"),
        ("events", Call.MAP_LOOKUP, "reading an account"),
    ],
)
def test_a_drain_that_fails_ends_its_session_alone_with_the_reason(
    faults: Faults,
    plain_agent: RunningAgent,
    calls: Callable[..., Calls],
    *,
    mode: str,
    call: Call,
    what: str,
) -> None:
    agent, running, other = plain_agent, calls("getppid", CALLS), calls("getppid", CALLS)
    with leaving_nothing(agent):
        collector_id = start(agent, running, mode=mode)
        request = pb.EbpfEventStreamRequest(collector_id=collector_id)
        with (
            streaming(agent, "StreamEventBatches", request) as batches,
            faults.failing(1, errno.ENOMEM, call=call, all_after=True),
        ):
            *_, last = batches
        assert last.end.reason == pb.SessionEnd.REASON_FAILED
        assert re.fullmatch(rf"{what}: ENOMEM \(.*\); {re.escape(MEMORY)}", last.end.detail)
        holds_nothing(agent)
        counts_exactly(agent, start(agent, other, mode=mode), other)


def test_without_threads_starts_are_refused_and_the_rest_goes_on(
    faults: Faults, tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    """No worker thread exists, and none can be started: what is at work is drained on the loop."""
    running = calls("getppid", CALLS)
    with faulty_agent(tmp_path / "agent", faults) as agent, leaving_nothing(agent):
        first = start(agent, running)
        with faults.failing(1, errno.EAGAIN, call=Call.THREAD_CREATE, all_after=True):
            code, text = code_and_text(agent, "StartCollector", start_request({"pid": os.getpid()}))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "the agent could not start a thread" in text
            counts_exactly(agent, first, running)
        assert faults.failed
        other = calls("getppid", CALLS)
        counts_exactly(agent, start(agent, other), other)


# Limits of the process


class Line:
    """A connection to an agent that stays open, for an agent that can accept no other."""

    def __init__(self, channel: grpc.Channel) -> None:
        make: Any = channel.unary_unary
        self._start = make(
            f"/{SERVICE}/StartCollector",
            request_serializer=pb.StartEbpfCollectorRequest.SerializeToString,
            response_deserializer=pb.StartEbpfCollectorResponse.FromString,
        )

    def start(self, running: Calls, **config: str) -> tuple[grpc.StatusCode, str]:
        """Starts a collector; returns the status code, and its id or the text of the refusal."""
        request = start_request({"pid": running.pid, "until_exit": "true", **config})
        try:
            return grpc.StatusCode.OK, self._start(request, timeout=100).collector_id
        except grpc.RpcError as error:
            refusal: Any = error
            return refusal.code(), refusal.details()


@contextmanager
def descriptors_left(agent: RunningAgent, spare: int) -> Iterator[None]:
    """For the duration of the block, the agent can open SPARE more files."""
    pid = agent.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    limit = next(n for n in range(soft) if n - sum(fd < n for fd in used) == spare)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_a_start_that_runs_out_of_descriptors_says_so_at_every_step(
    plain_agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    agent, spare = plain_agent, 0
    running = calls("getppid", CALLS)
    with leaving_nothing(agent), grpc.insecure_channel(agent.address) as channel:
        line = Line(channel)
        grpc.channel_ready_future(channel).result(10)
        while True:
            with descriptors_left(agent, spare):
                code, text = line.start(running, mode="events")
            if code is grpc.StatusCode.OK:
                break
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, text
            assert f"EMFILE (Too many open files); {FILES}" in text
            holds_nothing(agent)
            spare += 1
        counts_exactly(agent, text, running)
    assert spare > 15  # those of maps, programs and links


def test_collectors_at_work_outlive_a_time_without_descriptors(
    plain_agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    """The shortage lasts for several of the agent's checks of its limits, which read /proc."""
    agent, running = plain_agent, calls("getppid", CALLS, "nanosleep", 2_500)
    with leaving_nothing(agent):
        collector_id = start(agent, running, interval="100ms")
        request = pb.EbpfEventStreamRequest(collector_id=collector_id)
        with streaming(agent, "StreamEventBatches", request) as messages:
            with descriptors_left(agent, 0):
                running.go()
                made = running.finish()
            batches = list(messages)
        counted = sum(
            row.call_count
            for batch in batches
            for row in batch.syscall_stats
            if row.syscall_name == "getppid"
        )
        assert counted == made.calls["getppid"]
        assert batches[-1].end.reason == pb.SessionEnd.REASON_TARGET_EXITED
        following = calls("getppid", CALLS)
        counts_exactly(agent, start(agent, following), following)


def test_locked_memory_beyond_the_limit_is_refused_and_less_of_it_works(
    tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    """Perf buffers are locked memory. Without CAP_IPC_LOCK a process gets a small allowance for
    each CPU, and what RLIMIT_MEMLOCK allows on top."""
    running = calls("getppid", CALLS)
    config = {"pid": running.pid, "mode": "events"}
    with (
        running_agent(
            tmp_path / "agent",
            environment={"CORAL_WITHOUT": "ring_buffer"},
            prefix=("prlimit", "--memlock=0:0", "setpriv", "--bounding-set=-ipc_lock"),
        ) as agent,
        leaving_nothing(agent),
    ):
        request = start_request({**config, "ring": "16MiB"})
        assert code_and_text(agent, "StartCollector", request) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            f"mapping the perf buffer of CPU 0: EPERM (Operation not permitted); {PERMISSION}",
        )
        holds_nothing(agent)

        def has_started() -> str:
            with suppress(grpc.RpcError):  # all of root's processes share that allowance
                return start(agent, running, mode="events", ring="256KiB")
            return ""

        counts_exactly(agent, wait_until(has_started), running)


# The agent's own files and libraries


@pytest.mark.parametrize(
    ("offset", "damage"),
    [(12, b"\xff\xff\xff\x7f"), (24, bytes(400)), (24, b"\xff" * 400), (0, bytes(24))],
    ids=["longer-than-it-is", "zeroed", "no-types", "no-header"],
)
def test_damaged_types_of_an_object_without_a_seal_are_refused(
    offset: int, damage: bytes, tmp_path: Path
) -> None:
    data = bytearray(seal.opened(object_path("syscall_stats").read_bytes()))
    at = data.index(b"\x9f\xeb\x01\x00\x18\x00\x00\x00") + offset
    data[at : at + len(damage)] = damage
    (tmp_path / "syscall_stats.bpf.o").write_bytes(data)
    copy_others(tmp_path)
    with refusing_agent(tmp_path, tmp_path) as agent:
        request = start_request({"pid": os.getpid()})
        code, text = code_and_text(agent, "StartCollector", request)
        holds_nothing(agent)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "syscall_stats.bpf.o" in text.splitlines()[0]


def test_an_object_whose_options_are_of_another_type_is_refused(tmp_path: Path) -> None:
    edited = objects(
        tmp_path, lambda source: source.replace("error_class, MAX_ERRNO + 1", "error_class, 100")
    )
    with refusing_agent(tmp_path, edited) as agent:
        request = start_request({"pid": os.getpid()})
        code, text = code_and_text(agent, "StartCollector", request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert text.startswith("syscall_stats.bpf.o is damaged, or of another version of this agent: ")
    assert "(4096,)" in text


@pytest.mark.parametrize("library", ["of-another-time", "no-library"])
def test_a_libbpf_that_cannot_be_used_is_an_answer_that_says_so(
    library: str, tmp_path: Path
) -> None:
    if library == "no-library":
        (tmp_path / "libbpf.so.1").write_text("no library")
        why = f"{tmp_path}/libbpf.so.1: "
    else:
        (tmp_path / "empty.c").touch()
        command = ("cc", "-shared", tmp_path / "empty.c", "-o", tmp_path / "libbpf.so.1")
        subprocess.run(command, check=True)
        why = f"{tmp_path}/libbpf.so.1: undefined symbol: "
    environment = {"LD_LIBRARY_PATH": str(tmp_path)}
    with running_agent(tmp_path / "agent", environment=environment) as agent:
        answer = agent.call("StartCollector", start_request({"scope": "host"}))
        can = agent.call("GetCapabilities", pb.GetCapabilitiesRequest())
    assert not answer.supported
    assert answer.error == f"syscall_stats: {can.unsupported_reason}"
    assert answer.error.startswith("syscall_stats: libbpf.so.1 (1.0 or later) cannot be used: ")
    assert why in answer.error
    assert answer.error.endswith("install Debian's libbpf1, or your distribution's libbpf")


def hiding_btf(kernel_btf: Path) -> tuple[str, ...]:
    """A prefix that runs a command with that file in place of the kernel's BTF."""
    script = 'mount --bind "$0" /sys/kernel/btf/vmlinux && exec "$@"'
    return ("unshare", "-m", "--propagation", "private", "sh", "-c", script, str(kernel_btf))


@pytest.mark.parametrize("kept", [0.0, 0.5], ids=["empty", "truncated"])
def test_a_kernels_btf_that_cannot_be_read_is_an_answer_that_says_so(
    kept: float, tmp_path: Path
) -> None:
    whole = Path("/sys/kernel/btf/vmlinux").read_bytes()
    (tmp_path / "vmlinux").write_bytes(whole[: int(len(whole) * kept)])
    with running_agent(
        tmp_path / "agent",
        environment={"CORAL_LOADER": "core"},
        prefix=hiding_btf(tmp_path / "vmlinux"),
    ) as agent:
        answer = agent.call("StartCollector", start_request({"scope": "host"}))
        assert not answer.supported
        assert answer.error == (
            "syscall_stats: no loader (core: /sys/kernel/btf/vmlinux is damaged: libbpf cannot "
            "read it)"
        )


@pytest.mark.needs_bcc
def test_without_the_kernels_btf_bcc_is_the_way(
    any_headers: Path, tmp_path: Path, calls: Callable[..., Calls]
) -> None:
    (tmp_path / "vmlinux").touch()
    running = calls("getppid", CALLS)
    with running_agent(
        tmp_path / "agent",
        environment={"BCC_KERNEL_SOURCE": str(any_headers)},
        prefix=hiding_btf(tmp_path / "vmlinux"),
    ) as agent:
        counts_exactly(agent, start(agent, running), running)


# bcc's compiler


def environment_with_bcc(directory: Path, body: str) -> dict[str, str]:
    """What makes an agent import a package `bcc` whose constructor of BPF runs BODY."""
    package = directory / "bcc"
    package.mkdir()
    (package / "libbcc.py").touch()
    (package / "__init__.py").write_text(
        "import os, signal\nclass BPF:\n    def __init__(self, text, cflags):\n"
        + textwrap.indent(body, " " * 8)
    )
    return {
        "CORAL_LOADER": "bcc",
        "PYTHONPATH": str(directory),
        "BCC_KERNEL_SOURCE": str(directory),
    }


@contextmanager
def agent_with_bcc(directory: Path, body: str) -> Iterator[RunningAgent]:
    """An agent with such a package."""
    environment = environment_with_bcc(directory, body)
    with (
        running_agent(directory / "agent", environment=environment) as agent,
        leaving_nothing(agent),
    ):
        yield agent


@pytest.mark.parametrize(
    ("body", "told", "said"),
    [
        ("raise Exception('unknown type name')", "it is refused", "unknown type name"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "the compiler was killed by SIGKILL; it takes 150 MB of memory",
            "",
        ),
        ("print('hello'); os._exit(0)", "it answers what is no JSON", ""),
        ("", "it is refused", "AttributeError: 'BPF' object has no attribute 'dump_func'"),
    ],
    ids=["refuses", "killed", "babbles", "another-bcc"],
)
def test_a_failing_compiler_is_reported_with_its_output(
    body: str, told: str, said: str, tmp_path: Path
) -> None:
    with agent_with_bcc(tmp_path, body or "pass") as agent:
        code, text = code_and_text(agent, "StartCollector", start_request({"pid": os.getpid()}))
        holds_nothing(agent)
        wait_until(lambda: any(said in str(one["said"]) for one in refusals(agent)))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    first, *tail = text.splitlines()
    assert first == f"compiling processes.bpf.c with bcc: {told}"
    assert said in "\n".join(tail)


def test_while_a_compiler_hangs_the_agent_serves_others(tmp_path: Path) -> None:
    with (
        agent_with_bcc(tmp_path, "signal.pause()") as agent,
        ThreadPoolExecutor() as pool,
    ):
        request = start_request({"pid": os.getpid()})
        told = pool.submit(code_and_text, agent, "StartCollector", request)
        (compiler,) = wait_until(lambda: psutil.Process(agent.process.pid).children())
        assert not collectors_at_work(agent)
        assert not told.done()
        compiler.kill()
        code, text = told.result()
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "the compiler was killed by SIGKILL" in text


@pytest.mark.parametrize("orderly", [True, False], ids=["SIGTERM", "SIGKILL"])
def test_a_compiler_that_hangs_ends_with_its_agent(orderly: bool, tmp_path: Path) -> None:
    environment = environment_with_bcc(tmp_path, "signal.pause()")
    with (
        running_agent(tmp_path / "agent", environment=environment) as agent,
        ThreadPoolExecutor() as pool,
    ):
        request = start_request({"pid": os.getpid()})
        told = pool.submit(agent.call, "StartCollector", request)
        (compiler,) = wait_until(lambda: psutil.Process(agent.process.pid).children())
        agent.process.send_signal(signal.SIGTERM if orderly else signal.SIGKILL)
        agent.process.wait(10)
        compiler.wait(10)
        assert told.exception(10)
        if orderly:  # and not because the time for that was over
            last = agent.log()[-1]
            assert (last["event"], last.get("reason")) == ("stopped", None)
