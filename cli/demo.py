"""`coral demo`: the main job, on real input, in one command, with nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import click

from cli.common import EXIT_ERROR, DurationType
from cli.demo_service import PATHS

_SERVICE: Final = "shop"
_START_TIMEOUT_S: Final = 10.0
_PAGE_BYTES: Final = 20_000
_METRICS_SHOWN: Final = 3


@click.command()
@click.option("-d", "--duration", type=DurationType(), default="10s", show_default=True)
def demo(duration: float) -> None:
    """Start an agent and a small HTTP service, watch the one through the other, clean up."""
    if os.geteuid() != 0:
        click.echo("coral demo: loading eBPF programs takes root: run it with sudo", err=True)
        sys.exit(EXIT_ERROR)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coral-demo-")))
        sys.exit(_demo(stack, directory, duration))


def _demo(stack: ExitStack, directory: Path, duration_s: float) -> int:
    address = f"unix:{directory}/agent.sock"
    log_path = directory / "agent.log"
    config = directory / "agent.yaml"
    pid_file = directory / "shop.pid"
    config.write_text(f"services:\n  {_SERVICE}:\n    pid_file: {pid_file}\n")

    _say("starting a small HTTP service, and a load for it, on loopback")
    pages = directory / "pages"
    pages.mkdir()
    for path in PATHS[:-1]:
        (pages / path[1:]).write_text("coral " * (_PAGE_BYTES // 6))
    service = stack.enter_context(
        _process(_module("cli.demo_service", "serve", str(pages)), stdout=subprocess.PIPE)
    )
    assert service.stdout  # noqa: S101  it was asked for
    port = int(service.stdout.readline())
    pid_file.write_text(str(service.pid))
    load_s = duration_s + _START_TIMEOUT_S
    stack.enter_context(_process(_module("cli.demo_service", "load", str(port), str(load_s))))

    _say("starting the agent: coral agent --config agent.yaml")
    with log_path.open("w") as log:
        agent = stack.enter_context(
            _process(
                _coral(
                    *("agent", "--listen", address, "--metrics", "127.0.0.1:0"),
                    *("--config", str(config), "--log-format", "json"),
                ),
                stderr=log,
            )
        )
    metrics = _wait_for(lambda: _metrics_address(log_path), agent, log_path)

    _say(f"coral tap {_SERVICE} --syscall-stats --duration {duration_s:g}s")
    tap = subprocess.run(
        _coral(
            *("tap", _SERVICE, "--syscall-stats", "--duration", f"{duration_s}s"),
            *("--agent", address),
        ),
        check=False,
    )

    _say(f"what Prometheus sees at {metrics}/metrics, three lines of it")
    with urllib.request.urlopen(f"http://{metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    shown = sorted(line for line in lines if line.startswith("coral_syscall_calls_total{"))
    click.echo("\n".join(shown[:_METRICS_SHOWN]))

    agent.terminate()
    status = agent.wait()
    _say(f"the agent has stopped with status {status}; its programs left the kernel with it")
    return tap.returncode or status or (not shown)


def _say(text: str) -> None:
    click.secho(f"\n# {text}", bold=True)


def _coral(*arguments: str) -> list[str]:
    return _module("cli.main", *arguments)


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


@contextmanager
def _process(
    command: Sequence[str], stdout: int | None = None, stderr: object = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended when the block is left, if it has not ended by itself."""
    process = subprocess.Popen(command, stdout=stdout, stderr=stderr)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _metrics_address(log_path: Path) -> str:
    for line in log_path.read_text().splitlines():
        if '"listening"' in line:
            return line.partition('"metrics": "')[2].partition('"')[0]
    return ""


def _wait_for(condition: Callable[[], str], agent: subprocess.Popen[bytes], log_path: Path) -> str:
    """What CONDITION gives once it is not empty. Exits with the agent's log where it never is."""
    end = time.monotonic() + _START_TIMEOUT_S
    while not (value := condition()):
        if agent.poll() is not None or time.monotonic() > end:
            click.echo(f"coral demo: the agent did not start:\n{log_path.read_text()}", err=True)
            sys.exit(EXIT_ERROR)
        time.sleep(0.02)
    return value
