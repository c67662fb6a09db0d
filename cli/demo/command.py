"""`coral demo`: the main job, on real input, in one command, with nothing left behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import click

from coral.cli.common import EXIT_ERROR, DurationType
from coral.cli.demo.fleet import ColonyDidNotStartError, ask_a_colony, missing
from coral.cli.demo.saying import say
from coral.cli.demo.service import PAGES
from coral.cli.private_agent import (
    AgentDidNotStartError,
    PrivateAgent,
    coral,
    module,
    private_agent,
    process,
)
from coral.cli.signals import exiting
from coral.client import AgentClient, Capabilities

_SERVICE: Final = "shop"
_KINDS: Final = ("http_latency", "syscall_stats")  # in the order in which they are shown
_LOAD_LONGER_S: Final = 60.0  # than the taps, which begin later; it is ended with them
_PAGE_BYTES: Final = 20_000
_PAGES: Final = "pages"
_FOLLOWED_S: Final = 8.0
_METRICS: Final = ("http_server_request_duration_seconds_count", "coral_syscall_calls_total")


@click.command()
@click.option("-d", "--duration", type=DurationType(), default="10s", show_default=True)
def demo(duration: float) -> None:
    """Start an agent and a small HTTP service, watch the one through the other; then do it on two
    nodes and ask a colony which of them is ill; clean up."""
    if os.geteuid() != 0:
        click.echo("coral demo: loading eBPF programs takes root: run it with sudo", err=True)
        sys.exit(EXIT_ERROR)
    with exiting(), ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coral-demo-")))
        try:
            status = _demo(stack, directory, duration)
            status = status or _with_a_colony(directory)
        except AgentDidNotStartError as error:
            click.echo(f"coral demo: the agent did not start:\n{error}", err=True)
            status = EXIT_ERROR
        except ColonyDidNotStartError as error:
            click.echo(f"coral demo: the colony did not start:\n{error}", err=True)
            status = EXIT_ERROR
    sys.exit(status)


def _demo(stack: ExitStack, directory: Path, duration_s: float) -> int:
    config = directory / "agent.yaml"
    pid_file = directory / "shop.pid"
    config.write_text(f"services:\n  {_SERVICE}:\n    pid_file: {pid_file}\n")

    say("starting a small HTTP service, and a load for it, on loopback")
    pages = directory / _PAGES
    pages.mkdir()
    for path in PAGES:
        (pages / path[1:]).write_text("coral " * (_PAGE_BYTES // 6))
    service = stack.enter_context(
        process(module("coral.cli.demo.service", "serve", str(pages)), stdout=subprocess.PIPE)
    )
    assert service.stdout  # noqa: S101  it was asked for
    port = int(service.stdout.readline())
    pid_file.write_text(str(service.pid))
    load_s = duration_s + _LOAD_LONGER_S
    stack.enter_context(process(module("coral.cli.demo.service", "load", str(port), str(load_s))))

    say("starting the agent: coral agent --config agent.yaml")
    agent = stack.enter_context(private_agent(directory, "--config", str(config)))

    failed = [_tap(agent, kind, duration_s / len(_KINDS)) for kind in _kinds(agent)]

    say(f"what Prometheus sees at {agent.metrics}/metrics, some lines of it")
    with urllib.request.urlopen(f"http://{agent.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    label = f'service="{_SERVICE}"'
    shown = [
        line
        for start in _METRICS
        for line in sorted(line for line in lines if line.startswith(start) and label in line)[:2]
    ]
    click.echo("\n".join(shown))

    status = agent.stop()
    say(f"the agent has stopped with status {status}; its programs left the kernel with it")
    return next(filter(None, failed), 0) or status or (not shown)


def _with_a_colony(directory: Path) -> int:
    """The part with several nodes, where its packages are installed; its exit status."""
    lacking = missing()
    if lacking:
        say(f"a colony would need {', '.join(lacking)}: pip install 'coral-ebpf-agent[colony]'")
        return 0
    return ask_a_colony(directory, directory / _PAGES, _FOLLOWED_S)


def _kinds(agent: PrivateAgent) -> Iterator[str]:
    """The kinds that this machine supports; says why not the others."""

    async def capabilities() -> Capabilities:
        async with AgentClient(agent.address) as client:
            return await client.capabilities()

    supported = {str(it.kind): it for it in asyncio.run(capabilities()).collectors}
    for kind in _KINDS:
        found = supported.get(kind)
        if found and found.supported:
            yield kind
        else:
            say(f"{kind} cannot run here: {found.reason if found else 'the agent has none'}")


def _tap(agent: PrivateAgent, kind: str, duration_s: float) -> int:
    """Shows a tap of the service; returns its exit status."""
    flag, duration = f"--{kind.replace('_', '-')}", f"{duration_s:g}s"
    say(f"coral tap {_SERVICE} {flag} --duration {duration}")
    command = coral("tap", _SERVICE, flag, "--duration", duration, "--agent", agent.address)
    return subprocess.run(command, check=False).returncode
