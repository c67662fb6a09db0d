"""Off Linux, without privilege, from a wheel: everything imports and starts, and says why not."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import build_hook
from coral.bpf.probing.capabilities import TRACING, missing
from tests.support import ROOT

OFF_LINUX = textwrap.dedent("""
    import sys, asyncio
    # Other people's packages have parts for each platform; only this one's are installed.
    import grpc, numpy, prometheus_client, psutil, rich.console, structlog, urllib.request, uvloop
    sys.platform = "darwin"
    import coral.agent.main, coral.cli.main, coral.client, coral.colony
    from coral.agent import StartRequest, Supervisor
    from coral.agent.errors import UnsupportedError

    async def main():
        async with Supervisor() as supervisor:
            support = (await supervisor.capabilities())["syscall_stats"]
            print(support.supported, support.reason)
            try:
                await supervisor.start(StartRequest("syscall_stats", config={"scope": "host"}))
            except UnsupportedError as error:
                print(error)

    asyncio.run(main())
""")

UNPRIVILEGED = textwrap.dedent("""
    import os, sys, asyncio
    from coral.mesh.v1 import ebpf_pb2 as pb
    from coral.client import AgentClient

    async def main():
        agent = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "coral.cli.main", "agent",
            "--listen", f"unix:{sys.argv[1]}/a.sock", "--metrics", "127.0.0.1:0",
            stderr=asyncio.subprocess.PIPE)
        line = b""
        while b"listening" not in line:
            line = await agent.stderr.readline()
            assert line, "the agent ended"
        async with AgentClient(f"unix:{sys.argv[1]}/a.sock") as client:
            can = await client.capabilities()
            print(can.supported, can.cap_bpf, list(can.available_collectors))
            print(can.unsupported_reason)
            started = await client.start(pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
                                         config={"pid": str(os.getpid())})
            print(started.supported, started.collector_id == "", started.error)
        agent.terminate()
        await agent.communicate()
        print(agent.returncode)

    asyncio.run(main())
""")


def run(code: str, *arguments: str, prefix: Sequence[str] = ()) -> list[str]:
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", code, *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_off_linux_everything_imports_and_says_why_it_cannot() -> None:
    supported, error = run(OFF_LINUX)
    assert supported.startswith("False eBPF needs Linux; this is ")
    assert error.startswith("syscall_stats: eBPF needs Linux; this is ")


def test_without_privilege_the_agent_serves_and_says_why_it_cannot(tmp_path: Path) -> None:
    # Not another user: who could not read a checkout in somebody's home.
    without = ("setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin")
    can, reason, started, status = run(UNPRIVILEGED, str(tmp_path), prefix=without)
    assert can == "False False []"
    assert reason == missing(TRACING)
    assert started == f"False True syscall_stats: {reason}"
    assert status == "0"


def test_the_wheel_carries_what_was_compiled(tmp_path: Path) -> None:
    subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", tmp_path, ROOT),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("coral_ebpf_agent-")
    assert "none-any" not in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "coral/bpf/programs/syscall_stats/syscall_stats.bpf.o",
        "coral/bpf/programs/features/features.bpf.o",
        "coral/mesh/v1/ebpf_pb2.py",
        "coral/collectors/syscall_stats/syscalls.tsv",
        "coral/cli/main.py",
        "coral/py.typed",
    } <= names
    assert {name.split("/")[0] for name in names} == {
        "coral",
        f"{wheel.name.partition('-py3')[0]}.dist-info",
    }


@pytest.mark.parametrize("arch", ["x86", "arm64"])
def test_every_program_compiles_for_both_processors(tmp_path: Path, arch: str) -> None:
    for source in build_hook.program_sources():
        command = build_hook.clang_command(source, tmp_path / f"{source.stem}.o", arch)
        subprocess.run(command, check=True)
