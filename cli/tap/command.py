"""`coral tap`: start a collector on a target, show what it sees, stop it.

No kind of collector is named here: the flags of each come from `coral.views.registry`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Final

import click

from coral.cli.common import (
    EXIT_ERROR,
    Duration,
    DurationType,
    agent_option,
    all_of,
    echo_error,
    one_of,
    run,
)
from coral.cli.signals import on_signal
from coral.cli.tap.completion import complete_target
from coral.cli.tap.display import Screen, Tapped, screen_of
from coral.cli.tap.files import Output, output_option, parse_output
from coral.cli.tap.launch import EXIT_NOT_EXECUTABLE, HeldCommand, own_namespace
from coral.client import AgentClient, AgentError, EndReason, Kind, Retry, Stream
from coral.views.contract import Flag, Session, Story, View
from coral.views.registry import VIEWS
from coral.wire.text import safe

_RETRY: Final = Retry(patience_s=5.0)  # somebody is waiting
_APART_S: Final = 0.03  # batches that are further apart are of different intervals
_LIMIT: Final = re.compile(r"limits\.\w+")
_TARGET_VALUES: Final = {
    "pid": "a process id, such as pid:1234",
    "cgroup": "the path of a cgroup",
    "comm": "the name of a command",
    "pod": "a pod, such as pod:shop/checkout-5d9c7b6f9c-x2x4p, with /CONTAINER for one of its "
    "containers",
    "pods": "a namespace and labels, such as 'pods:shop?app=web'",
    "namespace": "a namespace of Kubernetes, such as namespace:shop",
    "workload": "a workload, such as workload:shop/deploy/checkout",
    "container": "a container's id, or the beginning of it",
}
_EMPTY: Final = "an empty TARGET"
_CLOSED: Final = "standard output was closed"
_BAD_ENDS: Final = (EndReason.FAILED, EndReason.PREEMPTED, EndReason.AGENT_SHUTDOWN)
# Longer than the agent works on any one request.
_ANSWER_S: Final = 15.0


@dataclass(frozen=True)
class Target:
    """What to watch: a service, or what the collector's config says, or a command to start."""

    name: str
    service_name: str = ""
    config: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()


def parse_target(target: str | None, command: Sequence[str], *, host: bool) -> Target:
    """TARGET as users write it. Raises a usage error unless exactly one thing is named."""
    named = [target or _EMPTY] if target is not None else []
    named += ["--host"] * host + ["the command after --"] * bool(command)
    if not named or named == [_EMPTY]:
        raise click.UsageError(
            "name one thing to watch: a service, pid:N, cgroup:PATH, comm:NAME, pod:NAMESPACE/POD, "
            "pods:, namespace:, workload:, container:ID, --host, or a command to start after --"
        )
    if len(named) > 1:
        raise click.UsageError(f"give only one of {all_of(named)}")
    if host:
        return Target("host", config={"scope": "host"})
    if command:
        config = {"from_exec": "true", "until_exit": "true"}
        return Target(
            " ".join(command),
            service_name=PurePath(command[0]).name,
            config=config,
            command=tuple(command),
        )
    assert target is not None  # noqa: S101  the count above says so
    key, colon, value = target.partition(":")
    if colon and key in _TARGET_VALUES:
        if not value:
            raise click.UsageError(f"{target}: give {_TARGET_VALUES[key]}")
        return Target(target, config={key: value})
    return Target(target, service_name=target)


@dataclass(frozen=True)
class Request:
    """What to start, and how to show it. `typed` has the user's words for each option of the
    collector and each field of the request; see `coral.cli.common.in_users_words`."""

    view: View
    target: Target
    config: Mapping[str, str]
    typed: Mapping[str, str]
    story: Story
    duration_s: float | None
    address: str
    output: Output


