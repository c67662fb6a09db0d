"""A local user without privileges attacks an agent in many ways at the same time. Root's session on
the unix socket loses nothing, root's calls all succeed, and the agent stays small.

tests/programs/attacker.py has the attacks; they run as `nobody`. On a port without a token a caller
may do what root may, because the configuration says so: there the attackers make no request that
would be granted, apart from subscriptions.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Self

import grpc
import pytest

from coral.client import AgentClient, AgentError, EndReason, Retry
from tests.programs.attacker import ATTACKS, Http2, call
from tests.support import (
    PATIENCE,
    ROOT,
    Puppet,
    RunningAgent,
    Vitals,
    coral,
    resident_kib,
    running_agent,
    scrape,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

NOBODY: Final = 65534
# Half of them are for an agent with a token, half for one that trusts every local user.
SECONDS: Final = float(os.environ.get("CORAL_ATTACK_SECONDS", "30")) / 2
AGAIN_SECONDS: Final = 20 * PATIENCE  # the second wave, during which the agent is stopped
CALLS: Final = 500  # a burst of the program that root watches
TOKEN: Final = "a-token-of-this-test"
# So that an agent that attackers can make grow fails this test, not the machine.
BOUNDED: Final = ("prlimit", f"--as={8 << 30}", "--nofile=1024:1024")
MORE_DESCRIPTORS, MORE_KIB, PEAK_KIB, LOG_BYTES = 16, 32 << 10, 128 << 10, 1 << 20
TRAPS: Final = ("fifo", "zero", "huge", "link", "flipping")


@dataclass
class Ground:
    """Directories that every user can reach: one of root, and one of the attackers."""

    root: Path
    theirs: Path


@pytest.fixture
def ground() -> Iterator[Ground]:
    # Pytest's own directories are closed to other users.
    top = Path(tempfile.mkdtemp(prefix="coral-attack-"))
    top.chmod(0o755)
    made = Ground(top / "root", top / "theirs")
    made.root.mkdir(mode=0o755)
    made.theirs.mkdir(mode=0o755)
    os.chown(made.theirs, NOBODY, NOBODY)
    try:
        yield made
    finally:
        shutil.rmtree(top)


@contextmanager
def agent_on_every_port(ground: Ground, auth: str) -> Iterator[tuple[RunningAgent, int]]:
    """An agent with ordinary limits on a unix socket and a TCP port, which is yielded too."""
    token_file = ground.root / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    config = {
        "listen": [f"unix:{ground.root}/agent/agent.sock", "127.0.0.1:0"],
        "auth": (
            {"token_file": str(token_file)} if auth == "token" else {"insecure_loopback": True}
        ),
        # Callers that the configuration trusts may use up the places for collectors.
        "limits": {"concurrent_collectors": 3 if auth == "token" else 64},
        "services": {name: {"pid_file": str(ground.theirs / name)} for name in TRAPS},
    }
    with running_agent(ground.root / "agent", config, prefix=BOUNDED) as agent:
        (grpc_addresses,) = (line["grpc"] for line in agent.log() if line["event"] == "listening")
        assert isinstance(grpc_addresses, list)
        yield agent, int(grpc_addresses[1].rpartition(":")[2])


class Attackers:
    """Attacks, each a process of `nobody`, killed with the block."""

    def __init__(self, attacks: tuple[str, ...], target: Mapping[str, object]) -> None:
        source = (ROOT / "tests/programs/attacker.py").read_text()
        self.processes = {
            name: subprocess.Popen(
                # Neither the environment nor the project is for others to read.
                [os.path.realpath(sys.executable), "-I", "-S", "-c", source, name,
                 json.dumps(target)],
                user=NOBODY, group=NOBODY, extra_groups=(), cwd="/", env={},
                stdout=subprocess.PIPE,
            )
            for name in attacks
        }  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            with process:  # closes its output, and waits
                pass

    async def did(self) -> dict[str, dict[str, int]]:
        """Waits until they are done; what each has counted."""
        done = {}
        for name, process in self.processes.items():
            out, _ = await asyncio.to_thread(process.communicate)
            assert process.returncode == 0, name
            done[name] = json.loads(out)
        return done


@dataclass
class Root:
    """What root got meanwhile."""

    made: int = 0  # calls of the watched program
    counted: int = 0  # and what its session told of them
    losses: dict[str, int] = field(default_factory=dict)
    end: EndReason | None = None
    rounds: int = 0
    failures: list[str] = field(default_factory=list)
    refusals: set[tuple[str, grpc.StatusCode]] = field(default_factory=set)


async def root_works(agent: RunningAgent, until: asyncio.Event) -> Root:
    """Watches one program on one stream that may not break, and makes calls on new connections."""
    got = Root()
    ready = asyncio.Event()
    with Puppet() as watched, Puppet() as other:
        async with AgentClient(agent.address, TOKEN) as client:
            started = await client.start("syscall_stats", config={"pid": watched.pid})

            async def read() -> None:
                never = Retry(patience_s=0)
                async with client.subscribe(started.collector_id, retry=never) as stream:
                    ready.set()
                    async for batch in stream:
                        got.counted += sum(
                            row.call_count
                            for row in batch.message.syscall_stats
                            if row.syscall_name == "getppid"
                        )
                        got.end = batch.end.reason if batch.end else None
                    got.losses = {**stream.account.lost, **stream.account.lost_in_kernel}

            async def call() -> None:
                while not until.is_set():
                    await asyncio.to_thread(watched.getppid, CALLS)
                    got.made += CALLS
                    await asyncio.sleep(0.05)

            async def ask() -> None:
                while not until.is_set():
                    await one_round(agent, other.pid, got)
                    await asyncio.sleep(0.2)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(read())
                await ready.wait()
                asking = [tasks.create_task(call()), tasks.create_task(ask())]
                await asyncio.wait(asking)
                try:
                    await client.stop(started.collector_id)
                except AgentError as error:
                    got.failures.append(f"at the end: {error}")
    return got


async def read_to_end(client: AgentClient, collector_id: str) -> EndReason | None:
    """How the session ended, on one stream that may not break."""
    end = None
    async with client.subscribe(collector_id, retry=Retry(patience_s=0)) as stream:
        async for batch in stream:
            end = batch.end.reason if batch.end else None
    return end


async def one_round(agent: RunningAgent, pid: int, got: Root) -> None:
    """Four calls that must be granted and one that must be refused, on a new connection."""
    client = AgentClient(agent.address, TOKEN, timeout_s=10 * PATIENCE)
    try:
        async with client:
            await client.collectors()
            await client.capabilities()
            started = await client.start("syscall_stats", config={"pid": pid}, duration_s=30)
            await client.stop(started.collector_id)
            await start_on_trap(client, got)
    except AgentError as error:
        got.failures.append(f"round {got.rounds}: {error}")
    got.rounds += 1


async def start_on_trap(client: AgentClient, got: Root) -> None:
    """Asks for a service whose pid file is a trap."""
    name = TRAPS[got.rounds % len(TRAPS)]
    try:
        started = await client.start("syscall_stats", service_name=name)
    except AgentError as error:
        got.refusals.add((name, error.code))
    else:
        got.failures.append(f"{name} was granted")
        await client.stop(started.collector_id)


async def stops_while_root_reads(agent: RunningAgent) -> None:
    """Ends the agent, which must come in time and be told to a session's reader."""
    async with AgentClient(agent.address, TOKEN) as client:
        started = await client.start("syscall_stats", config={"pid": os.getpid()})
        reading = asyncio.create_task(read_to_end(client, started.collector_id))
        await asyncio.sleep(1)  # nothing tells that the attackers are all at it
        assert not reading.done()
        agent.process.terminate()
        told_at = time.monotonic()
        assert await asyncio.to_thread(agent.process.wait, 60) == 0
        assert time.monotonic() - told_at < 2 * PATIENCE
        assert await reading is EndReason.AGENT_SHUTDOWN


