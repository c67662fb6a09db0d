"""The README's example programs are typed, run, and report every call."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.support import ROOT, Calls, running_agent, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

CALLS: Final = 200_000


PROGRAMS: Final = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@contextmanager
def example(
    module: str, running: Calls, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The program of the README that imports MODULE, started on RUNNING."""
    (code,) = (program for program in PROGRAMS if f"from {module} import" in program)
    assert code.count("1234") == 1
    started = subprocess.Popen(
        [sys.executable, "-W", "error", "-P", "-c", code.replace("1234", str(running.pid))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def assert_it_reports(started: subprocess.Popen[str], calls_made: int) -> None:
    out, err = started.communicate(timeout=30)
    assert (started.returncode, err) == (0, "")
    counts = re.findall(r"^getppid (\d+)$", out, re.MULTILINE)
    assert sum(map(int, counts)) == calls_made


def test_the_examples_are_typed(tmp_path: Path) -> None:
    assert len(PROGRAMS) == 2
    for number, program in enumerate(PROGRAMS):
        (tmp_path / f"example_{number}.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mypy", "--strict", *tmp_path.glob("*.py")],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "MYPYPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_library_example_reports_every_call(calls: Callable[..., Calls]) -> None:
    running = calls("getppid", CALLS)
    with example("coral.agent", running) as started:
        assert started.stdout
        for line in started.stdout:
            if "session started" in line:
                break
        running.go()
        running.finish()
        assert_it_reports(started, CALLS)


def test_the_client_example_reports_every_call(tmp_path: Path, calls: Callable[..., Calls]) -> None:
    running = calls("getppid", CALLS)
    with (
        running_agent(tmp_path / "agent") as agent,
        example("coral.client", running, {"CORAL_AGENT": agent.address}) as started,
    ):
        wait_until(lambda: agent.call("ListCollectors", pb.ListCollectorsRequest()).collectors)
        running.go()
        running.finish()
        assert_it_reports(started, CALLS)
