"""`coral demo`: the main job, on real input, in one command, with nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import click

from coral.cli.common import EXIT_ERROR, DurationType
from coral.cli.demo.service import PATHS
from coral.cli.private_agent import AgentDidNotStartError, coral, module, private_agent, process
from coral.cli.signals import exiting

_SERVICE: Final = "shop"
_LOAD_LONGER_S: Final = 10.0  # than the tap, which begins later
_PAGE_BYTES: Final = 20_000
_METRICS_SHOWN: Final = 3


@click.command()
@click.option("-d", "--duration", type=DurationType(), default="10s", show_default=True)
def demo(duration: float) -> None:
    """Start an agent and a small HTTP service, watch the one through the other, clean up."""
    if os.geteuid() != 0:
        click.echo("coral demo: loading eBPF programs takes root: run it with sudo", err=True)
        sys.exit(EXIT_ERROR)
    with exiting(), ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coral-demo-")))
        try:
            status = _demo(stack, directory, duration)
        except AgentDidNotStartError as error:
            click.echo(f"coral demo: the agent did not start:\n{error}", err=True)
            status = EXIT_ERROR
    sys.exit(status)


def _demo(stack: ExitStack, directory: Path, duration_s: float) -> int:
    config = directory / "agent.yaml"
    pid_file = directory / "shop.pid"
    config.write_text(f"services:\n  {_SERVICE}:\n    pid_file: {pid_file}\n")

    _say("starting a small HTTP service, and a load for it, on loopback")
    pages = directory / "pages"
    pages.mkdir()
    for path in PATHS[:-1]:
        (pages / path[1:]).write_text("coral " * (_PAGE_BYTES // 6))
    service = stack.enter_context(
        process(module("coral.cli.demo.service", "serve", str(pages)), stdout=subprocess.PIPE)
    )
    assert service.stdout  # noqa: S101  it was asked for
    port = int(service.stdout.readline())
    pid_file.write_text(str(service.pid))
    load_s = duration_s + _LOAD_LONGER_S
    stack.enter_context(process(module("coral.cli.demo.service", "load", str(port), str(load_s))))

    _say("starting the agent: coral agent --config agent.yaml")
    agent = stack.enter_context(private_agent(directory, "--config", str(config)))

    _say(f"coral tap {_SERVICE} --syscall-stats --duration {duration_s:g}s")
    tap = subprocess.run(
        coral(
            *("tap", _SERVICE, "--syscall-stats", "--duration", f"{duration_s}s"),
            *("--agent", agent.address),
        ),
        check=False,
    )

    _say(f"what Prometheus sees at {agent.metrics}/metrics, three lines of it")
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    label = f'service="{_SERVICE}"'
    shown = sorted(line for line in lines if line.startswith("coral_") and label in line)
    click.echo("\n".join(shown[:_METRICS_SHOWN]))

    status = agent.stop()
    _say(f"the agent has stopped with status {status}; its programs left the kernel with it")
    return tap.returncode or status or (not shown)


def _say(text: str) -> None:
    click.secho(f"\n# {text}", bold=True)
