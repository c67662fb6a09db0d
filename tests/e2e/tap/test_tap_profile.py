"""`coral tap --cpu-profile` as users meet it: a real program, the table of its functions, and the
files that are left when the tap ends, by its time or by Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from rich.cells import cell_len

from coral.wire.text import is_printable, safe
from tests import tapping
from tests.pprof_reader import read
from tests.profiles import HOSTILE
from tests.support import (
    ROOT,
    Puppet,
    RunningAgent,
    coral,
    wait_until,
)
from tests.terminal import Terminal

tapped = partial(tapping.tapped, "--cpu-profile")
pytestmark = pytest.mark.usefixtures("nothing_left")

BUSY_S: Final = 1.0
PERIOD_NS: Final = 10_101_010
COMPUTE: Final = "end = time.process_time() + {}\nwhile time.process_time() < end: sum(range(1000))"
_AMOUNT: Final = re.compile(r"([0-9,]+) samples?, ([0-9.]+)(ms|s) of CPU time")


def compute(puppet: Puppet, seconds: float = BUSY_S) -> None:
    """Has it use that much CPU time, and waits until it has."""
    puppet.do(f"exec({COMPUTE.format(seconds)!r})")


def told(out: str) -> int:
    """The samples that the totals tell of."""
    totals = out[out.index("totals of ") :]
    match = _AMOUNT.search(totals)
    assert match, totals
    samples = int(match[1].replace(",", ""))
    shown_ns = float(match[2]) * {"ms": 1e6, "s": 1e9}[match[3]]
    assert shown_ns == pytest.approx(samples * PERIOD_NS, rel=0.01)
    return samples


def folded_samples(path: Path) -> int:
    return sum(int(line.split()[1]) for line in path.read_text().splitlines())


def test_ctrl_c_leaves_a_file_with_all_samples(agent: RunningAgent, tmp_path: Path) -> None:
    path = tmp_path / "flame.folded"
    with Puppet() as puppet, tapped(agent, puppet, arguments=("-o", str(path))) as tap:
        compute(puppet)
        out = tap.finish()
    samples = told(out)
    assert 0.7 * 99 * BUSY_S <= samples <= 1.3 * 99 * (BUSY_S + 1)
    assert folded_samples(path) == samples
    assert out.endswith(f"written to {path}\n")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".html", ".svg", ".pb.gz", ".speedscope.json"])
def test_every_format_has_the_samples_that_the_totals_tell_of(
    suffix: str, agent: RunningAgent, tmp_path: Path
) -> None:
    path = tmp_path / f"flame{suffix}"
    with Puppet() as puppet, tapped(agent, puppet, arguments=("-o", str(path))) as tap:
        compute(puppet, 0.5)
        samples = told(tap.finish())
    content = path.read_bytes()
    if suffix == ".html":
        data = re.search(rb'<script type="application/json" id="data">(.*)</script>', content)
        assert data
        assert json.loads(data[1])["samples"] == samples
    elif suffix == ".svg":
        assert re.findall(rb'data-at="0 0 ([0-9]+)"', content) == [b"%d" % samples]
    elif suffix == ".pb.gz":
        assert sum(row.values[0] for row in read(content).rows) == samples
    else:
        assert json.loads(content)["profiles"][0]["endValue"] == samples * PERIOD_NS


def test_a_tap_whose_time_is_over_writes_its_file(agent: RunningAgent, tmp_path: Path) -> None:
    path = tmp_path / "flame.folded"
    code = f"import time\n{COMPUTE.format(0.3)}"
    arguments = ("--cpu-profile", "-o", path, "--", sys.executable, "-I", "-S", "-c", code)
    done = subprocess.run(
        coral("tap", "--agent", agent.address, *arguments),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "target exited" in done.stdout
    assert folded_samples(path) == told(done.stdout)


def test_an_idle_process_has_no_samples_and_that_is_said(
    agent: RunningAgent, tmp_path: Path
) -> None:
    path = tmp_path / "flame.html"
    with Puppet() as puppet, tapped(agent, puppet, arguments=("-o", str(path))) as tap:
        out = tap.finish()
    words = "nothing ran: no sample was taken, so the target used next to no CPU time"
    assert words in out
    assert words in path.read_text()


def test_json_has_a_row_for_each_stack(agent: RunningAgent) -> None:
    with Puppet() as puppet, tapped(agent, puppet, arguments=("-o", "json")) as tap:
        compute(puppet, 0.5)
        rows = [json.loads(line) for line in tap.finish().splitlines()]
        samples = [row for row in rows if "stack" in row]
        assert {row["pid"] for row in samples} == {puppet.pid}
    assert 0.7 * 50 <= sum(row["count"] for row in samples) <= 1.3 * 150
    assert {row["period_ns"] for row in samples} == {PERIOD_NS}


@pytest.mark.parametrize("name", [HOSTILE[at] for at in (0, 1, 3, 5, 10)])
def test_a_function_of_any_name_is_one_frame(
    name: str, agent: RunningAgent, tmp_path: Path
) -> None:
    program, path = tmp_path / "named", tmp_path / "named.pb.gz"
    source = ROOT / "tests/programs/burn.c"
    subprocess.run(["gcc", "-O1", "-o", program, source], check=True)
    subprocess.run(["objcopy", "--redefine-sym", f"main={name}", program], check=True)
    done = subprocess.run(
        coral(
            "tap", "--agent", agent.address, "--cpu-profile", "-F", "499", "-o", path,
            "--", program, "400",
        ),
        input="x", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = read(path.read_bytes()).rows
    samples = sum(row.values[0] for row in rows)
    # The agent replaces what cannot be printed, and cuts very long names.
    start = safe(name)[:500]
    named = (row for row in rows if any(each.startswith(start) for each in row.names))
    assert sum(row.values[0] for row in named) >= 0.9 * samples > 90
    assert all(is_printable(line) for line in done.stdout.splitlines())


def test_a_terminal_of_eighty_columns_has_a_bar_and_the_time_that_is_left(
    agent: RunningAgent, tmp_path: Path
) -> None:
    path = tmp_path / "flame.svg"
    with Puppet() as puppet:
        puppet.begin("while True: pass")
        target = f"pid:{puppet.pid}"
        command = coral(
            "tap", "--agent", agent.address, "--cpu-profile", target, "-d", "50s", "-o", path
        )
        with Terminal(command, 24, 80) as terminal:
            wait_until(lambda: terminal.has_drawn("Ctrl-C stops", "FUNCTION", "█"), 30)
            terminal.press("\x03")
            assert terminal.finish() == 128 + signal.SIGINT
    lines = terminal.text.replace("\r", "\n").split("\n")
    assert max(map(cell_len, lines)) <= max(80, len(f"written to {path}"))
    assert re.search(r"\d+s left, Ctrl-C stops", terminal.text)
    assert path.read_text().startswith("<?xml")


def test_a_closed_pipe_does_not_cost_the_file(agent: RunningAgent, tmp_path: Path) -> None:
    path = tmp_path / "flame.folded"
    with Puppet() as puppet:
        puppet.begin("while True: pass")
        running = subprocess.Popen(
            coral(
                "tap", "--agent", agent.address, "--cpu-profile", f"pid:{puppet.pid}", "-d", "50s",
                "-i", "500ms",
                "-o", path,
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert running.stdout
        assert running.stderr
        assert running.stdout.readline() == "\n"
        running.stdout.close()
        assert running.wait(60) == 128 + signal.SIGPIPE
        assert running.stderr.read() == ""
        running.stderr.close()
    assert folded_samples(path) > 0


@contextmanager
def tap_whose_folder_goes(agent: RunningAgent, path: Path) -> Iterator[subprocess.Popen[str]]:
    """A tap of a busy process to PATH, whose folder is removed once rows have come."""
    path.parent.mkdir()
    with Puppet() as puppet:
        puppet.begin("while True: pass")
        running = subprocess.Popen(
            coral(
                "tap", "--agent", agent.address, "--cpu-profile", f"pid:{puppet.pid}", "-o", path
            ),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert running.stdout
        assert running.stdout.readline() == "\n"
        path.parent.rmdir()
        yield running


def test_a_file_that_cannot_be_written_is_told_after_the_totals(
    agent: RunningAgent, tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "flame.html"
    with tap_whose_folder_goes(agent, path) as running:
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=60)
    assert "totals of" in out
    assert "written to" not in out
    assert err == f"coral: {path} was not written: No such file or directory\n"
    assert running.returncode == 1


def test_a_closed_pipe_and_a_file_that_cannot_be_written_are_one_line(
    agent: RunningAgent, tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "flame.html"
    with tap_whose_folder_goes(agent, path) as running:
        assert running.stdout
        assert running.stderr
        running.stdout.close()
        assert running.wait(60) == 128 + signal.SIGPIPE
        said = running.stderr.read()
        running.stderr.close()
    assert said == f"coral: {path} was not written: No such file or directory\n"
