"""What tests share: waiting for a condition, programs that make exactly N calls, real agents, and
what the kernel itself says is loaded."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from urllib.request import urlopen

import grpc
import psutil
import yaml
from google.protobuf.message import Message
from prometheus_client.parser import text_string_to_metric_families

from build_hook import clang_command
from coral.collectors.contract import Batch, Collector, Summaries
from coral.collectors.syscall_stats import table as syscall_table
from coral.mesh.v1 import ebpf_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
SERVICE = "coral.mesh.v1.EbpfService"
# Of the configuration: TCP without a token.
INSECURE = {"insecure_loopback": True}
KINDS = ("prog", "map", "link")
_COME_AND_GO = 8
# How much slower than hardware this machine is; an emulated one is told by tests/matrix.
PATIENCE = float(os.environ.get("CORAL_TEST_PATIENCE", "1"))
# Whether nobody else uses this machine, so that a test may take a CPU from it.
OWN_MACHINE = "CORAL_TEST_OWN_MACHINE" in os.environ

# What a kernel may lack, and what is taken then, in the order of the rung's steps.
RUNGS: dict[str, tuple[str, ...]] = {
    "best": (),
    "raw_tp": ("tp_btf",),
    "hash": ("task_storage",),
    "perf_buffer": ("ring_buffer",),
    "key by key": ("batch",),
    "preallocated": ("elements_on_demand", "task_storage"),
    "oldest": ("tp_btf", "task_storage", "ring_buffer", "batch", "elements_on_demand"),
}

T = TypeVar("T")
C = TypeVar("C", bound=Collector)


def wait_until(condition: Callable[[], T], timeout_s: float = 30.0) -> T:
    """What CONDITION returns once it is true; AssertionError where it never is."""
    timeout_s *= PATIENCE
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{condition} did not come true in {timeout_s} s"
        time.sleep(0.005)
    return value


def built(
    name: str, sources: Sequence[Path], command: Callable[[Path], Sequence[str | Path]]
) -> Path:
    """build/tests/NAME, made by COMMAND(output) where it is older than one of SOURCES."""
    output = ROOT / "build/tests" / name
    newest = max(source.stat().st_mtime for source in sources)
    if not output.exists() or output.stat().st_mtime < newest:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(f"{name}.{os.getpid()}")
        subprocess.run(command(unfinished), check=True)
        unfinished.rename(output)
    return output


def compiled(name: str) -> Path:
    """tests/bpf/NAME.bpf.c, compiled, with its source beside it, where bcc looks for it."""
    source = ROOT / f"tests/bpf/{name}.bpf.c"
    sources = [source, *(ROOT / "bpf/include").glob("*.h")]
    output = built(f"{name}.bpf.o", sources, partial(clang_command, source))
    with suppress(FileExistsError):
        output.with_suffix(".c").symlink_to(source)
    return output


@dataclass(frozen=True)
class Made:
    """What `calls` says that it made: by name, how many calls, and how long they took in ns."""

    calls: Mapping[str, int]
    ns: Mapping[str, int]


def _reads_its_input(pid: int) -> bool:
    call = Path(f"/proc/{pid}/syscall").read_text()
    return call.startswith(f"{syscall_table.numbers()['read']} 0x0 ")


class Calls:
    """tests/programs/calls.c, running: it waits until it is let go."""

    def __init__(self, program: Path, *arguments: object, threads: int = 1) -> None:
        self._process = subprocess.Popen(
            [program, "--wait", "--threads", str(threads), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        # It is ready once it reads: then every later call is one that it was told to make.
        wait_until(lambda: _reads_its_input(self.pid))

    def go(self) -> None:
        """Lets it begin."""
        assert self._process.stdin
        self._process.stdin.write("x")
        self._process.stdin.flush()

    def has_ended(self) -> bool:
        """Whether it has made its last call; nobody has waited for it yet."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "Z"

    def finish(self) -> Made:
        """Waits for its end."""
        out, _ = self._process.communicate()
        assert self._process.returncode == 0
        rows = [line.split() for line in out.splitlines()]
        return Made(
            {name: int(count) for name, count, _ in rows}, {name: int(ns) for name, _, ns in rows}
        )

    def kill(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.communicate()


@dataclass
class RunningAgent:
    """An agent in a process of its own, with what it was told to listen on."""

    process: subprocess.Popen[bytes]
    address: str
    metrics: str
    log_path: Path

    def log(self) -> list[dict[str, object]]:
        """What it has logged so far, but for a line that it is writing."""
        whole, _, _ = self.log_path.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30 * PATIENCE)

    def call(self, method: str, request: Message, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        """A unary call with the types of the contract; raises grpc.RpcError."""
        types = pb.DESCRIPTOR.services_by_name["EbpfService"].methods_by_name[method]
        answer = getattr(pb, types.output_type.name)
        with grpc.insecure_channel(self.address) as channel:
            call: Any = channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=type(request).SerializeToString,
                response_deserializer=answer.FromString,
            )
            return call(request, metadata=tuple(metadata), timeout=100 * PATIENCE)


