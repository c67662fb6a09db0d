"""The command line as users meet it: rows, exit statuses, signals, a terminal, a demonstration."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import yaml

from coral.views.text import times
from tests.support import (
    Calls,
    Puppet,
    RunningAgent,
    collectors_at_work,
    coral,
    running_agent,
    start_collector,
    wait_until,
)
from tests.terminal import Terminal

ENDLESS: Final = "while True: os.getppid(); time.sleep(0.001)"
INCOMPLETE: Final = (
    r"incomplete: the connection to the agent was lost after \d\d:\d\d:\d\d; what came then is not "
    "known"
)
COLUMNS: Final = [
    *("SYSCALL", "CALLS", "CALLS/S", "ERRORS", "WHY", "P50", "P95", "P99", "MAX", "TIME")
]


pytestmark = pytest.mark.usefixtures("nothing_left")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A `coral` command, to its end."""
    return subprocess.run(
        coral(*arguments),
        check=False,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def tap_arguments(agent: RunningAgent, *arguments: object) -> list[str]:
    return coral("tap", "--agent", agent.address, "--syscall-stats", "-i", "100ms", *arguments)


def tap(agent: RunningAgent, *arguments: object) -> subprocess.Popen[str]:
    """`coral tap`, started; it is subscribed when this returns."""
    started = subprocess.Popen(
        tap_arguments(agent, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: subscribers(agent) == 1)
    return started


def subscribers(agent: RunningAgent) -> int:
    return sum(len(info.subscribers) for info in collectors_at_work(agent).values())


def tap_of_calls(agent: RunningAgent, calls: Calls, output: str) -> str:
    """What a tap of CALLS, which it lets go, prints until the program has ended."""
    running = tap(agent, f"pid:{calls.pid}", "-o", output)
    calls.go()
    calls.finish()
    out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, "")
    return out


def check_exact(records: Sequence[dict[str, Any]], pid: int) -> None:
    """Of `calls getppid 300000 openat 100`: the sums, what every row has, and how it ended."""
    *rows, end = records
    assert end == {"end": "target_exited", "detail": ""}
    counted: Counter[str] = Counter()
    for row in rows:
        counted[row["syscall"]] += row["calls"]
        counted[f"{row['syscall']} errors"] += row["errors"]
        assert (row["collector"], row["pid"], row["comm"]) == ("syscall_stats", pid, "calls")
        if row["syscall"] == "exit_group":  # it never returns
            assert [row[f"{figure}_ns"] for figure in ("p50", "p95", "p99", "max")] == [None] * 4
            continue
        assert 0 <= row["p50_ns"] <= row["p95_ns"] <= row["p99_ns"] <= row["max_ns"]
        assert row["max_ns"] <= row["total_ns"]
        assert row["interval_start_ns"] < row["interval_end_ns"]
        assert sum(row["errors_by_class"].values()) == row["errors"]
    assert counted["getppid"] == 300_000
    assert counted["getppid errors"] == 0
    assert counted["openat"] == counted["openat errors"] == 100
    assert [row["seq"] for row in rows] == list(range(1, len(rows) + 1))


def test_json_is_one_object_a_line_and_adds_up(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 300_000, "openat", 100)
    lines = tap_of_calls(agent, running, "json").splitlines()
    check_exact([json.loads(line) for line in lines], running.pid)


def test_yaml_is_one_document_a_row_and_adds_up(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 300_000, "openat", 100)
    documents = list(yaml.safe_load_all(tap_of_calls(agent, running, "yaml")))
    check_exact(documents, running.pid)


def table_rows(lines: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a plain table by its first one, to the next empty line."""
    assert lines[0].split() == COLUMNS
    rows = {}
    for line in lines[1:]:
        if not line:
            break
        name, *columns = re.split(" {2,}", line)
        assert len(columns) == len(COLUMNS) - 1
        rows[name] = columns
    return rows


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_in_a_pipe_rows_are_plain_and_of_fixed_width(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    running = calls("getppid", 300_000, "openat", 100)
    out = tap_of_calls(agent, running, "table")
    assert "\x1b" not in out
    lines = out.splitlines()
    widths = {len(line) for line in lines if re.search(r"\d%$", line)}
    assert widths == {len(next(line for line in lines if line.startswith("SYSCALL")))}
    at = next(i for i, line in enumerate(lines) if line.startswith("totals of "))
    assert lines[at].endswith(", target exited")
    totals = table_rows(lines[at + 1 :])
    assert (totals["getppid"][0], *totals["getppid"][2:4]) == ("300,000", "0", "-")
    assert (totals["openat"][0], *totals["openat"][2:4]) == ("100", "100", "not found")
    intervals = [
        table_rows(lines[i + 1 :])
        for i, line in enumerate(lines)
        if re.fullmatch(rf"\d\d:\d\d:\d\d  pid:{running.pid}", line)
    ]
    assert len(intervals) >= 2
    assert sum(number(rows["getppid"][0]) for rows in intervals if "getppid" in rows) == 300_000


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + 15)]
)
def test_a_command_gives_its_exit_status(script: str, status: int, agent: RunningAgent) -> None:
    done = run("tap", "--agent", agent.address, "--syscall-stats", "--", "sh", "-c", script)
    assert (done.returncode, done.stderr) == (status, "")
    assert ", target exited" in done.stdout


def test_what_a_command_leaves_running_is_told(agent: RunningAgent) -> None:
    script = "sleep 600 > /dev/null 2>&1 & echo $!"
    done = run("tap", "--agent", agent.address, "--syscall-stats", "--", "sh", "-c", script)
    pid = int(done.stdout.splitlines()[0])
    os.kill(pid, signal.SIGKILL)
    assert done.returncode == 0
    assert done.stderr == (
        "coral: the command has ended and left a process running, which this tap does not watch "
        f"any more: `coral tap pid:{pid}` watches it\n"
    )


def test_a_command_that_outlasts_the_tap_is_waited_for_and_that_is_said(
    agent: RunningAgent, tmp_path: Path
) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    running = tap(agent, "-d", "1s", "--", "sh", "-c", f"read _ < {fifo}; exit 7")
    assert running.stderr
    waits = running.stderr.readline()  # the command cannot end before this line has come
    fifo.write_text("go\n")
    out, err = running.communicate(timeout=60)
    assert waits == ("coral: the time is over; waiting for the command to end (Ctrl-C ends it)\n")
    assert (running.returncode, err) == (7, "")
    assert ", expired" in out


def test_a_command_finds_what_it_would_find_without_coral(agent: RunningAgent) -> None:
    script = "ls /proc/self/fd; grep -E '^Sig(Ign|Blk)' /proc/self/status; pwd; env; cat"
    command = ["sh", "-c", script]
    told = []
    for arguments in (command, tap_arguments(agent, "-o", "json", "--", *command)):
        done = subprocess.run(
            arguments,
            env={"PATH": os.environ["PATH"], "CORAL_TEST": "a=b"},
            input="from standard input\n",
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
        told.append([line for line in done.stdout.splitlines() if not line.startswith("{")])
    assert told[1] == told[0]
    assert "CORAL_TEST=a=b" in told[0]


def test_a_command_that_is_not_there_exits_with_127(agent: RunningAgent) -> None:
    done = run("tap", "--agent", agent.address, "--syscall-stats", "--", "no-such-command")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "coral: no-such-command: there is no such command\n"


def test_a_command_that_cannot_be_run_exits_with_126(agent: RunningAgent, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF and nothing else")
    program.chmod(0o755)
    done = run("tap", "--agent", agent.address, "--syscall-stats", "--", program)
    assert (done.returncode, done.stdout) == (126, "")
    assert done.stderr == f"coral: {program}: Exec format error\n"


def test_a_file_that_is_not_executable_exits_with_126(agent: RunningAgent, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.touch(0o644)
    done = run("tap", "--agent", agent.address, "--syscall-stats", "--", data)
    assert (done.returncode, done.stdout) == (126, "")
    assert done.stderr == f"coral: {data}: Permission denied\n"


def test_a_number_as_a_service_is_taken_for_a_forgotten_prefix(agent: RunningAgent) -> None:
    with Puppet() as puppet:
        done = run("tap", "--agent", agent.address, "--syscall-stats", puppet.pid)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"coral: no process belongs to '{puppet.pid}'")
    assert done.stderr.endswith(f"; did you mean pid:{puppet.pid}?\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("output", ["table", "json"])
def test_a_signal_stops_the_collector_prints_the_totals_and_is_the_exit_status(
    output: str, number: signal.Signals, agent: RunningAgent
) -> None:
    with Puppet() as puppet:
        running = tap(agent, f"pid:{puppet.pid}", "-o", output)
        puppet.getppid(1234)
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
        assert collectors_at_work(agent) == {}
    assert (running.returncode, err) == (128 + number, "")
    if output == "json":
        *rows, end = map(json.loads, out.splitlines())
        assert sum(row["calls"] for row in rows if row["syscall"] == "getppid") == 1234
        assert end["end"] == "stopped"
    else:
        heading, *lines = out[out.index("totals of ") :].splitlines()
        assert heading.endswith(", stopped")
        assert table_rows(lines)["getppid"][0] == "1,234"


def totals_of(out: str) -> tuple[float, dict[str, list[str]]]:
    """The seconds that the totals name, and their rows."""
    heading, *lines = out[out.index("totals of ") :].splitlines()
    (seconds,) = re.findall(r"^totals of ([\d.]+)s, ", heading)
    return float(seconds), table_rows(lines)


@pytest.mark.timed
@pytest.mark.parametrize("mode", [(), ("--events",)])
def test_a_rate_is_over_all_the_time_that_was_watched(
    mode: tuple[str, ...], agent: RunningAgent
) -> None:
    with Puppet() as puppet:
        began = time.monotonic()
        running = tap(agent, f"pid:{puppet.pid}", "--include", "getppid", *mode)
        subscribed = time.monotonic()
        puppet.getppid(60)
        # Nothing is called for a while: these intervals bring no rows, and count all the same.
        wait_until(lambda: time.monotonic() - subscribed > 2.5)
        puppet.getppid(40)
        running.send_signal(signal.SIGINT)
        least_s = time.monotonic() - subscribed
        out, err = running.communicate(timeout=60)
        most_s = time.monotonic() - began
    assert err == ""
    seconds, rows = totals_of(out)
    assert least_s - 0.05 <= seconds <= most_s + 0.05
    assert rows["getppid"][0] == "100"
    assert float(rows["getppid"][1]) == pytest.approx(100 / seconds, rel=0.05)


def test_a_quiet_tap_says_how_long_it_watched(agent: RunningAgent) -> None:
    with Puppet() as puppet:
        began = time.monotonic()
        done = run(
            *("tap", "--agent", agent.address, "--syscall-stats", "--include", "getppid"),
            *(f"pid:{puppet.pid}", "-d", "1500ms"),
        )
        took_s = time.monotonic() - began
    assert (done.returncode, done.stderr) == (0, "")
    pattern = r"^totals of ([\d.]+)s, expired\nno system calls$"
    (seconds,) = re.findall(pattern, done.stdout, re.MULTILINE)
    assert 1.5 <= float(seconds) <= took_s


def test_a_tap_of_a_name_that_nobody_has_says_so(agent: RunningAgent) -> None:
    done = run("tap", "--agent", agent.address, "--syscall-stats", "comm:nobody-has-it", "-d", "1s")
    assert done.returncode == 0
    assert done.stderr == (
        "coral: no process has the command name 'nobody-has-it' now; those that get it later are "
        "watched\n"
    )


@pytest.mark.timed
def test_a_first_glimpse_has_no_rate(agent: RunningAgent) -> None:
    """The first rows come after some 10 ms, which is too short for calls a second."""
    with Puppet() as puppet:
        puppet.begin(ENDLESS)
        done = run(
            *("tap", "--agent", agent.address, "--syscall-stats", "--include", "getppid"),
            *(f"pid:{puppet.pid}", "-d", "2500ms"),
        )
    blocks = [block.splitlines() for block in done.stdout.strip().split("\n\n")]
    first, second, *_ = (table_rows(block[1:])["getppid"] for block in blocks)
    assert first[1] == "-"
    assert 0 < number(second[1]) < 1100  # one a millisecond, at most


def test_single_calls_and_their_totals_name_their_errors(agent: RunningAgent) -> None:
    code = (
        "r, w = os.pipe(); os.set_blocking(r, False)\n"
        "for path in '/no/such', '/proc/self/mem/x':\n"
        " try: os.open(path, 0)\n"
        " except OSError: pass\n"
        "try: os.read(r, 1)\n"
        "except OSError: pass"
    )
    with Puppet() as puppet:
        running = tap(agent, f"pid:{puppet.pid}", "--events", "--include", "openat,read")
        puppet.do(f"exec({code!r})")
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=60)
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for outcome in ("openat = ENOENT", "openat = ENOTDIR", "read = EAGAIN"):
        assert sum(f" {outcome} " in line for line in lines) == 1
    _, rows = totals_of(out)
    assert rows["openat"][2] == "2"
    assert set(rows["openat"][3].split(", ")) == {f"ENOENT {times(1)}", f"ENOTDIR {times(1)}"}
    assert rows["read"][2:4] == ["1", "EAGAIN"]


def test_what_top_leaves_out_is_the_last_row(agent: RunningAgent) -> None:
    with Puppet() as puppet:
        running = tap(agent, f"pid:{puppet.pid}", "-c", "top=2")
        puppet.do("for _ in range(100): os.getppid(); os.getpid(); os.stat('/'); os.getcwd()")
        running.send_signal(signal.SIGINT)
        out, _ = running.communicate(timeout=60)
    *intervals, totals = [block.splitlines()[1:] for block in out.strip().split("\n\n")]
    left_out = 0
    for lines in intervals:
        names = list(table_rows(lines))
        assert len(names) <= 3
        assert "other" not in names[:-1]
        left_out += number(table_rows(lines).get("other", ["0"])[0])
    rows = table_rows(totals)
    assert list(rows)[-1] == "other"
    assert number(rows["other"][0]) == left_out > 100


def test_a_preempted_tap_fails_and_says_what_would_help(tmp_path: Path) -> None:
    limits = {"limits": {"cpu_percent": 0.01}}
    with running_agent(tmp_path / "agent", limits) as strict, Puppet() as puppet:
        puppet.begin(ENDLESS)
        running = tap(strict, f"pid:{puppet.pid}", "--events")
        out, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert re.search(r"^totals of [\d.]+s, preempted$", out, re.MULTILINE)
    assert err.count("limits.cpu_percent is 0.01") == 1
    assert err.startswith("coral: the agent ended this tap before its time: limits.cpu_percent is ")
    assert "without --events" in err
    assert err.endswith("or raise limits.cpu_percent in the agent's configuration\n")


def test_an_agent_that_dies_leaves_the_totals_and_is_an_error(tmp_path: Path) -> None:
    with running_agent(tmp_path / "agent") as mortal, Puppet() as puppet:
        running = tap(mortal, f"pid:{puppet.pid}", "--include", "getppid")
        puppet.getppid(123)
        assert running.stdout
        shown = ""
        while "getppid" not in shown:
            shown = running.stdout.readline()
        mortal.process.kill()
        out, err = running.communicate(timeout=60)
    assert running.returncode == 1
    assert re.search(rf"^totals of [\d.]+s, {INCOMPLETE}$", out, re.MULTILINE)
    why = f"gave up after trying to reconnect for 5 s: no agent answers at {mortal.address} "
    assert err.startswith(f"coral: {why}")
    _, rows = totals_of(out)
    assert rows["getppid"][0] == "123"


def test_totals_after_a_lost_connection_are_over_the_time_that_is_known(tmp_path: Path) -> None:
    with running_agent(tmp_path / "agent") as mortal, Puppet() as puppet:
        began = time.monotonic()
        running = tap(mortal, f"pid:{puppet.pid}", "--include", "getppid")
        puppet.getppid(1_000)
        assert running.stdout
        shown = ""
        while "getppid" not in shown:
            shown = running.stdout.readline()
        running.send_signal(signal.SIGSTOP)
        mortal.process.kill()
        mortal.process.wait()
        known_s = time.monotonic() - began
        time.sleep(3)  # the time that must not count
        running.send_signal(signal.SIGCONT)
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    heading = re.search(rf"^totals of ([\d.]+)s, {INCOMPLETE}$", out, re.MULTILINE)
    assert heading
    assert float(heading[1]) <= known_s + 0.05  # it is rounded


@pytest.mark.timeout(60)
@pytest.mark.parametrize("output", ["table", "json"])
def test_a_tap_that_the_agents_end_cuts_short_is_an_error(tmp_path: Path, output: str) -> None:
    with running_agent(tmp_path / "agent") as mortal, Puppet() as puppet:
        running = tap(mortal, f"pid:{puppet.pid}", "-d", "60s", "-o", output)
        assert mortal.stop() == 0
        out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (1, "")
    if output == "table":
        assert re.search(r"^totals of [\d.]+s, agent shutdown$", out, re.MULTILINE)
    else:
        end = {"end": "agent_shutdown", "detail": "the agent is shutting down"}
        assert json.loads(out.splitlines()[-1]) == end


@pytest.mark.timed
def test_a_frozen_agent_is_said_to_be_one_within_seconds(tmp_path: Path) -> None:
    with running_agent(tmp_path / "agent") as agent:
        agent.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            done = run("collectors", "--agent", agent.address)
        finally:
            agent.process.send_signal(signal.SIGCONT)
        took_s = time.monotonic() - began
    silent = "accepts the connection and does not answer (waited 5 s)"
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"coral: the agent at {agent.address} {silent}\n"
    assert took_s < 15


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_on_a_terminal_no_line_is_longer_than_that(columns: int, agent: RunningAgent) -> None:
    with Puppet() as puppet:
        puppet.begin(ENDLESS)
        command = tap_arguments(agent, f"pid:{puppet.pid}", "-d", "50s")
        with Terminal(command, 24, columns) as terminal:
            wait_until(lambda: terminal.has_drawn("Ctrl-C stops", "SYSCALL", "getppid"))
            terminal.press("\x03")
            assert terminal.finish() == 130
        with Terminal([*command, "--events"], 24, columns) as events:
            wait_until(lambda: events.has_drawn(" getppid "))
            events.press("\x03")
            assert events.finish() == 130
    for text in (terminal.text, events.text):
        lines = text.replace("\r", "\n").split("\n")
        assert max(map(len, lines)) <= columns
    header = terminal.text[terminal.text.index("SYSCALL") :].splitlines()[0].split()
    assert {"SYSCALL", "CALLS", "ERRORS", "P99", "TIME"} <= set(header)
    assert ("CALLS/S" in header) is (columns >= 80)


def test_a_reader_that_closes_the_pipe_leaves_no_collector(agent: RunningAgent) -> None:
    with Puppet() as puppet:
        running = tap(agent, f"pid:{puppet.pid}", "-o", "json")
        assert running.stdout
        assert running.stderr
        puppet.getppid(1)
        assert json.loads(running.stdout.readline())["collector"] == "syscall_stats"
        running.stdout.close()
        # Rows are as many as it takes to see that nobody reads them.
        while running.poll() is None:
            puppet.getppid(1)
        assert running.returncode == 128 + signal.SIGPIPE
        assert collectors_at_work(agent) == {}
        assert running.stderr.read() == ""
        running.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--syscall-stats",), "name one thing to watch"),
        (("--syscall-stats", ""), "name one thing to watch"),
        (("--syscall-stats", "pid:1", "-c", "pid=2"), "give only one of pid:1 and -c pid=2"),
        (("--syscall-stats", "--host", "pid:1"), "give only one of pid:1 and --host"),
        (("--syscall-stats", "pid:1", "--", "true"),
         "give only one of pid:1 and the command after --"),
        (("--syscall-stats", "pid:"), "pid:: give a process id, such as pid:1234"),
        (("--syscall-stats", "comm:"), "comm:: give the name of a command"),
        (("pid:1",), "name what to collect: --syscall-stats"),
        (("pid:1", "--syscall-stats", "--tcp-metrics"),
         "give only one of --syscall-stats and --tcp-metrics"),
        (("pid:1", "--syscall-stats", "--resolve"), "--resolve goes with --tcp-metrics"),
        (("--syscall-stats", "pid:1", "-d", "soon"), "'soon' is not a duration; give 500ms, 30s"),
        (("--syscall-stats", "pid:1", "-c", "top"), "-c top: KEY=VALUE is expected"),
        (("--syscall-stats", "pid:1", "-o", "xml"), "-o xml: give table, json or yaml"),
        (("--syscall-stats", "pid:1", "--fast"), "No such option"),
    ],
)  # fmt: skip
def test_a_usage_error_exits_with_2_and_says_what_is_expected(
    arguments: tuple[str, ...], text: str, agent: RunningAgent
) -> None:
    done = run("tap", "--agent", agent.address, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: ")
    assert text in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("pid:4194303",), "pid:4194303: there is no such process\n"),
        (("pid:1,4194303",), "pid:1,4194303: there is no process 4194303\n"),
        (("shop", "-c", "pid=4194303"), "-c pid=4194303: there is no such process\n"),
        (("pid:abc",), "pid:abc: give process ids, such as 1234 or 1234,5678\n"),
        (("pid:1", "--include", "nosuch"), "--include nosuch: give names of system calls, "),
        (("pid:1", "-i", "5h"), "--interval 5h: give a duration from 100ms to 1m\n"),
        (("pid:1", "-c", "top=x"), "-c top=x: give a whole number from 0 to 10240\n"),
        (("pid:1", "-c", "tpo=3"), '-c tpo=3: there is no such option (did you mean "top"?)'),
        (("pid:1", "-d", "2h"), "--duration 2h: give more than 0s and at most 5m, "),
        (("cgroup:/no/such",), "cgroup:/no/such: give the path of a cgroup below"),
    ],
)
def test_a_value_that_the_agent_refuses_is_one_line_and_exit_status_2(
    arguments: tuple[str, ...], text: str, agent: RunningAgent
) -> None:
    done = run("tap", "--agent", agent.address, "--syscall-stats", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"coral: {text}")
    assert done.stderr.count("\n") == 1
    assert not re.search(r"config\[|EBPF_|is not accepted", done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("tap", "--syscall-stats", "pid:1"),
        ("tap", "--syscall-stats", "--", "touch", "made"),
        ("capabilities",),
        ("collectors",),
        ("stop", "some-id"),
    ],
)
def test_an_agent_that_is_not_there_is_one_line_and_exit_status_1(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/nobody.sock"
    done = subprocess.run(
        coral(*arguments),
        check=False,
        env={**os.environ, "CORAL_AGENT": address},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"coral: no agent answers at {address} (no such file or directory): start one with "
        "`coral agent`, or name its address with --agent or CORAL_AGENT\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_shows_a_live_table_and_ctrl_c_leaves_the_totals(agent: RunningAgent) -> None:
    with Puppet() as puppet:
        puppet.begin(ENDLESS)
        with Terminal(tap_arguments(agent, f"pid:{puppet.pid}", "-d", "50s")) as terminal:
            wait_until(lambda: terminal.has_drawn("s left, Ctrl-C stops", "SYSCALL", "getppid"))
            shown = terminal.text
            assert re.search(rf"pid:{puppet.pid} +━+ +(50|4\d)s left, Ctrl-C stops", shown)
            assert re.search(r"clock_nanosleep +[\d,]+ +([\d,]+ +)?0 .*\d% +█+", shown)
            assert re.search(r"getppid +[\d,]+ +([\d,]+ +)?0 ", shown)
            assert "totals" not in shown
            terminal.press("\x03")
            assert terminal.finish() == 130
            assert collectors_at_work(agent) == {}
    totals = terminal.text[terminal.text.index("totals of ") :]
    heading, header, *rows = totals.splitlines()
    assert heading.endswith(", stopped")
    assert header.split()[:4] == ["SYSCALL", "CALLS", "CALLS/S", "ERRORS"]
    assert any(re.match(r"getppid +[\d,]+ ", row) for row in rows)
    assert terminal.output.rindex("\x1b[?25h") > terminal.output.rindex("\x1b[?25l")


def test_ctrl_c_on_a_terminal_reaches_the_command_too(agent: RunningAgent) -> None:
    script = f"import os, time\n{ENDLESS}"
    command = tap_arguments(agent, "--", sys.executable, "-I", "-S", "-c", script)
    with Terminal(command) as terminal:
        wait_until(lambda: terminal.has_drawn("Ctrl-C stops", "getppid"))
        (child,) = psutil.Process(terminal.process.pid).children()
        terminal.press("\x03")
        assert terminal.finish() == 130
        # Its parent has gone too: nobody may have reaped it yet.
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert "totals of " in terminal.text


def data_of(output: str, *arguments: object) -> Any:
    """What a command gives in that format."""
    done = run(*arguments, "-o", output)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout) if output == "json" else yaml.safe_load(done.stdout)


def test_capabilities_say_what_can_run_here(agent: RunningAgent) -> None:
    command = ("capabilities", "--agent", agent.address)
    told = data_of("json", *command)
    assert data_of("yaml", *command) == told
    assert told["supported"] is True
    assert told["kernel_version"] == os.uname().release
    names = ("SYSCALL_STATS", "TCP_METRICS", "HTTP_LATENCY", "CPU_PROFILE")
    kinds = [f"EBPF_COLLECTOR_KIND_{name}" for name in names]
    assert told["available_collectors"] == kinds
    assert [collector["kind"] for collector in told["collectors"]] == kinds
    for collector in told["collectors"]:
        assert (collector["supported"], collector["hook"]) == (True, "tp_btf")
        assert {"pid", "comm", "cgroup", "scope", "interval"} < {
            o["name"] for o in collector["options"]
        }
    table = run(*command)
    assert table.returncode == 0
    assert f"kernel {os.uname().release}" in table.stdout
    assert re.search(r"^syscall_stats +yes +core, tp_btf, ", table.stdout, re.MULTILINE)
    assert re.search(r"^ring_buffer +yes|^task_storage +yes", table.stdout, re.MULTILINE)
    assert "options of " not in table.stdout[: table.stdout.rindex("`coral capabilities")]
    assert "`coral capabilities --options`" in table.stdout.splitlines()[-1]


def test_collectors_are_listed_and_stopped_by_their_ids(agent: RunningAgent) -> None:
    command = ("collectors", "--agent", agent.address)
    assert run(*command).stdout == "no collector is running\n"
    assert data_of("json", *command) == data_of("yaml", *command) == {}
    with Puppet() as puppet:
        collector_id = start_collector(agent, pid=str(puppet.pid)).collector_id
        told = data_of("json", *command)
        assert data_of("yaml", *command) == told
        assert [c["collector_id"] for c in told["collectors"]] == [collector_id]
        assert told["collectors"][0]["config"] == {"pid": str(puppet.pid)}
        # Whole, to be copied, however narrow the table is.
        assert re.search(rf"^{collector_id} ", run(*command).stdout, re.MULTILINE)
        stopped = run("stop", "--agent", agent.address, collector_id)
        assert (stopped.returncode, stopped.stdout) == (0, f"{collector_id} has ended\n")
        again = run("stop", "--agent", agent.address, collector_id)
        assert (again.returncode, again.stdout) == (1, "")
        assert again.stderr == f"coral: {collector_id} has ended: STOPPED\n"


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_collectors_of_any_name_are_listed_within_the_terminal(
    columns: int, agent: RunningAgent
) -> None:
    """What others call their services is no markup; test_hostile_names.py has other orders."""
    with Puppet() as puppet:
        name = "[/x] [bold]y"
        started = start_collector(agent, 290, name, pid=str(puppet.pid))
        shown = run("collectors", "--agent", agent.address, COLUMNS=str(columns))
        whole = run("collectors", "--agent", agent.address)
        run("stop", "--agent", agent.address, started.collector_id)
    for done in (shown, whole):
        assert (done.returncode, done.stderr) == (0, "")
        assert started.collector_id in done.stdout
        assert name in done.stdout
        assert "\x1b" not in done.stdout
    assert max(map(len, shown.stdout.splitlines())) <= columns
    assert re.search(r" 4m[345]\ds\b", shown.stdout)
    assert len(whole.stdout.splitlines()) == 2


def test_a_continuous_collector_is_listed_without_an_end(tmp_path: Path) -> None:
    with Puppet() as puppet:
        config = {
            "continuous": [
                {"kind": "syscall_stats", "service": "shop", "config": {"pid": str(puppet.pid)}}
            ]
        }
        with running_agent(tmp_path / "agent", config) as always:
            wait_until(lambda: collectors_at_work(always))
            header, row = run("collectors", "--agent", always.address).stdout.splitlines()
    shown = dict(zip(re.split(" {2,}", header), re.split(" {2,}", row), strict=True))
    assert (shown["SERVICE"], shown["ENDS IN"]) == ("shop", "never")


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_capabilities_are_within_the_terminal_and_wrapped_between_words(
    columns: int, agent: RunningAgent
) -> None:
    told = data_of("json", "capabilities", "--agent", agent.address)
    done = run("capabilities", "--options", "--agent", agent.address, COLUMNS=str(columns))
    assert "\n\nCOLLECTOR " in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= columns
    words = set(done.stdout.split())
    for collector in told["collectors"]:
        for option in collector["options"]:
            assert set(option["description"].split()[:-1]) <= words
            assert option["name"] in words


@pytest.mark.timeout(150)
def test_the_demo_shows_requests_and_system_calls_and_leaves_nothing_behind(tmp_path: Path) -> None:
    demo = subprocess.Popen(
        coral("demo", "-d", "2s"),
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = demo.communicate(timeout=100)
    assert (demo.returncode, err) == (0, "")
    out, asked = out.split("# a node: north")
    _, http, calls = out.split("# coral tap shop ")
    assert re.search(r"^← POST /orders/\{id\} +\d+ ", http, re.MULTILINE)
    assert re.search(rf"^← GET /missing.html +(\d+) .* 0  404 {times(1)[0]}\d", http, re.MULTILINE)
    heading, *lines = calls[calls.index("totals of ") :].splitlines()
    assert heading.endswith(", expired")
    assert number(table_rows(lines)["sendto"][0]) > 50
    for name in ("coral_syscall_calls_total", "http_server_request_duration_seconds_count"):
        assert re.search(rf'^{name}\{{.*service="shop".*\}} \d', out, re.MULTILINE)
    nodes = re.findall(r"^(north|south) +POST /orders/\{id\} +\d+ ", asked, re.MULTILINE)
    assert sorted(nodes) == ["north", "south"]
    (rows,) = re.findall(r"^agent .*\n((?:(?:north|south) +\d+ +\d+\n)+)", asked, re.MULTILINE)
    assert len(rows.splitlines()) == 2
    assert [p.pid for p in psutil.process_iter() if session_of(p.pid) == demo.pid] == []
    assert list(tmp_path.iterdir()) == []


def session_of(pid: int) -> int:
    """The session of a process; 0 where it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0
