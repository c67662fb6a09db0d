"""`coral agent`: the one place where the command line reaches over to the node's side."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click


@click.command()
@click.option(
    "--listen",
    multiple=True,
    metavar="ADDRESS",
    help="Where gRPC listens: unix:PATH or HOST:PORT; repeatable, or separated by commas."
    "  [default: unix:/run/coral/agent.sock]",
)
@click.option(
    "--metrics",
    metavar="ADDRESS",
    help="Where /metrics is served, '' for nowhere.  [default: 127.0.0.1:9464]",
)
@click.option(
    "--config",
    "config_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A YAML file; see docs/configuration.md.",
)
@click.option(
    "--user",
    metavar="NAME",
    help="Started as root, become this user and keep only what the collectors need.",
)
@click.option(
    "--loader",
    type=click.Choice(["auto", "core", "bcc"]),
    help="How programs get into the kernel.  [default: auto: core, or bcc without BTF]",
)
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    help="Log lines for people, or for machines.  [default: console]",
)
def agent(
    *,
    listen: tuple[str, ...],
    metrics: str | None,
    config_path: Path | None,
    user: str | None,
    loader: str | None,
    log_format: str | None,
) -> None:
    """Run the agent of this machine, in the foreground."""
    # numpy's OpenBLAS would start a thread for each CPU, which nothing here uses, before the agent
    # gives up its capabilities: those are each thread's own.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from coral.agent.main import main  # noqa: PLC0415  no other command needs the node's side

    flags: dict[str, object] = {}
    if listen:
        # Several in one are split, as in the environment.
        flags["listen"] = [
            item.strip() for each in listen for item in each.split(",") if item.strip()
        ]
    if metrics is not None:
        flags["metrics"] = metrics
    if user is not None:
        flags["user"] = user
    if loader:
        flags["loader"] = loader
    if log_format:
        flags["log_format"] = log_format
    sys.exit(main(config_path, flags))
