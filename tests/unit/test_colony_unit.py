"""The colony's systemd unit: it agrees with the colony's defaults, and with the agent's unit."""

from __future__ import annotations

import shlex
from pathlib import PurePosixPath
from typing import Final

from click.testing import CliRunner

from coral.cli.main import main
from coral.colony.config import Config
from tests.support import ROOT

UNITS: Final = ROOT / "deploy/systemd"
LANDLOCK: Final = {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"}


def lines_of(unit: str) -> dict[str, str]:
    """The settings of UNIT."""
    lines = (UNITS / f"{unit}.service").read_text().splitlines()
    return dict(it.split("=", 1) for it in lines if "=" in it and not it.startswith("#"))


def test_it_has_a_user_of_its_own_and_no_capability() -> None:
    lines = lines_of("coral-colony")
    assert lines["DynamicUser"] == "yes"
    assert lines["CapabilityBoundingSet"] == ""
    assert "AmbientCapabilities" not in lines


def test_its_directory_is_the_default_of_data() -> None:
    state = PurePosixPath("/var/lib", lines_of("coral-colony")["StateDirectory"])
    assert str(state) == Config().data


def test_its_socket_does_not_go_with_that_of_an_agent() -> None:
    lines = lines_of("coral-colony")
    words = shlex.split(lines["ExecStart"])
    socket = PurePosixPath(words[words.index("--listen") + 1].removeprefix("unix:"))
    assert socket.parent == PurePosixPath("/run", lines["RuntimeDirectory"])
    agents = PurePosixPath("/run", lines_of("coral-agent")["RuntimeDirectory"])
    assert agents not in socket.parents


def test_the_command_knows_its_flags() -> None:
    words = shlex.split(lines_of("coral-colony")["ExecStart"])
    said = CliRunner().invoke(main, ["colony", "--help"]).output
    for flag in (word for word in words if word.startswith("--")):
        assert flag in said


def test_processes_that_answer_sql_may_still_confine_themselves() -> None:
    assert set(lines_of("coral-colony")["SystemCallFilter"].split()) >= LANDLOCK
