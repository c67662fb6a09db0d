"""The Debian package in a Debian 12 with systemd: installed, started, confined, replaced by a newer
one, removed.

The agent is in a pid namespace there, so no collector can run; what they need of the unit is tested
in test_privileges.py, on the machine itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.containers import CACHE as IMAGE_CACHE
from tests.debian import Machine, debian, root_for
from tests.support import ROOT, wait_until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]  # it may have to make the Debian first

UNIT: Final = "coral-agent.service"
CONFIGURATION: Final = "/etc/coral/agent.yaml"
MOST_EXPOSURE: Final = 3.0  # of systemd-analyze: from 0, confined, to 10
CAPABILITIES: Final = 0x1C400084004  # the seven of the unit
# What collectors use on every kernel that the project is tested on: the sandbox lets it by.
FEATURES: Final = {
    *("tp_btf", "raw_tp", "iterator", "cpu_clock", "ring_buffer", "task_storage", "batch"),
    *("session_maps", "pidfd", "sock_diag", "others_listeners"),
}
PLACES: Final = ("/etc", "/lib/systemd", "/run", "/usr", "/var")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package, and with one that differs from it in its version alone."""
    directory = tmp_path_factory.mktemp("packages")
    command = (sys.executable, "-P", "-m", "deploy.image", "deb", "--output", directory)
    keys = ("--key", directory / "key.pem", "--cache", IMAGE_CACHE)
    subprocess.run([*command, *keys], cwd=ROOT, check=True, capture_output=True)
    (old,) = directory.glob("*.deb")
    tree = directory / "newer"
    subprocess.run(["dpkg-deb", "--raw-extract", old, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub("(?m)^(Version: .*)$", r"\1+newer", control.read_text()))
    build = ("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree)
    subprocess.run([*build, directory / "newer.deb"], check=True, capture_output=True)
    old.rename(directory / "old.deb")
    return directory


@pytest.fixture(scope="module")
def machine(packages: Path) -> Iterator[Machine]:
    with debian(root_for(packages / "old.deb"), packages) as booted:
        yield booted


def install(machine: Machine, name: str) -> str:
    return machine.says("apt-get", "--yes", "install", f"/packages/{name}.deb")


def left_by(machine: Machine) -> set[str]:
    """The paths of this machine that have the agent's name."""
    named = ("-iname", "*coral*", "-not", "-path", "*/zoneinfo/*")
    return set(machine.says("find", *PLACES, "-xdev", *named, "-prune").splitlines())


def state(machine: Machine) -> str:
    return machine.shown(UNIT, "ActiveState")["ActiveState"]


# The tests of this file are one story: each begins where the one before has ended.


def test_installing_it_starts_nothing(machine: Machine) -> None:
    assert not left_by(machine)
    install(machine, "old")
    assert state(machine) == "inactive"
    assert machine.run("systemctl", "is-enabled", UNIT, check=False).stdout == "disabled\n"
    assert {"/etc/coral", "/lib/systemd/system/coral-agent.service", "/usr/bin/coral"} <= (
        left_by(machine)
    )


def test_it_is_active_once_it_listens_and_answers_root_alone(machine: Machine) -> None:
    machine.run("systemctl", "enable", "--now", UNIT)
    told = machine.shown(UNIT, "ActiveState", "Type", "StatusText", "WatchdogUSec")
    assert told == {
        "ActiveState": "active", "Type": "notify", "StatusText": "ready", "WatchdogUSec": "30s",
    }  # fmt: skip
    # No wait: it listens.
    capabilities = machine.says("coral", "capabilities")
    assert re.match(r"agent \S+ \d\S*, kernel \d", capabilities)
    assert set(re.findall(r"(?m)^(\w+) +yes ", capabilities)) >= FEATURES
    assert machine.says("coral", "collectors") == "no collector is running"
    nobody = ("runuser", "--user", "nobody", "--", "coral", "collectors")
    refused = machine.run(*nobody, check=False)
    assert refused.returncode == 1
    assert "permission denied" in refused.stderr.lower()


def test_it_has_seven_capabilities_and_a_sandbox(machine: Machine) -> None:
    pid = machine.shown(UNIT, "MainPID")["MainPID"]
    status = dict(re.findall(r"(?m)^(\w+):\s+(.*)$", machine.says("cat", f"/proc/{pid}/status")))
    assert [int(status[f"Cap{name}"], 16) for name in ("Prm", "Eff", "Bnd")] == [CAPABILITIES] * 3
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    uids = {int(it) for it in status["Uid"].split()}
    assert len(uids) == 1
    assert min(uids) >= 61184  # the first of DynamicUser=, systemd.exec(5)
    inside = ("nsenter", "--target", pid, "--mount", "touch")
    for path in ("/etc/coral/a", "/usr/a", "/root/a", "/sys/fs/cgroup/a"):
        done = machine.run(*inside, path, check=False)
        assert "Read-only file system" in done.stderr, (path, done.stderr)
    said = machine.says("systemd-analyze", "security", "--no-pager", UNIT).splitlines()[-1]
    print(said)
    (exposure,) = re.findall(r"exposure level for coral-agent.service: (\d+\.\d) ", said)
    assert float(exposure) <= MOST_EXPOSURE


def test_one_that_was_killed_is_started_again(machine: Machine) -> None:
    before = machine.shown(UNIT, "MainPID")["MainPID"]
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", UNIT)

    def is_another() -> bool:
        told = machine.shown(UNIT, "ActiveState", "MainPID")
        return told["ActiveState"] == "active" and told["MainPID"] not in ("0", before)

    wait_until(is_another, 60)


def test_an_upgrade_keeps_the_configuration_and_restarts_it(machine: Machine) -> None:
    machine.run("sh", "-c", f"echo 'agent_id: kept' >>{CONFIGURATION}; systemctl restart {UNIT}")
    written = machine.says("cat", CONFIGURATION)
    before = machine.shown(UNIT, "MainPID")["MainPID"]
    install(machine, "newer")
    versions = machine.says("dpkg-query", "--show", "--showformat=${Version}", "coral-agent")
    assert versions.endswith("+newer")
    assert machine.says("cat", CONFIGURATION) == written
    told = machine.shown(UNIT, "ActiveState", "MainPID")
    assert told["ActiveState"] == "active"
    assert told["MainPID"] != before
    assert machine.says("coral", "capabilities").startswith("agent kept ")
    # And back to the one before.
    machine.run("apt-get", "--yes", "--allow-downgrades", "install", "/packages/old.deb")
    assert state(machine) == "active"
    assert machine.says("cat", CONFIGURATION) == written


def test_a_key_that_is_unknown_stops_it_with_a_line_that_names_the_key(machine: Machine) -> None:
    machine.run("sh", "-c", f"echo 'limts: {{}}' >>{CONFIGURATION}")
    assert machine.run("systemctl", "restart", UNIT, check=False).returncode != 0
    assert state(machine) != "active"
    told = machine.says("journalctl", "--no-pager", "--output=cat", "--unit", UNIT)
    assert f"{CONFIGURATION}: limts: no such key; did you mean `limits`?" in told
    machine.run("sed", "-i", "/^limts/d", CONFIGURATION)
    machine.run("systemctl", "reset-failed", UNIT)
    machine.run("systemctl", "start", UNIT)


def test_removed_it_is_stopped_and_purged_it_leaves_nothing(machine: Machine) -> None:
    machine.run("apt-get", "--yes", "remove", "coral-agent")
    assert state(machine) == "inactive"
    assert machine.says("cat", CONFIGURATION).endswith("agent_id: kept")
    assert not machine.run("pgrep", "--full", "coral", check=False).stdout
    machine.run("apt-get", "--yes", "purge", "coral-agent")
    assert not left_by(machine)
    assert not machine.says("systemctl", "list-units", "--all", "--plain", "--no-legend", UNIT)
