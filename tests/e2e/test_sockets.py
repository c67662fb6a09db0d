"""Two unix sockets: one for the owner, one that a group may open, each known by its name."""

from __future__ import annotations

import grp
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.e2e.test_refusals import refused_start
from tests.support import running_agent

NOBODY: Final = 65534
GROUP: Final = grp.getgrnam("games")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs users of several kinds")


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that every user may enter."""
    with tempfile.TemporaryDirectory(prefix="coral-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def connects(path: Path, user: int, groups: tuple[int, ...]) -> bool:
    """Whether a process of USER in GROUPS may open the socket."""
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
    ran = subprocess.run(
        [os.path.realpath(sys.executable), "-I", "-S", "-c", code],
        user=user, group=NOBODY if user else 0, extra_groups=groups, cwd="/", env={},
        capture_output=True, check=False,
    )  # fmt: skip
    return ran.returncode == 0


@pytest.mark.parametrize("user", ["", "nobody"])
def test_a_group_may_open_one_socket_and_not_the_other(user: str, directory: Path) -> None:
    admin, view = directory / "run/admin.sock", directory / "run/view.sock"
    listen = [f"unix:{admin}", f"unix:{view}?mode=0660&group={GROUP.gr_name}"]
    config = {"listen": listen, **({"user": user} if user else {})}
    with running_agent(directory / "agent", config) as agent:
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        assert line["grpc"] == [f"unix:{admin}", f"unix:{view}"]
        assert [path.stat().st_mode & 0o777 for path in (admin, view)] == [0o600, 0o660]
        assert view.stat().st_gid == GROUP.gr_gid
        users = {"root": (0, ()), "member": (1, (GROUP.gr_gid,)), "stranger": (1, ())}
        may = {
            name: [connects(path, *who) for path in (admin, view)] for name, who in users.items()
        }
        assert may == {
            "root": [True, True], "member": [False, True], "stranger": [False, False],
        }  # fmt: skip
        agent.stop()
    assert not admin.exists()
    assert not view.exists()


def test_a_socket_that_makes_admins_of_others_is_told(directory: Path) -> None:
    everyone, group = directory / "run/all.sock", directory / "run/group.sock"
    listen = [
        f"unix:{everyone}?mode=0666&name=admin",
        f"unix:{group}?mode=0660&group=games&name=ops",
        f"unix:{directory}/run/view.sock?mode=0666",
        f"unix:{directory}/run/admin.sock",
    ]
    config = {"listen": listen, "roles": [{"role": "admin", "to": ["socket:ops"]}]}
    rest = "may do everything; give it mode=0600, or another name and a lesser role"
    admin = "has the role admin"
    expected = [
        f"listen: unix:{everyone} has mode 0666, and socket:admin {admin}: every local user {rest}",
        f"listen: unix:{group} has mode 0660, and socket:ops {admin}: the group games {rest}",
    ]
    with running_agent(directory / "agent", config) as agent:
        agent.address = f"unix:{directory}/run/admin.sock"
        told = agent.call("GetCapabilities", pb.GetCapabilitiesRequest()).warnings
        assert list(told) == expected
        lines = [line for line in agent.log() if line["event"] == "others may use this agent"]
        assert [line["problem"] for line in lines] == expected
        assert {line["level"] for line in lines} == {"warning"}


def test_a_group_that_is_not_there_is_refused(directory: Path) -> None:
    told = refused_start(directory, "--listen", f"unix:{directory}/a.sock?mode=0660&group=nosuch")
    assert told == (
        f"coral agent: listen: unix:{directory}/a.sock: this machine has no group 'nosuch'"
    )