class _TapCommand(click.Command):
    """Keeps what stands after `--` apart: a command to start, which click would take for
    arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.obj = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[OPTIONS] TARGET | -- COMMAND [ARG]...")


def tap_command(views: Mapping[int, View]) -> click.Command:
    """`coral tap` for some kinds of collectors."""
    flags = {flag.name: flag for view in views.values() for flag in view.flags}

    # One keyword argument for each flag below, by its name without the dashes.
    @click.command("tap", cls=_TapCommand)
    @click.argument("target", required=False, shell_complete=complete_target)
    @click.option("--host", is_flag=True, help="Watch every process of the machine.")
    @_each(_kind_option(view) for view in views.values())
    @_each(_flag_option(flag, views) for flag in flags.values())
    @click.option(
        "-d",
        "--duration",
        type=DurationType(),
        help="How long to watch at most, such as 30s.  [default: the agent's "
        "limits.default_duration, 5m unless it is configured]",
    )
    @click.option(
        "-c",
        "--config",
        "options",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any other option of the collector; `coral capabilities` lists them.",
    )
    @agent_option
    @output_option(views.values())
    @click.pass_context
    def tap(
        ctx: click.Context,
        /,
        *,
        target: str | None,
        host: bool,
        options: tuple[str, ...],
        duration: Duration | None,
        address: str,
        output: str,
        **given: Any,
    ) -> None:
        """Watch a service, a process, a pod, a cgroup or a command, and see what it does.

        TARGET is a service's name, pid:N, cgroup:PATH or comm:NAME. A command after -- is started,
        and watched from its exec on, with the processes that it starts itself. Ctrl-C stops the
        collector and prints the totals.

        \b
        On a node of Kubernetes, TARGET may also be
          pod:shop/checkout-5d9c7b6f9c-x2x4p/app   a pod, or one of its containers
          workload:shop/deploy/checkout            the pods of a workload
          'pods:shop?app=web,tier!=batch'          the pods with these labels
          namespace:shop                           the pods of a namespace
          container:3f2a9c                         a container, by its id

        Pods that come later are watched from their first exec on, but with pod: and container:.
        `coral pods` lists those of the node.
        """
        view = _chosen(views, given)
        chosen = parse_output(output, view, views)
        wanted = parse_target(target, ctx.obj or (), host=host)
        taken = [flag for flag in flags.values() if given[_parameter(flag)]]
        for flag in taken:
            if flag not in view.flags:
                raise click.UsageError(f"{flag.name} goes with {one_of(_having(flag, views))}")
        config, typed = _config(taken, given, options)
        if wanted.service_name:
            typed["service_name"] = wanted.name
        name = "--host" if host else wanted.name
        for key in wanted.config:
            if key in typed and not wanted.command:
                raise click.UsageError(f"give only one of {name} and {typed[key]}")
        for key in ("pid", *wanted.config):  # the pid of a command is known later
            typed.setdefault(key, name)
        if duration is not None:
            typed["duration"] = f"--duration {duration.text}"
        request = Request(
            view,
            wanted,
            {**wanted.config, **config},
            {**typed, "kind": view.flag},
            view.story(frozenset(flag.name for flag in taken if not flag.key)),
            duration,
            address,
            chosen,
        )
        run(_tap(request), request.typed)

    return tap


def _each(decorators: Iterator[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Several options, which help shows in this order."""

    def decorate(function: Any) -> Any:  # noqa: ANN401  what click decorates
        for decorator in reversed(tuple(decorators)):
            function = decorator(function)
        return function

    return decorate


def _kind_option(view: View) -> Callable[[Any], Any]:
    return click.option(view.flag, view.name, is_flag=True, help=view.about)


def _flag_option(flag: Flag, views: Mapping[int, View]) -> Callable[[Any], Any]:
    """An option. Its help names the kinds that have it, unless all have."""
    having = _having(flag, views)
    names = [name for name in (flag.short, flag.name) if name]
    return click.option(
        *names,
        _parameter(flag),
        is_flag=flag.is_switch,
        metavar=flag.metavar or None,
        help=flag.help + (f"  [with {one_of(having)}]" if len(having) < len(views) else ""),
    )


def _parameter(flag: Flag) -> str:
    return flag.name.removeprefix("--").replace("-", "_")


def _having(flag: Flag, views: Mapping[int, View]) -> list[str]:
    """The kinds that have a flag, as users ask for them."""
    return [view.flag for view in views.values() if flag in view.flags]