@contextmanager
def running_agent(
    directory: Path,
    config: Mapping[str, object] | None = None,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[RunningAgent]:
    """`coral agent` as users start it, on a socket and a metrics port of its own. PREFIX is a
    command that executes what it is given."""
    directory.mkdir(exist_ok=True)
    config_path, log_path = directory / "agent.yaml", directory / "agent.log"
    config_path.write_text(yaml.safe_dump(dict(config or {})))
    address = f"unix:{directory}/agent.sock"
    listen = () if "--listen" in arguments or "listen" in (config or {}) else ("--listen", address)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                *prefix, *coral("agent"), *listen,
                "--metrics", "127.0.0.1:0", "--config", str(config_path), "--log-format", "json",
                *arguments,
            ],
            stderr=log, cwd=ROOT, env={**os.environ, **(environment or {})},
        )  # fmt: skip
    agent = RunningAgent(process, address, "", log_path)

    def listening() -> dict[str, object] | None:
        assert process.poll() is None, log_path.read_text()
        return next((line for line in agent.log() if line["event"] == "listening"), None)

    try:
        told = wait_until(listening, timeout_s=60)
        assert told is not None
        agent.metrics = str(told["metrics"])
        if not listen:
            agent.address = told["grpc"][0]  # type: ignore[index]
        yield agent
    finally:
        if process.poll() is None:
            _end(process)
        process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL; where coverage is measured, first SIGTERM, because what was counted is written at
    the end of a process."""
    if "COVERAGE_PROCESS_CONFIG" in os.environ:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10 * PATIENCE)
    process.kill()


def loaded() -> dict[str, set[int]]:
    """The ids of every eBPF program, map and link of this machine, as the kernel counts them up,
    but for those that processes hold which these tests did not start."""
    found = {kind: _listed(kind) for kind in KINDS}
    this = psutil.Process()
    ours = {this.pid, *(child.pid for child in this.children(recursive=True))}
    for pid in set(psutil.pids()) - ours:
        for kind, ids in held_by(pid).items():
            found[kind] -= ids
    return found


def nothing_new_since(before: Mapping[str, set[int]]) -> bool:
    """Whether everything that is loaded now was loaded BEFORE."""
    return all(ids <= before[kind] for kind, ids in loaded().items())


def _listed(kind: str) -> set[int]:
    following = getattr(ctypes.CDLL("libbpf.so.1"), f"bpf_{kind}_get_next_id")
    found, number = set(), ctypes.c_uint32(0)
    while following(number, ctypes.byref(number)) == 0:
        found.add(number.value)
    return found


def held_by(pid: int) -> dict[str, set[int]]:
    """The ids of the eBPF programs, maps and links that a process holds open."""
    held: dict[str, set[int]] = {kind: set() for kind in KINDS}
    with suppress(OSError):  # it may end meanwhile
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # and close
                if "bpf" in str(descriptor.readlink()):
                    info = Path(f"/proc/{pid}/fdinfo/{descriptor.name}").read_text()
                    for kind, number in re.findall(r"^(\w+)_id:\s+(\d+)$", info, re.MULTILINE):
                        held.get(kind, set()).add(int(number))
    return held


def summaries(batch: Batch) -> list[pb.SyscallStats]:
    """The rows of a batch that must have no others."""
    assert isinstance(batch.rows, Summaries)
    return [row for row in batch.rows.as_messages() if isinstance(row, pb.SyscallStats)]


def totals(rows: Iterable[pb.SyscallStats]) -> Counter[str]:
    """Calls by the name of the system call, over rows."""
    counted: Counter[str] = Counter()
    for row in rows:
        counted[row.syscall_name] += row.call_count
    return counted


@contextmanager
def at_work(collector: C) -> Iterator[C]:
    """A collector that is loaded and attached, to be drained by hand."""
    try:
        collector.open()
        yield collector
    finally:
        collector.close()


@contextmanager
def streaming(
    agent: RunningAgent, method: str, request: Message, metadata: Sequence[tuple[str, str]] = ()
) -> Iterator[Iterator[Any]]:
    """The messages of a server-streaming call; inside the block the subscription stands. A refusal
    is a grpc.RpcError at the first message."""
    types = pb.DESCRIPTOR.services_by_name["EbpfService"].methods_by_name[method]
    answer = getattr(pb, types.output_type.name)
    with grpc.insecure_channel(agent.address) as channel:
        call: Any = channel.unary_stream(
            f"/{SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )(request, metadata=tuple(metadata), timeout=100 * PATIENCE)
        try:
            call.initial_metadata()
            yield call
        finally:
            call.cancel()


def code_and_text(
    agent: RunningAgent, method: str, request: Message, metadata: Sequence[tuple[str, str]] = ()
) -> tuple[grpc.StatusCode, str]:
    """How a call that must not succeed is refused."""
    types = pb.DESCRIPTOR.services_by_name["EbpfService"].methods_by_name[method]
    try:
        if types.server_streaming:
            with streaming(agent, method, request, metadata) as messages:
                answer: object = list(messages)
        else:
            answer = agent.call(method, request, metadata)
    except grpc.RpcError as error:
        refusal: Any = error
        return refusal.code(), refusal.details()
    raise AssertionError(f"{method} was not refused: {answer}")


def scrape(agent: RunningAgent) -> str:
    """What the agent answers to Prometheus, as text, with figures from after this call began: the
    agent reads them at most once a second, and says in Date in which second it did."""
    began_s = int(time.time())
    while True:
        with urlopen(f"http://{agent.metrics}/metrics", timeout=30 * PATIENCE) as response:
            text: str = response.read().decode()
        if parsedate_to_datetime(response.headers["Date"]).timestamp() > began_s:
            return text
        time.sleep(max(0.1, began_s + 1 - time.time()))  # there is nothing newer before


def samples(text: str, name: str, **labels: str) -> dict[frozenset[tuple[str, str]], float]:
    """The samples of one metric that have LABELS, by all their labels."""
    return {
        frozenset(sample.labels.items()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    }


def sample(agent: RunningAgent, name: str, **labels: str) -> float:
    """The one sample that a scrape has of NAME with LABELS; of figures that the agent tells by
    kind, that of `syscall_stats`."""
    if name.startswith("coral_agent_"):
        labels.setdefault("kind", "syscall_stats")
    (value,) = samples(scrape(agent), name, **labels).values()
    return value


def coral(*arguments: object) -> list[str]:
    """The command line of `coral`, warnings being errors; the environment it is installed in is
    this one, whatever the working directory."""
    return [sys.executable, "-W", "error", "-P", "-m", "coral.cli.main", *map(str, arguments)]


class Watch:
    """A collector at work on a real agent, and a subscriber of it: what has come so far."""

    def __init__(
        self,
        agent: RunningAgent,
        started: pb.StartEbpfCollectorResponse,
        messages: Iterator[pb.EbpfEventBatch],
    ) -> None:
        self.collector_id = started.collector_id
        self.notes = list(started.notes)
        self.expires_at_s = started.expires_at.ToNanoseconds() / 1e9
        self.batches: list[pb.EbpfEventBatch] = []
        self.rows: list[pb.SyscallStats] = []
        self.losses: Counter[int] = Counter()
        self.end: pb.SessionEnd | None = None
        self._agent = agent
        self._messages = messages

    def read(self) -> pb.EbpfEventBatch:
        """Waits for the next batch."""
        batch = next(self._messages)
        self.batches.append(batch)
        self.rows += batch.syscall_stats
        for loss in batch.losses:
            self.losses[loss.stage] += loss.count
        if batch.HasField("end"):
            self.end = batch.end
        return batch

    def calls_of(self, name: str) -> int:
        """How often the system call of that name was counted so far."""
        return totals(self.rows)[name]

    def read_until_calls(self, name: str, count: int) -> None:
        """Reads until so many calls of that name have come, and not one more."""
        while self.calls_of(name) < count:
            self.read()
        assert self.calls_of(name) == count

    def read_to_end(self) -> pb.SessionEnd:
        """Reads all there is; how the session ended."""
        while not self.end:
            self.read()
        assert list(self._messages) == []
        assert not self.losses, self.losses
        return self.end

    def stop(self) -> list[pb.SyscallStats]:
        """Stops the collector; every row of its life."""
        self._agent.call(
            "StopCollector", pb.StopEbpfCollectorRequest(collector_id=self.collector_id)
        )
        assert self.read_to_end().reason == pb.SessionEnd.REASON_STOPPED
        return self.rows


def start_collector(
    agent: RunningAgent,
    duration_s: float = 60.0,
    service_name: str = "",
    kind: pb.EbpfCollectorKind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
    /,
    **config: str,
) -> pb.StartEbpfCollectorResponse:
    """Starts `syscall_stats`, or another kind."""
    request = pb.StartEbpfCollectorRequest(kind=kind, service_name=service_name, config=config)
    request.duration.FromNanoseconds(int(duration_s * 1e9))
    started = agent.call("StartCollector", request)
    assert isinstance(started, pb.StartEbpfCollectorResponse)
    assert started.supported
    return started


@contextmanager
def watching(
    agent: RunningAgent,
    duration_s: float = 60.0,
    service_name: str = "",
    kind: pb.EbpfCollectorKind = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
    /,
    **config: str,
) -> Iterator[Watch]:
    """`syscall_stats` at work, or another kind, with a subscriber. Ends it, if it has not ended."""
    config = {"interval": "100ms", **config}
    started = start_collector(agent, duration_s, service_name, kind, **config)
    request = pb.EbpfEventStreamRequest(collector_id=started.collector_id)
    with streaming(agent, "StreamEventBatches", request) as messages:
        watch = Watch(agent, started, messages)
        try:
            yield watch
        finally:
            if collectors_at_work(agent).get(started.collector_id):
                stop = pb.StopEbpfCollectorRequest(collector_id=started.collector_id)
                agent.call("StopCollector", stop)


def collectors_at_work(agent: RunningAgent) -> dict[str, pb.CollectorInfo]:
    """What ListCollectors answers, by id."""
    answer = agent.call("ListCollectors", pb.ListCollectorsRequest())
    assert isinstance(answer, pb.ListCollectorsResponse)
    return {info.collector_id: info for info in answer.collectors}


class Puppet:
    """A Python process that does, line by line, what it is told; by itself it calls getppid
    never. It ends with the block."""

    def __init__(self) -> None:
        script = (
            "import os, sys, time\nfor line in sys.stdin:\n    exec(line)\n    print(flush=True)"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.do("pass")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:
            pass

    def begin(self, code: str) -> None:
        """Has it do CODE; does not wait."""
        assert self._process.stdin
        self._process.stdin.write(code + "\n")
        self._process.stdin.flush()

    def do(self, code: str) -> None:
        """Has it do CODE, and waits until it is done."""
        self.begin(code)
        self.done()

    def done(self) -> None:
        """Waits until it has done what it began."""
        assert self._process.stdout
        assert self._process.stdout.readline() == "\n"

    def ask(self, expression: str) -> str:
        """What it prints of EXPRESSION."""
        self.begin(f"print({expression})")
        assert self._process.stdout
        answer = self._process.stdout.readline()
        assert self._process.stdout.readline() == "\n"
        return answer.strip()

    def getppid(self, times: int) -> None:
        """Has it make so many calls of getppid, and waits until they are made."""
        self.do(f"for _ in range({times}): os.getppid()")

    def is_in(self, name: str) -> bool:
        """Whether it is in the system call of that name now."""
        call = Path(f"/proc/{self.pid}/syscall").read_text().split()
        return call[0] == str(syscall_table.numbers()[name])

    def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        self._process.kill()
        self._process.wait()

    def leave(self) -> int:
        """Waits until it has ended by itself, when it has done all; its exit status."""
        self._process.communicate(timeout=30 * PATIENCE)
        return self._process.returncode


class Vitals(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int) -> Vitals:
        process = Path(f"/proc/{pid}")
        return cls(len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())))

    def at_most(self, before: Vitals) -> bool:
        """Whether it is no more than BEFORE, but for the few that come and go by themselves: grpc's
        threads, a connection that is being closed, the statistics' descriptor. What leaks does so
        once a cycle, of hundreds."""
        return all(now <= then + _COME_AND_GO for now, then in zip(self, before, strict=True))


def resident_kib(pid: int) -> int:
    """The resident memory of a process."""
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1])


class Family:
    """tests/programs/family.c, running: it waits until it is let go."""

    def __init__(self, program: Path, way: str, children: int = 25, calls: int = 40) -> None:
        self.children, self.calls = children, calls
        self._process = subprocess.Popen(
            [program, way, str(children), str(calls)], stdin=subprocess.PIPE
        )
        self.pid = self._process.pid
        wait_until(lambda: _reads_its_input(self.pid))

    def go(self) -> None:
        """Lets it begin."""
        assert self._process.stdin
        self._process.stdin.write(b"x")
        self._process.stdin.close()

    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def run(self) -> None:
        """Lets it go, and waits for its end."""
        self.go()
        assert self._process.wait(60 * PATIENCE) == 0
