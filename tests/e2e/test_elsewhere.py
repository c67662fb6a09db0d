"""On systems other than Linux, without privilege, in a hostile directory: everything starts, and
reports what is missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from coral.bpf.probing.capabilities import TRACING, missing
from coral.cli.main import COMMANDS
from tests.environment import agent_of
from tests.support import ROOT

CORAL: Final = Path(sys.executable).with_name("coral")

OFF_LINUX: Final = textwrap.dedent("""
    import sys, asyncio
    # Other packages have modules for each platform, and only those for this one are installed.
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

UNPRIVILEGED: Final = textwrap.dedent("""
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

# Runs the compiler's process. bcc is not on its path, so it imports the hostile module or none.
COMPILER: Final = textwrap.dedent("""
    from coral.bpf import LoadError
    from coral.bpf.loading import bcc
    try:
        bcc._run({"text": "", "flags": [], "functions": [], "paths": []}, "compiling")
    except LoadError as error:
        print(error.log)
""")


def run(code: str, *arguments: str, prefix: Sequence[str] = (), cwd: Path = ROOT) -> list[str]:
    done = subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-P", "-c", code, *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_off_linux_everything_imports_and_says_why_it_cannot() -> None:
    supported, error = run(OFF_LINUX)
    assert supported.startswith("False eBPF needs Linux; this is ")
    assert error.startswith("syscall_stats: eBPF needs Linux; this is ")


def test_without_privilege_the_agent_serves_and_says_why_it_cannot(tmp_path: Path) -> None:
    # Another user might not be able to read the checkout, so the test drops capabilities instead.
    without = ("setpriv", "--bounding-set=-bpf,-perfmon,-sys_admin")
    can, reason, started, status = run(UNPRIVILEGED, str(tmp_path), prefix=without)
    assert can == "False False []"
    assert reason == missing(TRACING)
    assert started == f"False True syscall_stats: {reason}"
    assert status == "0"


class Hostile(NamedTuple):
    """A directory with a module of every name that a program here might import; importing one adds
    a line to the file `imported`."""

    directory: Path
    imported: Path

    def coral(self, *arguments: str, status: int = 0) -> str:
        """Runs the installed command in the directory; returns its standard output."""
        done = subprocess.run(
            [CORAL, *arguments], cwd=self.directory, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    """A directory of hostile modules. On exit, fails if anything was imported from it."""
    here = Hostile(tmp_path / "hostile", tmp_path / "imported")
    names = {*sys.stdlib_module_names, *packages_distributions(), "bcc", "sitecustomize"}
    folders = [path.name for path in (ROOT / "src/coral").iterdir() if path.is_dir()]
    places = [
        *(Path(f"{name}.py") for name in names | set(folders) if name.isidentifier()),
        *(Path("coral", folder, "__init__.py") for folder in folders),
        *(Path("coral", folder, "main.py") for folder in folders),
        *(Path(folder, "main.py") for folder in folders),
        Path("coral/__init__.py"),
    ]
    code = f"with open({str(here.imported)!r}, 'a') as file:\n    print(__file__, file=file)\n"
    for place in places:
        path = here.directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    yield here
    assert not here.imported.exists(), here.imported.read_text()


def test_a_hostile_directory_would_be_noticed(hostile: Hostile) -> None:
    program = hostile.directory / "program.py"  # Python first looks for modules beside the program
    program.write_text("import agent")
    subprocess.run([sys.executable, program], check=True)
    assert hostile.imported.read_text().splitlines()[-1].endswith("hostile/agent.py")
    hostile.imported.unlink()


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids="".join)
def test_help_imports_nothing_from_the_current_directory(
    command: tuple[str, ...], hostile: Hostile
) -> None:
    assert hostile.coral(*command, "--help").startswith(" ".join(("Usage: coral", *command)))


@pytest.mark.usefixtures("nothing_left")
def test_an_agent_and_its_clients_import_nothing_from_the_current_directory(
    hostile: Hostile, tmp_path: Path
) -> None:
    with agent_of(CORAL, tmp_path, cwd=hostile.directory) as address:
        to_it = ("--agent", address)
        assert "syscall_stats" in hostile.coral("capabilities", *to_it)
        assert hostile.coral("collectors", *to_it) == "no collector is running\n"
        assert hostile.coral("stop", *to_it, "none", status=1) == ""
        assert "execve" in hostile.coral("tap", *to_it, "--syscall-stats", "--", "true")


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("command", "text"),
    [
        pytest.param(
            ("demo", "-d", "1s"), "coral_syscall_calls_total", marks=pytest.mark.soak, id="demo"
        ),
        pytest.param(("doctor",), "agent stops", id="doctor"),
    ],
)
def test_started_processes_import_nothing_from_the_current_directory(
    command: tuple[str, ...], text: str, hostile: Hostile
) -> None:
    assert text in hostile.coral(*command)


def test_bccs_compiler_imports_nothing_from_the_current_directory(hostile: Hostile) -> None:
    assert run(COMPILER, cwd=hostile.directory)[0] == (
        "bcc cannot be imported: No module named 'bcc'"
    )