def _chosen(views: Mapping[int, View], given: Mapping[str, Any]) -> View:
    """The one kind that was asked for. Raises a usage error."""
    chosen = [view for view in views.values() if given[view.name]]
    if len(chosen) != 1:
        if chosen:
            raise click.UsageError(f"give only one of {all_of([view.flag for view in chosen])}")
        kinds = one_of([view.flag for view in views.values()])
        raise click.UsageError(f"name what to collect: {kinds}")
    return chosen[0]


def _config(
    taken: Sequence[Flag], given: Mapping[str, Any], options: Sequence[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The collector's options, and what the user typed for each. Raises a usage error."""
    config: dict[str, str] = {}
    typed: dict[str, str] = {}

    def give(key: str, value: str, words: str) -> None:
        if key in typed:
            raise click.UsageError(f"give only one of {all_of([typed[key], words])}")
        config[key], typed[key] = value, words

    for flag in taken:
        if flag.key:
            value = flag.value or given[_parameter(flag)]
            give(flag.key, value, flag.name if flag.is_switch else f"{flag.name} {value}")
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise click.UsageError(f"-c {option}: KEY=VALUE is expected")
        give(key, value, f"-c {option}")
    return config, typed


tap: Final = tap_command(VIEWS)


async def _tap(request: Request) -> int:
    target, config = request.target, dict(request.config)
    held = await HeldCommand.start(target.command) if target.command else None
    try:
        if held:
            config["pid"] = str(held.pid)
        async with AgentClient(request.address, timeout_s=_ANSWER_S) as agent:
            by_id = "pid" in target.config
            if by_id and "until_exit" not in config and await _can_end_with_target(agent, request):
                config["until_exit"] = "true"
            started = await agent.start(
                request.view.kind,
                service_name=target.service_name,
                config=config,
                duration_s=request.duration_s,
                # What TARGET names is here; -c pid=N is as the contract has it.
                pid_namespace=own_namespace("pid") if held or by_id else 0,
                cgroup_namespace=own_namespace("cgroup") if "cgroup" in target.config else 0,
            )
            if not started.supported:
                echo_error(f"this cannot run here: {started.error}")
                return EXIT_ERROR
            for note in started.notes:
                echo_error(note)
            tapped = Tapped(target.name, started, request.story)
            failure: AgentError | None = None
            try:
                tapped.begin(await _began_ns(agent, started.collector_id))
                screen = screen_of(request.output.form, tapped, config)
                await _follow(agent, request, tapped, screen, held)
            except AgentError as error:
                failure = error  # what has come before it is shown all the same
            finally:
                if not tapped.end:  # whatever ended this, a closed pipe for one
                    with suppress(AgentError):
                        await agent.stop(tapped.collector_id)
        if held and (problem := held.exec_error()):
            await held.wait()
            screen.discard()
            echo_error(problem)
            return EXIT_NOT_EXECUTABLE
        if not _finish(request.output, tapped, screen, failure):
            return EXIT_ERROR
    finally:
        if held:
            await held.abandon()
    return await _exit_status(request, tapped, held)


def _finish(output: Output, tapped: Tapped, screen: Screen, failure: AgentError | None) -> bool:
    """Writes the file that was asked for, and shows the totals; whether the file was written. The
    file comes first: a closed pipe must not cost it. Raises FAILURE, which ended the stream."""
    problem = _written(output, tapped, tapped.end_text)
    screen.finish()
    if problem:
        echo_error(problem)
    elif output.path:
        click.echo(f"written to {safe(str(output.path))}")
    if failure:
        raise failure
    return not problem


def _written(output: Output, tapped: Tapped, end: str) -> str:
    """Writes the file that was asked for, of a session that came to this END; why it was not
    written, or nothing."""
    try:
        output.write(tapped.story, Session(tapped.target, end, tapped.lost))
    except OSError as error:
        return f"{output.path} was not written: {error.strerror or error}"
    return ""


async def _can_end_with_target(agent: AgentClient, request: Request) -> bool:
    """Whether collectors of this kind can end with the processes that they watch."""
    kind = Kind(request.view.kind)
    return any(
        option.name == "until_exit" and not option.refused
        for collector in (await agent.capabilities()).collectors
        if collector.kind == kind
        for option in collector.options
    )


async def _exit_status(request: Request, tapped: Tapped, held: HeldCommand | None) -> int:
    """The command's where there is one, the signal's where one came; an error where the collector
    did not end as it should."""
    reason = tapped.end.reason if tapped.end else None
    if tapped.end and reason == EndReason.PREEMPTED:
        echo_error(_preempted(request, tapped.end.detail))
    if held and not tapped.interrupted:
        if reason not in (None, EndReason.TARGET_EXITED):
            over = "the time" if reason == EndReason.EXPIRED else "the tap"
            echo_error(f"{over} is over; waiting for the command to end (Ctrl-C ends it)")
        status = await held.wait()
        if left := held.left_running():
            echo_error(_left(left))
        if status:
            return status
    if tapped.interrupted:
        return 128 + tapped.interrupted
    return EXIT_ERROR if reason is None or reason in _BAD_ENDS else 0


def _left(pids: Sequence[int]) -> str:
    """What the command has left behind: the tap ends with it, and not with them."""
    what, them = ("a process", "it") if len(pids) == 1 else (f"{len(pids)} processes", "them")
    target = ",".join(map(str, pids))
    return (
        f"the command has ended and left {what} running, which this tap does not watch any more: "
        f"`coral tap pid:{target}` watches {them}"
    )


def _preempted(request: Request, detail: str) -> str:
    """Why the agent ended a tap before its time, and what would help."""
    helps = []
    if request.config.get("mode") == "events":
        helps.append("show figures, without --events")
    if request.config.get("scope"):
        helps.append("watch one service or process in place of --host")
    limits = _LIMIT.findall(detail)
    raised = f"{' and '.join(limits)} in " if limits else ""
    helps += [request.view.cheaper, f"raise {raised}the agent's configuration"]
    facts, _, _ = detail.partition(": ")  # what follows is for callers of the API
    return f"the agent ended this tap before its time: {facts}: {one_of(helps)}"


async def _began_ns(agent: AgentClient, collector_id: str) -> int:
    """When a collector began to watch, by its agent's clock; by this machine's where the agent does
    not say."""
    now_ns = time.time_ns()
    with suppress(AgentError):
        for collector in (await agent.collectors()).collectors:
            if collector.collector_id == collector_id:
                return collector.started_at_ns or now_ns
    return now_ns


async def _read(stream: Stream, tapped: Tapped, screen: Screen) -> None:
    """Reads to the end. The batches of one interval come at once, one after the other."""
    while True:
        coming = asyncio.ensure_future(anext(stream, None))
        try:
            await asyncio.wait([coming], timeout=_APART_S)
            if not coming.done():
                screen.show()
            batch = await coming
        finally:
            coming.cancel()
        if not batch:
            return
        screen.update(batch)
        tapped.add(batch)
        tapped.count_lost(stream.account)


async def _follow(
    agent: AgentClient, request: Request, tapped: Tapped, screen: Screen, held: HeldCommand | None
) -> None:
    """Shows batches until the session's end. The first Ctrl-C stops the collector; the rows that it
    still had are shown too."""
    stopping: set[asyncio.Task[Any]] = set()

    def stop(number: int) -> None:
        tapped.interrupted = number
        if held:
            held.end(number)
        stopping.add(asyncio.create_task(agent.stop(tapped.collector_id)))

    try:
        with on_signal(stop):
            columns = request.view.columns
            async with agent.subscribe(
                tapped.collector_id, interactive=True, columns=columns, retry=_RETRY
            ) as stream:
                if held:
                    held.release()
                await _read(stream, tapped, screen)
    except BrokenPipeError:  # nobody reads standard output any more; the file may still be wanted
        if problem := _written(request.output, tapped, _CLOSED):
            echo_error(problem)
        raise
    finally:
        await asyncio.gather(*stopping, return_exceptions=True)
