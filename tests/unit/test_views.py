"""Kinds come from the registry alone; refusals are said in the words that the user typed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from coral.cli.common import DurationType, echo_error, in_users_words
from coral.cli.doctor.provoke import UNKNOWN
from coral.cli.tap import command
from coral.cli.tap.files import Output
from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.contract import EVENTS, Flag, Story, View
from coral.views.intervals import Intervals
from coral.views.registry import VIEWS
from tests.peer import Context, peer
from tests.support import ROOT


class ToyStory:
    """The least that a story is."""

    def __init__(self, given: Iterable[str]) -> None:
        self.intervals = Intervals()
        self.given = frozenset(given)

    def add(self, batch: Batch) -> None:
        self.intervals.add(batch.message)

    def interval_table(self, width: int, most_lines: int) -> str:
        return f"{width} {most_lines}"

    def interval_lines(self) -> Iterable[str]:
        return ("an interval",)

    def end_table(self, width: int) -> str:
        return str(width)

    def end_lines(self) -> Iterable[str]:
        return ("the end",)

    def event_lines(self, batch: Batch, width: int | None = None) -> Iterable[str]:
        return (f"{batch.count} {width}",)

    def records(self, batch: Batch) -> Iterable[dict[str, Any]]:
        return ({"count": batch.count},)


STORIES: list[ToyStory] = []


def toy_story(given: Iterable[str]) -> Story:
    STORIES.append(ToyStory(given))
    return STORIES[-1]


TOY = View(
    kind=pb.EBPF_COLLECTOR_KIND_CPU_PROFILE,
    about="Where the time goes.",
    story=toy_story,
    flags=(
        EVENTS,
        Flag("--frequency", "Samples a second.", key="frequency_hz", metavar="HZ", short="-f"),
        Flag("--demangle", "Names as in the source."),
    ),
    cheaper="sample less often with --frequency",
)
REAL = (
    pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS,
    pb.EBPF_COLLECTOR_KIND_TCP_METRICS,
    pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY,
)
FLAGS = ("--syscall-stats", "--tcp-metrics", "--http-latency")
WITH_TOY: dict[int, View] = {**{kind: VIEWS[kind] for kind in REAL}, TOY.kind: TOY}


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[command.Request]:
    """What `coral tap` would ask an agent for, in place of asking."""
    made: list[command.Request] = []

    async def tap(request: command.Request) -> int:
        made.append(request)
        return 0

    monkeypatch.setattr(command, "_tap", tap)
    return made


def tap(*arguments: str, views: Mapping[int, View] = WITH_TOY) -> Any:
    return CliRunner().invoke(command.tap_command(views), arguments)


def test_a_new_kind_has_its_flags_without_a_change_of_the_command(
    requests: list[command.Request],
) -> None:
    done = tap("pid:7", "--cpu-profile", "--events", "-f", "19", "--demangle", "-c", "top=3")
    assert (done.exit_code, done.output) == (0, "")
    (request,) = requests
    assert request.view is TOY
    assert dict(request.config) == {
        "pid": "7", "mode": "events", "frequency_hz": "19", "top": "3",
    }  # fmt: skip
    assert STORIES[-1].given == {"--demangle"}
    assert request.typed == {
        "kind": "--cpu-profile", "pid": "pid:7", "mode": "--events",
        "frequency_hz": "--frequency 19", "top": "-c top=3",
    }  # fmt: skip
    text = " ".join(tap("--help").output.split())
    assert "--cpu-profile Where the time goes." in text
    assert "-f, --frequency HZ Samples a second. [with --cpu-profile]" in text
    assert "--events Show every single event on a line of its own. -i" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            (),
            "name what to collect: --syscall-stats, --tcp-metrics, --http-latency or --cpu-profile",
        ),
        (("--cpu-profile", "--tcp-metrics"), "give only one of --tcp-metrics and --cpu-profile"),
        (("--cpu-profile", "--resolve"), "--resolve goes with --tcp-metrics"),
        (("--tcp-metrics", "--include", "read"), "--include goes with --syscall-stats"),
        (
            ("--cpu-profile", "-i", "1s"),
            "--interval goes with --syscall-stats, --tcp-metrics or --http-latency",
        ),
    ],
)
def test_a_flag_of_another_kind_is_a_usage_error(
    arguments: tuple[str, ...], text: str, requests: list[command.Request]
) -> None:
    done = tap("pid:7", *arguments)
    assert done.exit_code == 2
    assert text in done.output
    assert requests == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--events", "-c", "mode=summaries"), "--events and -c mode=summaries"),
        (("--events", "-c", "mode=events"), "--events and -c mode=events"),
        (("-f", "19", "-c", "frequency_hz=49"), "--frequency 19 and -c frequency_hz=49"),
        (("-c", "top=1", "-c", "top=2"), "-c top=1 and -c top=2"),
        (("-o", "yaml", "--json"), "--json and -o yaml"),
        (("--json", "-o", "table"), "--json and -o table"),
    ],
)
def test_an_option_that_is_given_twice_is_a_usage_error(
    arguments: tuple[str, ...], text: str, requests: list[command.Request]
) -> None:
    done = tap("pid:7", "--cpu-profile", *arguments)
    assert done.exit_code == 2
    assert f"give only one of {text}" in done.output
    assert requests == []


@pytest.mark.parametrize("words", [("--json",), ("-o", "json"), ("--json", "-o", "json")])
def test_both_ways_to_ask_for_json_are_one(
    words: tuple[str, ...], requests: list[command.Request]
) -> None:
    assert tap("pid:7", "--cpu-profile", *words).exit_code == 0
    assert requests[0].output == Output("json")


def test_no_kind_shows_single_events_of_a_session_of_summaries(
    requests: list[command.Request],
) -> None:
    having = [view for view in VIEWS.values() if EVENTS in view.flags]
    assert len(having) >= 3
    for view in having:
        done = tap("pid:7", view.flag, "--events", "-c", "mode=summaries", views=VIEWS)
        assert "give only one of --events and -c mode=summaries" in done.output
    assert requests == []


def test_the_commands_know_no_kind_by_its_name() -> None:
    sources = [*(ROOT / "cli/tap").glob("*.py"), *(ROOT / "cli/doctor").glob("*.py")]
    assert len(sources) > 6
    for source in (*sources, ROOT / "cli/common.py", ROOT / "cli/show.py"):
        text = source.read_text()
        for view in VIEWS.values():
            assert view.name not in text, source
            assert view.flag not in text, source
            assert f"KIND_{view.name.upper()}" not in text, source


def test_every_view_has_what_the_commands_ask_of_it() -> None:
    assert {VIEWS[kind].flag for kind in REAL} == set(FLAGS)
    flags: dict[str, Flag] = {}
    for view in VIEWS.values():
        assert view.provocation
        assert view.provocation.times > 0
        for flag in view.flags:
            assert flags.setdefault(flag.name, flag) is flag
            assert flag.key or flag.is_switch
            assert bool(flag.value) == bool(flag.key and flag.is_switch)


def test_a_kind_without_a_provocation_can_only_be_started_and_stopped() -> None:
    assert (UNKNOWN.times, UNKNOWN.code) == (0, "")
    assert UNKNOWN.count(Batch(pb.EbpfEventBatch(), np.empty(0))) == 0


TYPED = {
    "pid": "pid:999999", "top": "-c top=x", "include": "--include nosuch", "mode": "--events",
    "duration": "--duration 2h", "kind": "--tcp-metrics", "scope": "--host",
}  # fmt: skip


NOT_RUNNING = (
    "config[\"pid\"]: '{}' is not accepted; give the ids of processes that run now: 999999 does not"
)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            NOT_RUNNING.format("999999"),
            "pid:999999: there is no such process",
        ),
        (
            NOT_RUNNING.partition("give")[0]
            + "give the ids of processes: 13 is a thread of process 12",
            "pid:999999: 13 is a thread of process 12: give pid:12",
        ),
        (
            "config[\"top\"]: 'x' is not accepted; give a whole number from 0 to 10240",
            "-c top=x: give a whole number from 0 to 10240",
        ),
        (
            'config["top"]: "it\'s" is not accepted; give a whole number',
            "-c top=x: give a whole number",
        ),
        (
            "config[\"until_exit\"]: 'true' is not accepted; give it with pid only",
            "-c until_exit=true: give it with pid only",
        ),
        (
            'config["tpo"]: there is no such option (did you mean "top"?); accepted are pid, top',
            '-c tpo: there is no such option (did you mean "top"?); accepted are pid, top',
        ),
        (
            "duration: 120m is not accepted; give more than 0s and at most 5m, limits.max_duration",
            "--duration 2h: give more than 0s and at most 5m, limits.max_duration",
        ),
        (
            "config[\"scope\"]: 'host' is not allowed by this agent's policy.host_scope",
            "--host: not allowed by this agent's policy.host_scope",
        ),
        (
            "kind: tcp_metrics is not allowed by this agent's policy.collectors, cpu_profile",
            "--tcp-metrics: this agent's policy.collectors allows only cpu_profile",
        ),
        (
            "kind: 'x' is not accepted; give one of EBPF_COLLECTOR_KIND_TCP_METRICS (4)",
            "--tcp-metrics: give one of tcp_metrics (4)",
        ),
        ("service_name: no process belongs to 'x'", "no process belongs to 'x'"),
        ("collector_id: this agent knows no collector 'x'", "this agent knows no collector 'x'"),
        (
            "authorization: no token; send `authorization: Bearer TOKEN` with this agent's token",
            "a token is needed: set CORAL_TOKEN",
        ),
        (
            "authorization: the token is wrong; send `authorization: Bearer TOKEN`",
            "the token in CORAL_TOKEN is wrong",
        ),
        (
            "the agent at unix:/a b did not answer ListCollectors within 5 s",
            "the agent at unix:/a b accepts the connection and does not answer (waited 5 s)",
        ),
        ("limits.memory is 7 bytes; it takes 9", "limits.memory is 7 bytes; it takes 9"),
        ("syscall_stats: no loader (bcc: off)", "syscall_stats: no loader (bcc: off)"),
        ("no agent answers at unix:/x: start one", "no agent answers at unix:/x: start one"),
    ],
)
def test_a_refusal_is_in_the_words_that_the_user_typed(message: str, words: str) -> None:
    assert in_users_words(message, TYPED) == words


def test_of_several_processes_the_one_that_is_not_there_is_named() -> None:
    words = in_users_words(NOT_RUNNING.format("1,999999"), {"pid": "pid:1,999999"})
    assert words == "pid:1,999999: there is no process 999999"


def test_an_error_is_one_line_that_a_terminal_can_bear(capsys: pytest.CaptureFixture[str]) -> None:
    echo_error("no process is called \x1b[2Jx\nas far as\tI know")
    assert capsys.readouterr().err == ("coral: no process is called ?[2Jx; as far as?I know\n")


def test_a_duration_remembers_how_it_was_written() -> None:
    duration = DurationType().convert("2h", None, None)
    assert duration == 7200.0
    assert duration.text == "2h"
    with pytest.raises(click.UsageError, match="'soon' is not a duration"):
        DurationType().convert("soon", None, None)


@pytest.mark.parametrize(
    ("config", "helps"),
    [
        ({"pid": "1"}, "sample less often with --frequency or raise limits.cpu_percent in"),
        ({"mode": "events"}, "show figures, without --events, sample less often"),
        ({"scope": "host"}, "watch one service or process in place of --host, sample less often"),
    ],
)
def test_a_preempted_tap_says_what_would_help(
    config: dict[str, str], helps: str, requests: list[command.Request]
) -> None:
    assert tap("pid:7", "--cpu-profile").exit_code == 0
    request = command.Request(
        **{**vars(requests[0]), "config": config},
    )
    text = command._preempted(request, "limits.cpu_percent is 5; 7 % were used")
    assert text.startswith(
        "the agent ended this tap before its time: limits.cpu_percent is 5; 7 % "
    )
    assert helps in text
    assert re.search(r"in the agent's configuration$", text)


@pytest.mark.parametrize(
    ("target", "config", "options", "asked"),
    [
        ("pid:7", {}, {"until_exit": ""}, {"pid": "7", "until_exit": "true"}),
        ("pid:7", {"until_exit": "false"}, {"until_exit": ""}, {"pid": "7", "until_exit": "false"}),
        ("pid:7", {}, {"until_exit": "`false`: no pidfds"}, {"pid": "7"}),
        ("pid:7", {}, {"top": ""}, {"pid": "7"}),
        ("comm:make", {}, {"until_exit": ""}, {"comm": "make"}),
        ("nginx", {"pid": "7"}, {"until_exit": ""}, {"pid": "7"}),
    ],
)
async def test_a_tap_of_processes_by_id_ends_with_them_where_the_agent_can_do_that(
    target: str,
    config: dict[str, str],
    options: dict[str, str],
    asked: dict[str, str],
    tmp_path: Path,
) -> None:
    """OPTIONS are those of the agent's collector, each with what the agent refuses of it."""
    configs: list[dict[str, str]] = []

    async def can(_request: pb.GetCapabilitiesRequest, _context: Context) -> pb.EbpfCapabilities:
        accepted = [pb.CollectorOption(name=name, refused=no) for name, no in options.items()]
        answer = pb.EbpfCapabilities()
        answer.collectors.add(kind=REAL[0]).options.add(name="until_exit")
        answer.collectors.add(kind=TOY.kind, options=accepted)
        return answer

    async def start(
        request: pb.StartEbpfCollectorRequest, _context: Context
    ) -> pb.StartEbpfCollectorResponse:
        configs.append(dict(request.config))
        return pb.StartEbpfCollectorResponse(supported=False, error="no")

    named = command.parse_target(target, (), host=False)
    story = TOY.story(frozenset())
    async with peer(
        f"unix:{tmp_path}/agent.sock", GetCapabilities=can, StartCollector=start
    ) as address:
        request = command.Request(
            TOY, named, {**named.config, **config}, {}, story, None, address, Output()
        )
        assert await command._tap(request) == 1
    assert configs == [asked]
