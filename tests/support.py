"""What tests share: waiting for a condition, programs that make exactly N calls, real agents, and
what the kernel itself says is loaded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import yaml
from google.protobuf.message import Message

from proto.coral.mesh.v1 import ebpf_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent
SERVICE = "coral.mesh.v1.EbpfService"

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout_s: float = 10.0) -> T:
    """What CONDITION returns once it is true; AssertionError where it never is."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{condition} did not come true in {timeout_s} s"
        time.sleep(0.005)
    return value


@dataclass(frozen=True)
class Made:
    """What `calls` says that it made: by name, how many calls, and how long they took in ns."""

    calls: Mapping[str, int]
    ns: Mapping[str, int]


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
        wait_until(lambda: Path(f"/proc/{self.pid}/syscall").read_text().startswith("0 0x0"))

    def go(self) -> None:
        """Lets it begin."""
        assert self._process.stdin
        self._process.stdin.write("x")
        self._process.stdin.flush()

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
        """What it has logged so far."""
        return [json.loads(line) for line in self.log_path.read_text().splitlines()]

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)

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
            return call(request, metadata=tuple(metadata), timeout=20)


@contextmanager
def running_agent(
    directory: Path,
    config: Mapping[str, object] | None = None,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[RunningAgent]:
    """`coral agent` as users start it, on a socket and a metrics port of its own."""
    directory.mkdir(exist_ok=True)
    config_path, log_path = directory / "agent.yaml", directory / "agent.log"
    config_path.write_text(yaml.safe_dump(dict(config or {})))
    address = f"unix:{directory}/agent.sock"
    listen = () if "--listen" in arguments or "listen" in (config or {}) else ("--listen", address)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable, "-W", "error", "-m", "cli.main", "agent", *listen,
                "--metrics", "127.0.0.1:0", "--config", str(config_path), "--log-format", "json",
                *arguments,
            ],
            stderr=log, cwd=ROOT, env={**os.environ, **(environment or {})},
        )  # fmt: skip
    agent = RunningAgent(process, address, "", log_path)

    def listening() -> dict[str, object] | None:
        assert process.poll() is None, log_path.read_text()
        text = log_path.read_text()
        lines = [json.loads(line) for line in text.splitlines() if text.endswith("\n")]
        return next((line for line in lines if line["event"] == "listening"), None)

    try:
        told = wait_until(listening)
        assert told is not None
        agent.metrics = str(told["metrics"])
        if not listen:
            agent.address = told["grpc"][0]  # type: ignore[index]
        yield agent
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def loaded() -> dict[str, set[int]]:
    """The ids of every eBPF program, map and link of this machine, as bpftool tells them."""
    return {kind: wait_until(lambda kind=kind: _listed(kind)) for kind in ("prog", "map", "link")}


def _listed(kind: str) -> set[int] | None:
    out = subprocess.run(["bpftool", "-j", kind, "list"], capture_output=True, check=False)
    if out.returncode:
        return None  # one went away while bpftool was walking
    return {item["id"] for item in json.loads(out.stdout or b"[]")} | {-1}


def totals(rows: Iterable[pb.SyscallStats]) -> Counter[str]:
    """Calls by the name of the system call, over rows."""
    counted: Counter[str] = Counter()
    for row in rows:
        counted[row.syscall_name] += row.call_count
    return counted
