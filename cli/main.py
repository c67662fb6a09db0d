"""`coral`: the table of commands."""

from __future__ import annotations

import click

from cli.agent_command import agent
from cli.demo import demo
from cli.show import capabilities, collectors, stop
from cli.tap import tap


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="coral-ebpf-agent", prog_name="coral")
def main() -> None:
    """See what programs do, through eBPF, without touching them."""


for command in (agent, capabilities, collectors, demo, stop, tap):
    main.add_command(command)


if __name__ == "__main__":
    main()
