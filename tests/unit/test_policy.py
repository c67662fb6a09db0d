"""What a policy allows, decided on what a request resolved to; a few of the rules need numbers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from coral.agent.access import policy as rules
from coral.agent.config import Policy
from coral.agent.errors import DeniedError
from coral.collectors.contract import ServiceProcesses, Watched
from coral.collectors.options import parse_options
from coral.collectors.procfs import start_time_of, watchable
from coral.collectors.syscall_stats.collector import SyscallStatsOptions
from coral.collectors.targets import Targets

NO_HOST = Policy(host_scope=False)


def users() -> list[int]:
    """Every user process of this machine but process 1 and this one."""
    return [tgid for tgid in watchable() if tgid not in (1, os.getpid())]


@pytest.fixture
def sleepers() -> Iterator[list[int]]:
    """Enough processes that a tenth is more than those that come and go meanwhile."""
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(100)]
    yield [process.pid for process in processes]
    for process in processes:
        process.kill()
        process.wait()


def test_nine_tenths_of_the_user_processes_are_the_machine(sleepers: list[int]) -> None:
    everybody = users()
    most = tuple(everybody[: int(len(everybody) * 0.95)])
    with pytest.raises(DeniedError, match=r"policy\.host_scope: this is 9\d% of the machine's"):
        rules.check(Watched(most), None, NO_HOST)
    rules.check(Watched(most), None, Policy())
    rules.check(Watched(tuple(everybody[: int(len(everybody) * 0.8)])), None, NO_HOST)
    rules.check(Watched(tuple(sleepers[:8])), None, NO_HOST)


@pytest.mark.usefixtures("sleepers")
def test_a_service_that_is_the_machine_is_refused_unless_it_is_listed() -> None:
    most = tuple(users())
    shop = ServiceProcesses("shop", most)
    with pytest.raises(DeniedError, match="service_name: 'shop' is not allowed by this agent's"):
        rules.check(Watched(most), shop, NO_HOST)
    rules.check(Watched(most), shop, Policy(host_scope=False, services=("sh*",)))


def test_a_service_is_watched_without_the_agent_and_process_1() -> None:
    service = ServiceProcesses("shop", (1, 17, os.getpid()))
    assert rules.spare(service, Policy()).tgids == (17,)
    assert rules.spare(service, Policy(allow_init=True)).tgids == (1, 17)
    both = Policy(allow_init=True, allow_agent=True)
    assert rules.spare(service, both).tgids == service.tgids


class Members:
    """Takes what is written to the kernel's map of a session's processes."""

    def __init__(self) -> None:
        self.written: list[int] = []

    def write(self, tgid: int, _member: object) -> None:
        self.written.append(tgid)


def test_a_process_id_that_went_to_another_process_meanwhile_is_not_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = parse_options(SyscallStatsOptions, {"pid": f"{os.getpid()},{os.getppid()}"})
    targets, members, hinted = Targets(options, None), Members(), list[int]()
    monkeypatch.setattr(
        "coral.collectors.targets.start_time_of",
        lambda tgid: (start_time_of(tgid) or 0) + (tgid == os.getppid()),
    )
    slot: Any = SimpleNamespace(
        map=lambda _name: members,
        activate=lambda **_: None,
        hint=hinted.extend,
        members_changed=lambda: None,
    )
    targets.follow(slot, detailed=False)
    targets.fill()
    assert members.written == hinted == [os.getpid()]


def test_a_start_time_tells_processes_apart() -> None:
    first = start_time_of(os.getpid())
    assert first
    with subprocess.Popen(["sleep", "600"]) as process:
        later = start_time_of(process.pid)
        process.kill()
    assert later
    assert later > first
    assert start_time_of(process.pid) is None