def peak_kib(pid: int) -> int:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1])


def strings(value: object) -> Iterator[str]:
    """Every text of a log line."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings(each)


@pytest.mark.timed
@pytest.mark.soak
@pytest.mark.timeout(2 * SECONDS * PATIENCE + 180)
@pytest.mark.parametrize("auth", ["token", "insecure_loopback"])
async def test_attackers_cost_roots_session_nothing_and_the_agent_stays_small(
    auth: str, ground: Ground
) -> None:
    attacks = tuple(ATTACKS)
    with ExitStack() as stack:
        agent, port = stack.enter_context(agent_on_every_port(ground, auth))
        pid = agent.process.pid
        await one_round(agent, os.getpid(), Root())
        wait_until(lambda: b"collector available" in agent.log_path.read_bytes())
        before, before_kib = Vitals.of(pid), resident_kib(pid)
        target = {
            "grpc": ["127.0.0.1", port],
            "metrics": ["127.0.0.1", int(agent.metrics.rpartition(":")[2])],
            "socket": agent.address.removeprefix("unix:"),
            "directory": str(ground.theirs),
            "seconds": SECONDS,
        }
        over = asyncio.Event()
        with Attackers(attacks, target) as first:
            working = asyncio.create_task(root_works(agent, over))
            did = await first.did()
            over.set()
            got = await working
        after_kib = resident_kib(pid)
        wait_until(lambda: Vitals.of(pid).descriptors <= before.descriptors + MORE_DESCRIPTORS, 30)
        # Those who come after the attackers, to the same ports, are served.
        late = Root()
        await one_round(replace(agent, address=f"127.0.0.1:{port}"), os.getpid(), late)
        scraped = await asyncio.to_thread(scrape, agent)
        print(json.dumps(did), got, f"RSS {before_kib} -> {after_kib} KiB, peak {peak_kib(pid)}")

        # The attackers are real: each did its work, however busy the machine was.
        assert all(sum(each.values()) > 0 for each in did.values()), did
        assert did["idle"]["connections"] > 20
        assert did["unix_socket"]["denied"] == did["unix_socket"]["tries"] > 20

        assert got.failures == late.failures == []
        assert "coral_agent_sessions_active" in scraped
        assert got.rounds > len(TRAPS)
        assert got.end == EndReason.STOPPED
        assert not got.losses
        assert got.counted == got.made > 10 * CALLS
        assert got.refusals == {(name, grpc.StatusCode.NOT_FOUND) for name in TRAPS}

        assert after_kib - before_kib < MORE_KIB
        assert peak_kib(pid) - before_kib < PEAK_KIB
        log = agent.log_path.read_text()
        assert len(log) < LOG_BYTES
        assert not [line for line in agent.log() if "exception" in line]
        for text in strings(agent.log()):
            assert all(character.isprintable() for character in text), text

        shutil.rmtree(ground.theirs, ignore_errors=True)
        ground.theirs.mkdir(mode=0o755)
        os.chown(ground.theirs, NOBODY, NOBODY)
        with Attackers(attacks, {**target, "seconds": AGAIN_SECONDS}) as second:
            await stops_while_root_reads(agent)
            assert all(process.poll() is None for process in second.processes.values())


@pytest.mark.parametrize("trap", ["lock", "socket"])
def test_an_agent_follows_no_link_that_another_user_may_have_laid(
    trap: str, ground: Ground
) -> None:
    path, victim = ground.theirs / "agent.sock", ground.root / "victim"
    path.parent.chmod(0o777)
    victim.write_text("whole")
    laid = path.with_name(f"{path.name}.lock") if trap == "lock" else path
    subprocess.run(
        ["ln", "-s", victim, laid], check=True, user=NOBODY, group=NOBODY, extra_groups=()
    )
    ran = subprocess.run(
        coral("agent", "--listen", f"unix:{path}", "--metrics", ""),
        capture_output=True, text=True, timeout=30 * PATIENCE, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert str(ground.theirs) in ran.stderr
    assert laid.is_symlink()
    assert victim.read_text() == "whole"


async def test_a_call_whose_path_is_no_text_harms_no_other_caller(ground: Ground) -> None:
    with agent_on_every_port(ground, "token") as (agent, port):
        for _ in range(3):
            caller = Http2(("127.0.0.1", port))
            caller.send(call(1, b"/\xe6\xf3", b""))
            await asyncio.to_thread(caller.receive, 1)
            caller.close()
        for address in (agent.address, f"127.0.0.1:{port}"):
            got = Root()
            await one_round(replace(agent, address=address), os.getpid(), got)
            assert got.failures == [], address
