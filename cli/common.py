"""What every command that talks to an agent shares."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol, Self, TypeVar

import click
import yaml
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console

from coral.cli.signals import cancelled_by_signals
from coral.client import AgentError, InvalidArgumentError, default_address
from coral.client.tls import ENV_CA, ENV_CERTIFICATE, ENV_KEY, ENV_SERVER_NAME
from coral.wire.text import safe

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2
EXIT_CLOSED_PIPE: Final = 141  # a shell's status for SIGPIPE
ANSWER_S: Final = 5.0  # for what the agent knows, or does at once
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SECONDS: Final = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

# An agent names a field of the request, then what is wrong with it.
_FIELD: Final = re.compile(
    r"(?:config\[\"(?P<option>[^\"]*)\"\]|(?P<field>[a-z_]+)): (?P<problem>.*)", re.DOTALL
)
_NOT_ACCEPTED: Final = re.compile(
    r"(?P<value>'.*?'|\".*?\"|\S+) is (?:not accepted; |(?=not allowed))(?P<rest>.*)", re.DOTALL
)
_NO_PROCESS: Final = re.compile(r"give the ids of processes that run now: (\d+) does not")
_A_THREAD: Final = re.compile(r"give the ids of processes: ((\d+) is a thread of process (\d+))")
_KIND: Final = re.compile(r"EBPF_COLLECTOR_KIND_(\w+)")
_ONLY_KINDS: Final = re.compile(r"not allowed by this agent's (policy\.collectors), (.*)")
_NO_ANSWER: Final = re.compile(r"the agent at (.*) did not answer \w+ within (.*)")
_ACCEPTS: Final = r"the agent at \1 accepts the connection and does not answer (waited \2)"

_TLS_OPTIONS: Final = (
    ("--tls-ca", ENV_CA, "FILE", "Over TLS: the authorities of the server's certificate, in PEM."),
    ("--tls-cert", ENV_CERTIFICATE, "FILE", "The certificate to show to the server, in PEM."),
    ("--tls-key", ENV_KEY, "FILE", "Its key, in PEM."),
    ("--tls-server-name", ENV_SERVER_NAME, "NAME", "The name in the server's certificate."),
)

F = TypeVar("F", bound=Callable[..., Any])


class Output(Console):
    """Standard output. A closed pipe raises BrokenPipeError, as it does without rich."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise  # noqa: PLE0704


class Duration(float):
    """Seconds, and the text that they were given as."""

    text: str

    def __new__(cls, seconds: float, text: str) -> Self:
        """A float that remembers TEXT."""
        duration = super().__new__(cls, seconds)
        duration.text = text
        return duration


class DurationType(click.ParamType[Duration]):
    """`500ms`, `30s`, `5m`, as seconds."""

    name = "duration"

    def convert(
        self,
        value: object,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Duration:
        """Seconds, or a usage error."""
        match = _DURATION.fullmatch(str(value))
        if not match:
            self.fail(f"{value!r} is not a duration; give 500ms, 30s or 5m", param, ctx)
        return Duration(float(match[1]) * _SECONDS[match[2] or "s"], str(value))


def agent_option(function: F) -> F:
    """Adds --agent, and the options of `tls_options`."""
    return click.option(
        "--agent",
        "address",
        default=default_address,
        metavar="ADDRESS",
        help="The agent: unix:PATH or HOST:PORT.  [default: CORAL_AGENT, else the local socket]",
    )(tls_options(function))


def tls_options(function: F) -> F:
    """Adds --tls-ca and the others. What is given is put into the environment, where the client
    looks for it, and the commands that this one starts."""
    for flag, variable, metavar, text in reversed(_TLS_OPTIONS):
        function = click.option(
            flag,
            metavar=metavar,
            expose_value=False,
            callback=partial(_into_environment, variable),
            help=f"{text}  [default: {variable}]",
        )(function)
    return function


def _into_environment(
    variable: str, _ctx: click.Context, _param: click.Parameter, value: str | None
) -> None:
    if value is not None:
        os.environ[variable] = value


def output_option(function: F) -> F:
    """Adds -o, and --json for short."""
    short = click.option("--json", "output", flag_value="json", help="The same as -o json.")
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "yaml"]),
        default="table",
        show_default=True,
        help="A table for people, or data for programs.",
    )(short(function))


