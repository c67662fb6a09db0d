"""Fixtures, and the rule for tests that need the kernel: they run, or say why they cannot."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from coral import bpf
from tests.support import (
    ROOT,
    Calls,
    RunningAgent,
    built,
    loaded,
    nothing_new_since,
    running_agent,
    wait_until,
)

# A worker of pytest-xdist has the width of the terminal that runs the tests; no command under test
# is to know it.
os.environ.pop("COLUMNS", None)
# A shell has what it runs in the background ignore Ctrl-C; commands under test would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("tests.network")  # its assertions say what differs, too

_LONGEST_FILES = {
    "test_cpu_profile_languages.py", "test_http_oracle.py", "test_http_tls.py", "test_manifests.py",
    "test_streams.py", "test_tls.py", "test_faults.py", "test_lifecycle.py", "test_vanishing.py",
    "test_attacker.py", "test_wheel.py", "test_tap_http.py", "test_doctor.py", "test_otlp.py",
    "test_hostile_names.py", "test_supervisor.py", "test_targets.py", "test_syscall_hosts.py",
    "test_tcp_hosts.py", "test_tcp_metrics.py", "test_tap.py", "test_limits.py",
    "test_http_servers.py", "test_http_wire.py", "test_cpu_profile.py", "test_image.py",
}  # fmt: skip
_ran = Counter[str]()


def pytest_sessionstart() -> None:
    """A rung is only tested where it is taken: what CORAL_WITHOUT names has to be missing."""
    features = bpf.probe()
    found = {feature.name for feature in features.features if not feature.available}
    wanted = {name for name in os.environ.get("CORAL_WITHOUT", "").split(",") if name}
    if not features.obstacle and wanted - found:
        pytest.exit(f"still here, despite CORAL_WITHOUT: {', '.join(wanted - found)}", 4)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out_those_of_bcc(config, items)
    # Workers take files in turn: with the longest at the end, one would work alone there.
    items.sort(key=lambda item: Path(item.path).name not in _LONGEST_FILES)
    obstacle = bpf.probe().obstacle
    if not obstacle and os.geteuid() != 0:
        obstacle = "not root"
    for item in items:
        if item.get_closest_marker("timed"):
            # What is slow is late every time; what is late once was kept waiting by the machine,
            # whose other work may take a while.
            item.add_marker(pytest.mark.flaky(reruns=4, reruns_delay=2))
        if {"kernel", "e2e"} & set(Path(item.path).parts):
            item.add_marker("kernel")
            if obstacle:
                item.add_marker(pytest.mark.skip(reason=f"needs eBPF: {obstacle}"))


def _leave_out_those_of_bcc(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Some tests need bcc and the headers of this kernel, some those of any kernel. The matrix of
    kernels installs both, and runs every test of programs that bcc compiles."""
    bcc = bpf.probe()["bcc"]
    lendable = any(Path("/usr/src").glob("linux-headers-*-common"))
    suffices = {"e2e"} if lendable and "not installed" not in bcc.reason else set()
    left_out = [
        item
        for item in items
        if item.get_closest_marker("needs_bcc")
        and not (bcc.available or suffices & set(Path(item.path).parts))
    ]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "kernel" in report.keywords and (report.when == "call" or report.outcome != "passed"):
        _ran[report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(
        f"tests on the real kernel: {_ran['passed']} passed, {_ran['failed']} failed, "
        f"{_ran['skipped']} skipped"
    )


@pytest.fixture(scope="session")
def programs() -> Path:
    """A directory with tests/programs compiled."""
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
    for source in (ROOT / "tests/programs").glob("*.c"):
        program = built(source.stem, [source], partial(_cc, source, flags))
    return program.parent


def _cc(source: Path, flags: Sequence[str], output: Path) -> list[str | Path]:
    return ["cc", *flags, source, "-o", output]


@pytest.fixture
def calls(programs: Path) -> Iterator[Callable[..., Calls]]:
    """Starts `calls` with the given arguments, waiting to be released; none outlives the test."""
    started: list[Calls] = []

    def start(*arguments: object, threads: int = 1) -> Calls:
        started.append(Calls(programs / "calls", *arguments, threads=threads))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    """An agent with the default configuration."""
    with running_agent(tmp_path / "agent") as running:
        yield running


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails if the test leaves a program, map or link in the kernel."""
    before = loaded()
    yield
    wait_until(lambda: nothing_new_since(before))
