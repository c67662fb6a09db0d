"""Processes with names that give a terminal, a log or a scraper orders: no command obeys them."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coral.wire.text import safe
from tests.e2e.test_health import page
from tests.e2e.test_refusals import start, start_request, stop
from tests.support import RunningAgent, coral, running_agent, scrape, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")

NAMES: Final = {
    "escape": b"a\x1b[31mred",
    "markup": b"[/x]",
    "style": b"[bold]",
    "newline": b"a\nb 1\n",
    "not UTF-8": b"\xff\xfea",
    "bidi": "a\u202eb".encode(),
    "C1": b"a\xc2\x9b31mb",
    "return": b"a\r\x08\x07",
    "label": b'a"} 1\n#',
}
# What this project's own output has on a terminal: colours, and rich's moves of the cursor.
_OWN_STYLE: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BIDI: Final = re.compile("[\u200b-\u200f\u202a-\u202e\u2066-\u2069]")
# Names itself, then calls getppid a few hundred times a second, on a connection to itself.
NAMED: Final = """
import ctypes, os, socket, sys, time
name = bytes.fromhex(sys.argv[1])
ctypes.CDLL(None).prctl(15, name, 0, 0, 0)
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
print(flush=True)
while True:
    os.getppid(); client.send(b"x"); server.recv(1); time.sleep(0.005)
"""


@contextmanager
def named(name: bytes) -> Iterator[int]:
    """A process of that command name."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", NAMED, name.hex()], stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            assert Path(f"/proc/{process.pid}/comm").read_bytes() == name[:15] + b"\n"
            yield process.pid
        finally:
            process.kill()


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    config = {"limits": {"cpu_percent": 1000, "concurrent_collectors": 20}}
    with running_agent(tmp_path_factory.mktemp("names") / "agent", config) as running:
        yield running


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@contextmanager
def agent_that_logs_for_people(directory: Path) -> Iterator[RunningAgent]:
    log_path, address = directory / "agent.log", f"unix:{directory}/agent.sock"
    with (
        log_path.open("wb") as log,
        subprocess.Popen(
            coral("agent", "--listen", address, "--metrics", "", "--log-format", "console"),
            stderr=log,
        ) as process,
    ):
        running = RunningAgent(process, address, "", log_path)
        try:
            wait_until(lambda: "listening" in log_path.read_text())
            yield running
        finally:
            running.stop()


def is_clean(output: str) -> bool:
    """Whether OUTPUT has no control characters but line breaks, and no marks of direction."""
    return not _BIDI.search(output) and all(
        char == "\n" or char.isprintable() or char == "\t" for char in output
    )


def on_terminal(arguments: list[str], **environment: str) -> str:
    """What a command writes to a terminal of 120 columns, without this project's own style."""
    ours, theirs = pty.openpty()
    chunks: list[bytes] = []

    def read() -> None:
        with suppress(OSError):  # the command has ended
            while chunk := os.read(ours, 65536):
                chunks.append(chunk)

    reader = Thread(target=read)
    process = subprocess.Popen(
        arguments, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "120", **environment}
    )
    os.close(theirs)
    reader.start()
    process.wait(60)
    reader.join()
    os.close(ours)
    text = b"".join(chunks).decode(errors="surrogateescape")
    return _OWN_STYLE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")


def in_pipe(arguments: list[str]) -> str:
    """What a command writes to a pipe."""
    done = subprocess.run(arguments, capture_output=True, check=False, timeout=60)
    assert b"Traceback" not in done.stderr
    return (done.stdout + done.stderr).decode(errors="surrogateescape")


@pytest.mark.parametrize("kind", ["syscall-stats", "tcp-metrics", "http-latency"])
def test_no_command_passes_a_name_of_a_process_on(
    kind: str, agent: RunningAgent, stack: ExitStack
) -> None:
    at = ("--agent", agent.address)
    pids = [stack.enter_context(named(name)) for name in NAMES.values()]
    tap = ["tap", "--" + kind, "-d", "500ms", "-i", "100ms", f"pid:{','.join(map(str, pids))}", *at]
    listed = ["collectors", *at]
    with ExitStack() as started:
        for pid in pids[:2]:  # a session without a service has the name of its process
            collector_id = start(agent, {"pid": pid})
            started.callback(stop, agent, collector_id)
        piped = [listed, [*listed, "--json"], [*listed, "-o", "yaml"], tap, [*tap, "--events"]]
        piped += [[*tap, "--json"], [*tap, "-o", "yaml"]]
        drawn = [listed, tap, [*tap, "--events"]]
        with ThreadPoolExecutor(4) as pool:  # most of them wait
            in_pipes = pool.map(in_pipe, (coral(*command) for command in piped))
            on_terminals = pool.map(on_terminal, (coral(*command) for command in drawn))
            shown = [*zip(piped, in_pipes, strict=True), *zip(drawn, on_terminals, strict=True)]
        for command, text in shown:
            assert is_clean(text), (command, text)
            assert "Traceback" not in text
            assert "limits." not in text
    assert is_clean(agent.log_path.read_text())