def run(main: Coroutine[Any, Any, int], typed: Mapping[str, str] | None = None) -> None:
    """Runs a command to its exit status. A refusal of the agent is one line on standard error, in
    the words that the user TYPED; see `in_users_words`."""
    try:
        status = asyncio.run(cancelled_by_signals(main))
    except AgentError as error:
        echo_error(in_users_words(str(error), typed or {}))
        status = EXIT_USAGE if isinstance(error, InvalidArgumentError) else EXIT_ERROR
    except BrokenPipeError:
        # Python flushes standard output once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_CLOSED_PIPE
    except OSError as error:  # a full disk
        echo_error(error.strerror or str(error))
        status = EXIT_ERROR
    sys.exit(status)


def echo_error(text: str) -> None:
    """One line on standard error."""
    click.echo(f"coral: {'; '.join(safe(line) for line in text.splitlines())}", err=True)


def in_users_words(message: str, typed: Mapping[str, str]) -> str:
    """An agent's refusal, without the names that only the contract knows. TYPED has, by the option
    of the collector or the field of the request, what the user typed for it: {"pid": "pid:1234",
    "top": "-c top=x"}. A message that names no such field stays as it is."""
    message = _KIND.sub(lambda match: match[1].lower(), message)
    message = _NO_ANSWER.sub(_ACCEPTS, message)
    match = _FIELD.fullmatch(message)
    if not match:
        return message
    option, field, problem = match["option"], match["field"], match["problem"]
    words = typed.get(option or field)
    refused = _NOT_ACCEPTED.fullmatch(problem)
    if field == "authorization":
        wrong = "is wrong" in problem
        missing = "a token is needed: set CORAL_TOKEN"
        return "the token in CORAL_TOKEN is wrong" if wrong else missing
    if option is None and field in ("service_name", "collector_id"):
        is_number = field == "service_name" and words and words.isdecimal()
        return f"{problem}; did you mean pid:{words}?" if is_number else problem
    if option is None and words is None:
        return message
    if words is None:
        words = f"-c {option}"
        if refused:
            words += "=" + refused["value"].strip("'\"")
    return f"{words}: {_problem(refused['rest'] if refused else problem, words)}"


def _problem(text: str, words: str) -> str:
    """What is wrong with a value, where the agent could say it more simply."""
    if match := _NO_PROCESS.fullmatch(text):
        return f"there is no process {match[1]}" if "," in words else "there is no such process"
    if match := _ONLY_KINDS.fullmatch(text):
        return f"this agent's {match[1]} allows only {match[2]}"
    if match := _A_THREAD.fullmatch(text):
        return f"{match[1]}: give pid:{match[3]}"
    return text


def echo_data(data: object, output: str) -> None:
    """One JSON object on a line, or one YAML document."""
    if output == "json":
        click.echo(json.dumps(data))
    else:
        click.echo("---\n" + yaml.safe_dump(data, sort_keys=False), nl=False)


def one_of(names: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return _listed(names, "or")


def all_of(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return _listed(names, "and")


def _listed(names: Sequence[str], conjunction: str) -> str:
    *most, last = names
    return f"{', '.join(most)} {conjunction} {last}" if most else last


class Answer(Protocol):
    """A result of the client, with the contract's message that it was made from."""

    @property
    def message(self) -> Message:
        """The agent's whole answer."""


def as_dict(answer: Answer | Message, *, whole: bool = False) -> dict[str, Any]:
    """An answer as plain data, under the names of the .proto; a WHOLE one includes fields that are
    false, 0 or empty."""
    message = answer if isinstance(answer, Message) else answer.message
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=whole
    )
