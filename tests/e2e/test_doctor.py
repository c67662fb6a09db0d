"""`coral doctor` and `coral capabilities`: what can be done here, what cannot, and why."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from coral.bpf.loading.object_file import object_path
from tests.support import Puppet, RunningAgent, coral, running_agent, start_collector, wait_until

COLUMNS: Final = 80
MODES: Final = ("summaries", "events")
COLLECTORS: Final = {
    "syscall_stats": "1,000 of 1,000 calls of getppid",
    "tcp_metrics": "200 of 200 ends of connections",
    "http_latency": "200 of 200 requests",
}

pytestmark = pytest.mark.usefixtures("nothing_left")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A `coral` command, to its end, as wide as a narrow terminal."""
    return subprocess.run(
        coral(*arguments),
        check=False,
        env={**os.environ, "COLUMNS": str(COLUMNS), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def examined(*arguments: object, **environment: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """`coral doctor --json`: its exit status, and by check how it came out and what was found."""
    done = run("doctor", "--json", *arguments, **environment)
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["healthy"] is (done.returncode == 0)
    return done.returncode, {c["check"]: (c["status"], c["found"]) for c in told["checks"]}


def without(*features: str) -> Mapping[str, str]:
    """An environment that switches FEATURES off, and those that are off already."""
    off = [*features, *filter(None, os.environ.get("CORAL_WITHOUT", "").split(","))]
    return {"CORAL_WITHOUT": ",".join(off)}


def as_prose(text: str) -> str:
    """TEXT without the line breaks and columns of a table."""
    return " ".join(text.split())


def test_a_healthy_machine_has_a_line_for_each_check_and_status_0() -> None:
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    *lines, summary = done.stdout.splitlines()
    checks = dict(re.split("  +", line, maxsplit=2)[1:] for line in lines)
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    assert {
        *("agent", "kernel", "libbpf", "BTF", "loaders", "capabilities", "locked memory"),
        *("cgroup2", "agent stops", *COLLECTORS),
    } <= checks.keys()
    for name, mode in product(COLLECTORS, MODES):
        assert checks[f"{name}, {mode}"].startswith(f"{COLLECTORS[name]}, the first after ")
    assert re.match(r"\d{3,} of at least 200 samples, the first ", checks["cpu_profile, summaries"])
    assert checks["left behind"] == "no collector, no program, no map"
    assert summary.startswith("all works")


def test_on_a_terminal_no_line_is_longer_than_that() -> None:
    done = run("doctor", FORCE_COLOR="1", **without("tp_btf"))
    assert done.returncode == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert max(map(len, plain.splitlines())) <= COLUMNS
    assert "in place of tp_btf: switched off by CORAL_WITHOUT" in as_prose(plain)


@pytest.mark.parametrize(
    ("step", "features", "better"),
    [
        ("record buffer", ("ring_buffer",), "ring_buffer"),
        ("hook", ("tp_btf",), "tp_btf"),
        ("thread state", ("task_storage",), "task_storage"),
        ("map reads", ("batch",), "batch"),
    ],
)
def test_a_lower_rung_works_too_and_says_why_it_is_not_the_best(
    step: str, features: Sequence[str], better: str
) -> None:
    returncode, checks = examined(**without(*features))
    assert returncode == 0
    how, found = checks[f"syscall_stats: {step}"]
    assert how == "warn"
    assert f"{better}: switched off by CORAL_WITHOUT" in found
    able = set(COLLECTORS)
    if better == "ring_buffer":
        able.remove("http_latency")
        assert checks["http_latency"][1].startswith("cannot run here: no ring buffer, ")
    for name, mode in product(able, MODES):
        how, found = checks[f"{name}, {mode}"]
        assert how == "ok"
        assert found.startswith(f"{COLLECTORS[name]}, the first after ")


def test_an_option_that_cannot_be_had_is_told_and_its_mode_is_not_tried() -> None:
    returncode, checks = examined(**without("ring_buffer", "perf_buffer"))
    assert returncode == 0
    how, found = checks["syscall_stats: mode"]
    assert how == "warn"
    assert found.startswith("give `summaries`: there is no buffer for events (ring_buffer: ")
    assert "syscall_stats, summaries" in checks
    assert "syscall_stats, events" not in checks
    # The other one takes a buffer for its figures too.
    how, found = checks["tcp_metrics"]
    assert how == "warn"
    assert found.startswith("cannot run here: no buffer (ring_buffer: ")


def test_a_machine_on_which_no_collector_can_run_is_a_failure_with_each_reason() -> None:
    returncode, checks = examined(**without("tp_btf", "raw_tp"))
    assert returncode == 1
    how, found = checks["syscall_stats"]
    assert how == "warn"
    assert re.match(r"cannot run here: no hook \(tp_btf: .*; raw_tp: .*\)", found)
    assert checks["collectors"] == ("fail", "none can run here")
    assert checks["agent stops"][0] == "ok"


def test_a_loader_that_is_forced_and_cannot_be_used_is_told_with_the_way_out() -> None:
    returncode, checks = examined(CORAL__LOADER="bcc", **without("bcc"))
    assert returncode == 1
    assert checks["syscall_stats"][1] == (
        "cannot run here: no loader (bcc: switched off by CORAL_WITHOUT; `loader: auto` chooses "
        "core here)"
    )


def test_programs_that_are_not_there_are_a_failure_that_says_what_to_do(tmp_path: Path) -> None:
    returncode, checks = examined(CORAL_BPF_OBJECTS=str(tmp_path))
    assert returncode == 1
    how, found = checks["eBPF"]
    assert how == "fail"
    assert found == (
        f"{tmp_path}/features.bpf.o is missing: let CORAL_BPF_OBJECTS name a directory of built "
        "programs"
    )


def test_a_collector_whose_programs_are_not_there_fails_by_itself(tmp_path: Path) -> None:
    for path in map(object_path, ("features", "processes")):
        (tmp_path / path.name).symlink_to(path)
    returncode, checks = examined(CORAL_BPF_OBJECTS=str(tmp_path))
    assert returncode == 1
    for mode in MODES:
        how, found = checks[f"syscall_stats, {mode}"]
        assert how == "fail"
        assert f"{tmp_path}/syscall_stats.bpf.o is missing: let CORAL_BPF_OBJECTS name" in found
    assert checks["left behind"][0] == "ok"


def test_an_agent_that_does_not_start_is_a_failure_with_its_own_words() -> None:
    returncode, checks = examined(CORAL__LIMITS__CONCURRENT_COLLECTORS="none")
    assert returncode == 1
    (how, found) = checks["agent"]
    assert how == "fail"
    assert found.startswith("it does not start: coral agent: CORAL__LIMITS__CONCURRENT_COLLECTORS:")


def test_an_agent_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/nobody.sock"
    done = run("doctor", "--agent", address)
    assert (done.returncode, done.stderr) == (1, "")
    line, summary = done.stdout.splitlines()
    why = rf"no agent answers at {address} \(no such file or directory\): start one with "
    assert re.match(f"FAIL +agent +{why}", line)
    assert summary == "1 of 1 checks failed"


def test_a_running_agent_is_examined_without_touching_what_others_watch(
    agent: RunningAgent,
) -> None:
    with Puppet() as puppet:
        theirs = start_collector(agent, pid=str(puppet.pid)).collector_id
        returncode, checks = examined("--agent", agent.address)
        assert returncode == 0
        assert checks["left behind"] == (
            "ok",
            "not checked: other users' collectors are running",
        )
        assert "agent stops" not in checks
        stopped = run("stop", "--agent", agent.address, theirs)
        assert stopped.returncode == 0
    _, checks = examined("--agent", agent.address)
    assert checks["left behind"] == ("ok", "no collector, no program, no map")
    assert agent.stop() == 0


def test_what_an_agent_does_not_allow_is_no_failure_of_the_machine(tmp_path: Path) -> None:
    config = {"policy": {"collectors": ["cpu_profile"]}}
    with running_agent(tmp_path / "agent", config) as agent:
        returncode, checks = examined("--agent", agent.address)
    assert returncode == 0
    how, found = checks["syscall_stats, summaries"]
    assert how == "warn"
    assert found == "syscall_stats: this agent's policy.collectors allows only cpu_profile"


def test_a_wrong_token_is_said_to_be_wrong(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("the-right-token-of-it")
    with running_agent(tmp_path / "agent", {"auth": {"token_file": str(token)}}) as agent:
        wrong = examined("--agent", agent.address, CORAL_TOKEN="left")
        none = examined("--agent", agent.address, CORAL_TOKEN="")
    assert wrong == (1, {"agent": ("fail", "the token in CORAL_TOKEN is wrong")})
    assert none == (1, {"agent": ("fail", "a token is needed: set CORAL_TOKEN")})


def test_a_doctor_that_is_ended_takes_its_agent_with_it(tmp_path: Path) -> None:
    doctor = subprocess.Popen(
        coral("doctor"),
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert doctor.stdout
    assert doctor.stdout.readline().startswith("ok    agent ")
    started = psutil.Process(doctor.pid).children(recursive=True)
    assert started
    doctor.terminate()
    doctor.communicate(timeout=60)
    assert doctor.returncode == 143
    wait_until(lambda: not any(process.is_running() for process in started))
    assert list(tmp_path.iterdir()) == []


def test_capabilities_name_the_rung_and_why_it_is_not_a_better_one(tmp_path: Path) -> None:
    switched_off = without("tp_btf", "ring_buffer", "perf_buffer")
    with running_agent(tmp_path / "agent", environment=switched_off) as agent:
        table = run("capabilities", "--agent", agent.address)
        told = run("capabilities", "--agent", agent.address, "--json")
    assert (table.returncode, told.returncode) == (0, 0)
    lines = table.stdout.splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert any(re.match(r"syscall_stats +yes +core, raw_tp, ", line) for line in lines)
    reason = "switched off by CORAL_WITHOUT"
    prose = as_prose(table.stdout)
    assert f"syscall_stats hook raw_tp in place of tp_btf: {reason}" in prose
    assert f"syscall_stats record buffer none: ring_buffer: {reason}; perf_buffer: " in prose
    assert "syscall_stats mode give `summaries`: there is no buffer for events" in prose
    assert "syscall_stats map reads" not in prose
    assert re.search(rf"ring_buffer +no +{reason}", table.stdout)

    collectors = {it["kind"]: it for it in json.loads(told.stdout)["collectors"]}
    tcp = collectors["EBPF_COLLECTOR_KIND_TCP_METRICS"]
    assert not tcp["supported"]
    assert tcp["reason"].startswith(f"no buffer (ring_buffer: {reason}; perf_buffer: ")
    collector = collectors["EBPF_COLLECTOR_KIND_SYSCALL_STATS"]
    steps: dict[str, Any] = {step["what"]: step for step in collector["steps"]}
    assert list(steps) == ["loader", "hook", "thread state", "record buffer", "map reads"]
    assert steps["loader"] == {"what": "loader", "taken": "core", "refused": []}
    assert steps["hook"] == {
        "what": "hook",
        "taken": "raw_tp",
        "refused": [{"name": "tp_btf", "available": False, "reason": reason}],
    }
    assert steps["record buffer"]["taken"] == ""
    assert [it["name"] for it in steps["record buffer"]["refused"]] == [
        "ring_buffer",
        "perf_buffer",
    ]
    refused = {option["name"]: option["refused"] for option in collector["options"]}
    assert refused["mode"].startswith("`summaries`: there is no buffer for events")
    assert refused["pid"] == ""


def test_a_start_with_a_forced_loader_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    arguments = ("--loader", "bcc")
    with running_agent(tmp_path / "agent", None, *arguments, environment=without("bcc")) as agent:
        tap = run("tap", "--agent", agent.address, "--syscall-stats", f"pid:{os.getpid()}")
    assert (tap.returncode, tap.stdout) == (1, "")
    assert tap.stderr == (
        "coral: this cannot run here: syscall_stats: no loader (bcc: switched off by "
        "CORAL_WITHOUT; `loader: auto` chooses core here)\n"
    )
