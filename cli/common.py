"""What every command that talks to an agent shares."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import click
import yaml
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from coral.client import AgentError, default_address

EXIT_ERROR: Final = 1
EXIT_INTERRUPTED: Final = 130
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

F = TypeVar("F", bound=Callable[..., Any])


class DurationType(click.ParamType[float]):
    """`500ms`, `30s`, `5m`, as seconds."""

    name = "duration"

    def convert(
        self,
        value: object,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> float:
        """Seconds, or a usage error."""
        match = _DURATION.fullmatch(str(value))
        if not match:
            self.fail(f"{value!r} is not a duration; give 500ms, 30s or 5m", param, ctx)
        return float(match[1]) * _SECONDS[match[2] or "s"]


def agent_option(function: F) -> F:
    """Adds --agent."""
    return click.option(
        "--agent",
        "address",
        default=default_address,
        metavar="ADDRESS",
        help="The agent: unix:PATH or HOST:PORT.  [default: CORAL_AGENT, else the local socket]",
    )(function)


def output_option(function: F) -> F:
    """Adds -o, and --json for short."""
    short = click.option("--json", "output", flag_value="json", help="The same as -o json.")
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "yaml"]),
        default="table",
        show_default=True,
        help="For people, or for programs.",
    )(short(function))


def run(main: Coroutine[Any, Any, int]) -> None:
    """Runs a command to its exit status; what the agent refuses is one line on standard error."""
    try:
        status = asyncio.run(main)
    except AgentError as error:
        click.echo(f"coral: {error}", err=True)
        status = EXIT_ERROR
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    sys.exit(status)


def echo_data(data: object, output: str) -> None:
    """One JSON object on a line, or one YAML document."""
    if output == "json":
        click.echo(json.dumps(data))
    else:
        click.echo("---\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True), nl=False)


def as_dict(message: Message, *, whole: bool = False) -> dict[str, Any]:
    """A message as plain data, under the names of the .proto; a WHOLE one has what is false, 0 or
    empty too."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=whole
    )