def test_no_metric_passes_a_name_of_a_process_on(agent: RunningAgent, stack: ExitStack) -> None:
    labels = {f'service="{label_of(name)}"' for name in NAMES.values()}
    pids = [stack.enter_context(named(name)) for name in NAMES.values()]
    with ThreadPoolExecutor(len(pids)) as pool:  # most of a start is the kernel's waiting
        started = pool.map(lambda pid: start(agent, {"pid": pid, "interval": "100ms"}), pids)
        collectors = list(started)
        wait_until(
            lambda: labels <= set(re.findall(r'service="(?:[^"\\]|\\.)*"', scrape(agent))), 30
        )
        list(pool.map(lambda collector_id: stop(agent, collector_id), collectors))
    text = scrape(agent)
    assert is_clean(text)
    assert len(list(text_string_to_metric_families(text))) > 10


def test_readiness_passes_no_name_of_a_process_on(tmp_path: Path, stack: ExitStack) -> None:
    """Where a configured service has no process, the log alone names the nearest."""
    rules = [{"kind": "syscall_stats", "service": service} for service in ("a[31mred", "ab 1x")]
    for name in NAMES.values():
        stack.enter_context(named(name))
    with running_agent(tmp_path / "agent", {"continuous": rules}) as agent:
        wait_until(lambda: page(agent, "/readyz")[1].count("no process belongs") == len(rules))
        status, text = page(agent, "/readyz")
        wait_until(lambda: "a?[31mred" in "".join(str(it.get("reason")) for it in agent.log()))
    assert status == 503
    assert "a?" not in text
    assert is_clean(text)
    assert text.count("\n") == len(rules)


def label_of(name: bytes) -> str:
    """The label of a service of that name, as the format of Prometheus escapes it."""
    shown = safe(name[:15].decode(errors="replace"))
    return shown.replace("\\", "\\\\").replace('"', '\\"')


@pytest.mark.parametrize("name", ["[/x]", "[bold]x", "a\u202eb", "\x1b[31m", "a\nb"])
def test_no_name_that_a_caller_gives_is_passed_on(name: str, agent: RunningAgent) -> None:
    at = ("--agent", agent.address)
    request = start_request({"pid": os.getpid()}, service_name=name)
    if name.startswith("["):  # a good name, which rich would take for markup
        collector_id = agent.call("StartCollector", request).collector_id
        assert name in in_pipe(coral("collectors", *at))
        assert name in on_terminal(coral("collectors", *at))
        stop(agent, collector_id)
    for command in (["tap", name, "--syscall-stats", *at], ["stop", name, *at]):
        for shown in (in_pipe(coral(*command)), on_terminal(coral(*command))):
            assert is_clean(shown), (command, shown)
            assert "Traceback" not in shown
    assert is_clean(agent.log_path.read_text())


def test_the_log_for_people_passes_no_name_on(tmp_path: Path) -> None:
    with agent_that_logs_for_people(tmp_path) as agent:
        for name in NAMES.values():
            with named(name) as pid:
                stop(agent, start(agent, {"pid": pid}))
        wait_until(lambda: agent.log_path.read_text().count("session ended") == len(NAMES))
        log = agent.log_path.read_text()
    assert "a?[31mred" in log
    assert is_clean(log)


@pytest.mark.parametrize("output", ["json", "yaml"])
def test_data_keeps_a_name_in_escapes(output: str, agent: RunningAgent) -> None:
    """What a program reads is whole: the escapes of JSON and YAML say which characters it was."""
    with named(NAMES["bidi"]) as pid:
        piped = in_pipe(
            coral(
                *("tap", f"pid:{pid}", "--syscall-stats", "--events", "-d", "1s"),
                *("-o", output, "--agent", agent.address),
            )
        )
    assert is_clean(piped)
    assert "a\\u202eb" in piped.lower()


def test_every_command_is_covered() -> None:
    """A new command comes with a line above, or a reason here why it prints no foreign name."""
    from coral.cli.main import COMMANDS  # noqa: PLC0415

    covered = {"collectors", "tap", "stop"}
    # They print the agent's own figures, and watch only processes that they start themselves.
    own = {"agent", "capabilities", "demo", "doctor"}
    own.add("pods")  # shows names of Kubernetes, which checks them, and by the same sheets
    own |= {"colony", "collect", "query"}  # their own tests have hostile texts: views/answers
    assert covered | own == set(COMMANDS)
