"""A colony whose log cannot be written follows and stores as ever, also while its disk is full."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.colony_process import RunningColony
from tests.http_servers import free_port
from tests.support import ROOT, Puppet, RunningAgent, coral, running_agent, wait_until

PAGE_BYTES: Final = 4096
# How a shell starts a command with such a standard error.
CLOSED: Final = 'exec "$@" 2>&-'
FULL_DISK: Final = 'exec "$@" 2>/dev/full'
AS_IT_IS: Final = 'exec "$@"'


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    with running_agent(tmp_path_factory.mktemp("colony-log") / "agent") as running:
        yield running


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@contextmanager
def colony_that_logs(
    shell: str, directory: Path, config: dict[str, object], stderr: int | None = None
) -> Iterator[RunningColony]:
    """A colony that SHELL starts, once its metrics are served."""
    path = directory / "colony.yaml"
    path.write_text(yaml.safe_dump(config))
    metrics = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            "sh", "-c", shell, "sh", *coral("colony"), "--config", str(path),
            "--data", str(directory / "disk/data"), "--listen", f"unix:{directory}/colony.sock",
            "--metrics", metrics, "--log-format", "json",
        ],
        stderr=stderr, cwd=ROOT,
    )  # fmt: skip
    colony = RunningColony(process, directory, metrics)

    def serves() -> bool:
        assert process.poll() is None
        try:
            return colony.page("/healthz") == (200, "ok\n")
        except OSError:
            return False

    try:
        wait_until(serves, timeout_s=60)
        yield colony
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def config_of(agent: RunningAgent, puppet: Puppet) -> dict[str, object]:
    """Also of an agent that is not there, which is logged."""
    return {
        "agents": {"addresses": [agent.address, "127.0.0.1:1"]},
        "collect": [{"kind": "syscall_stats", "config": {"pid": puppet.pid, "interval": "1s"}}],
    }


def is_storing(colony: RunningColony, puppet: Puppet) -> None:
    """Until more rows are stored."""
    before = colony.total("coral_colony_store_rows_total")

    def more() -> bool:
        puppet.getppid(10)
        return colony.total("coral_colony_store_rows_total") > before

    wait_until(more, timeout_s=60)


def goes_on(colony: RunningColony, disk: Path, puppet: Puppet) -> None:
    """Follows and stores; also once its disk was full."""
    wait_until(lambda: colony.total("coral_colony_agents", state="away") == 1, timeout_s=60)
    is_storing(colony, puppet)
    free = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(free.f_bavail * free.f_frsize))

    def is_full() -> bool:
        puppet.getppid(10)
        return colony.total("coral_colony_store_state", state="disk_full") == 1

    wait_until(is_full, timeout_s=60)
    filler.unlink()
    is_storing(colony, puppet)
    wait_until(lambda: colony.total("coral_colony_agents", state="followed") == 1)


@pytest.mark.parametrize(
    "shell",
    [
        pytest.param(CLOSED, id="closed"),
        pytest.param(FULL_DISK, id="full disk", marks=pytest.mark.soak),
    ],
)
def test_a_colony_that_cannot_log_goes_on_and_counts_the_lines_it_lost(
    agent: RunningAgent, tmp_path: Path, disk: Path, shell: str
) -> None:
    with Puppet() as puppet, colony_that_logs(shell, tmp_path, config_of(agent, puppet)) as colony:
        dropped = wait_until(lambda: colony.total("coral_colony_log_lines_dropped_total"))
        goes_on(colony, disk, puppet)
        wait_until(lambda: colony.total("coral_colony_log_lines_dropped_total") > dropped)
        stderr = Path(f"/proc/{colony.process.pid}/fd/2").readlink()  # no file of the store
        assert str(stderr) == ("/dev/null" if shell == CLOSED else "/dev/full")
        assert colony.stop() == 0


def test_a_colony_whose_log_nobody_reads_goes_on_and_its_lines_wait(
    agent: RunningAgent, tmp_path: Path, disk: Path
) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PAGE_BYTES)
    os.write(write_end, b"x" * (PAGE_BYTES - 1) + b"\n")
    with Puppet() as puppet, closing(os.fdopen(read_end)) as lines:
        config = config_of(agent, puppet)
        with colony_that_logs(AS_IT_IS, tmp_path, config, write_end) as colony:
            os.close(write_end)
            goes_on(colony, disk, puppet)
            assert lines.readline() == "x" * (PAGE_BYTES - 1) + "\n"
            assert '"event": "starting"' in lines.readline()
            assert colony.total("coral_colony_log_lines_dropped_total") == 0
            assert colony.stop() == 0
        assert '"event": "stopped"' in lines.read().splitlines()[-1]
