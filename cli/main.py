"""`coral`: the table of commands. The module of a command is imported only when that command runs,
so that a long-running agent does not hold in memory what only a terminal needs."""

from __future__ import annotations

import signal

# Before the other imports, which take a while: a command has nothing to clean up until it says so.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import io
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Final

import click

from coral.cli.listing import Commands

COMMANDS: Final[Mapping[str, str]] = {
    "agent": "coral.cli.agent_command",
    "capabilities": "coral.cli.show",
    "collect": "coral.cli.query.collect",
    "collectors": "coral.cli.show",
    "colony": "coral.cli.colony_command",
    "demo": "coral.cli.demo.command",
    "doctor": "coral.cli.doctor.command",
    "pods": "coral.cli.pods",
    "query": "coral.cli.query.command",
    "stop": "coral.cli.show",
    "tap": "coral.cli.tap.command",
}


class _Commands(Commands):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name]), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="coral-ebpf-agent", prog_name="coral")
def main() -> None:
    """See what programs do, through eBPF, without touching them."""
    _buffer_stdout()


def _buffer_stdout() -> None:
    """Lines are written at once, but through a buffer: with PYTHONUNBUFFERED there is none, and
    Python loses the rest of what a signal has write(2) write in part. A Ctrl-C could cut a line of
    JSON that waits for a slow reader."""
    if isinstance(sys.stdout, io.TextIOWrapper) and isinstance(sys.stdout.buffer, io.FileIO):
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        buffer = io.BufferedWriter(sys.stdout.detach())
        sys.stdout = io.TextIOWrapper(buffer, encoding, errors, line_buffering=True)


if __name__ == "__main__":
    main()
