"""`coral colony`: follow the agents of a cluster, keep what they see, answer questions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from coral.cli.common import EXIT_ERROR, echo_error


def _split(addresses: tuple[str, ...]) -> list[str]:
    return [item.strip() for each in addresses for item in each.split(",") if item.strip()]


@click.command()
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A YAML file; see docs/colony.md.",
)
@click.option(
    "--data",
    metavar="DIR",
    help="The directory of what is stored.  [default: /var/lib/coral/colony]",
)
@click.option(
    "--agents",
    multiple=True,
    metavar="ADDRESS",
    help="The agents to follow: HOST:PORT or unix:PATH; repeatable, or separated by commas.",
)
@click.option(
    "--listen",
    multiple=True,
    metavar="ADDRESS",
    help="Where questions are answered: unix:PATH or HOST:PORT; repeatable."
    "  [default: unix:/run/coral/colony.sock]",
)
@click.option(
    "--metrics",
    metavar="ADDRESS",
    help="Where /metrics, /healthz and /readyz are served, '' for nowhere."
    "  [default: 127.0.0.1:9465]",
)
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    help="Log lines for people, or for machines.  [default: console]",
)
def colony(
    *,
    config_path: Path | None,
    data: str | None,
    agents: tuple[str, ...],
    listen: tuple[str, ...],
    metrics: str | None,
    log_format: str | None,
) -> None:
    """Follow agents, keep what they see, and answer questions, in the foreground."""
    # numpy's OpenBLAS would start a thread for each CPU, which nothing here uses.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        from coral.colony.main import main  # noqa: PLC0415  no other command needs it
    except ModuleNotFoundError as error:
        if str(error.name).startswith("coral.") and error.name != "coral.colony":
            raise
        echo_error(f"the colony needs {error.name}: pip install 'coral-ebpf-agent[colony]'")
        sys.exit(EXIT_ERROR)
    flags: dict[str, object] = {}
    if data is not None:
        flags["data"] = data
    if agents:
        flags["agents.addresses"] = _split(agents)
    if listen:
        flags["listen"] = _split(listen)
    if metrics is not None:
        flags["metrics"] = metrics
    if log_format:
        flags["log_format"] = log_format
    sys.exit(main(config_path, flags))
