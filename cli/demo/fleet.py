"""The second part of the demonstration: two nodes, and a colony that says which one is ill.

A node is a network namespace with a shop, a load for it, and an agent. On one of them payments
take six times as long.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from coral.cli.demo.saying import say
from coral.cli.private_agent import coral, module, private_agent, process

PAYMENT_MS: Final[Mapping[str, int]] = {"north": 20, "south": 120}
NEEDED: Final = ("duckdb", "pyarrow")
_SERVICE: Final = "shop"
_ENDS_S: Final = 600.0  # the load, unless the demonstration ends it before
_STARTS_S: Final = 30.0
_POLL_S: Final = 0.05
_QUESTIONS: Final = (
    ("Which requests are slow?", ("http", _SERVICE)),
    (
        "Payments are. On which node?",
        ("http", _SERVICE, "-w", "method=POST", "--by", "agent,method,route"),
    ),
    (
        "Anything else, in SQL:",
        (
            "sql",
            "SELECT agent, sum(count) AS n, sum(errors) AS failed FROM http_latency GROUP BY agent",
        ),
    ),
)


class ColonyDidNotStartError(Exception):
    """The colony exited or did not listen in time; the message is its log."""


def missing() -> list[str]:
    """The packages that a colony needs and that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def ask_a_colony(directory: Path, pages: Path, seconds: float) -> int:
    """Has a colony follow two nodes for SECONDS, and asks it three questions; the exit status of
    the first that failed, else 0. PAGES are what the shops serve."""
    with ExitStack() as stack:
        for name, payment_ms in PAYMENT_MS.items():
            say(f"a node: {name}, with a shop of its own, where a payment takes {payment_ms} ms")
            stack.enter_context(_node(directory, name, payment_ms, pages))
        agents = [f"unix:{directory}/{name}.sock" for name in PAYMENT_MS]
        say("starting a colony that follows both: coral colony --config colony.yaml")
        address = stack.enter_context(_colony(directory, agents))
        time.sleep(seconds)
        failed = 0
        for question, arguments in _QUESTIONS:
            say(f"{question} coral query {shlex.join(arguments)}")
            asked = subprocess.run(
                coral("query", *arguments), env=os.environ | {"CORAL_COLONY": address}, check=False
            )
            failed = failed or asked.returncode
    return failed


@contextmanager
def _node(directory: Path, name: str, payment_ms: int, pages: Path) -> Iterator[None]:
    with ExitStack() as stack:
        serving = module("coral.cli.demo.service", "serve", str(pages), str(payment_ms))
        shop = stack.enter_context(process(["unshare", "--net", *serving], stdout=subprocess.PIPE))
        assert shop.stdout  # noqa: S101  it was asked for
        port = int(shop.stdout.readline())
        inside = ("nsenter", f"--net=/proc/{shop.pid}/ns/net")
        asking = module("coral.cli.demo.service", "load", str(port), str(_ENDS_S))
        stack.enter_context(process([*inside, *asking]))
        pid_file, config = directory / f"{name}.pid", directory / f"{name}.yaml"
        pid_file.write_text(str(shop.pid))
        config.write_text(f"agent_id: {name}\nservices:\n  {_SERVICE}:\n    pid_file: {pid_file}\n")
        stack.enter_context(
            private_agent(directory, "--config", str(config), name=name, inside=inside)
        )
        yield


@contextmanager
def _colony(directory: Path, agents: Sequence[str]) -> Iterator[str]:
    """Gives its address once it listens there."""
    config, log_path = directory / "colony.yaml", directory / "colony.log"
    path = directory / "asked.sock"  # as short as `agent.sock`: paths of sockets have a limit
    config.write_text(
        f"agents:\n  addresses: [{', '.join(agents)}]\n"
        f"collect:\n- kind: http_latency\n  service: {_SERVICE}\n  config: {{interval: 1s}}\n"
    )
    command = coral(
        *("colony", "--config", str(config), "--data", str(directory / "data")),
        *("--listen", f"unix:{path}", "--metrics", ""),
    )
    with log_path.open("w") as log, process(command, stderr=log) as colony:
        end = time.monotonic() + _STARTS_S
        while not path.exists():
            if colony.poll() is not None or time.monotonic() > end:
                raise ColonyDidNotStartError(log_path.read_text())
            time.sleep(_POLL_S)
        yield f"unix:{path}"
