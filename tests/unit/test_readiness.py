"""Readiness: it is reported, and the watchdog is fed, whatever fails once."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from structlog.testing import capture_logs

from coral.agent.config import Continuous
from coral.agent.notify import Notifier
from coral.agent.serving.health import Readiness
from tests.scripted import Desk, until

WATCHDOG_S = 0.4


class Failing:
    """A server that fails to report a change once."""

    def __init__(self) -> None:
        self.reported: list[bool] = []
        self.fails = False

    def set_ready(self, *, ready: bool) -> None:
        if self.fails:
            self.fails = False
            raise RuntimeError("as gRPC may")
        self.reported.append(ready)


async def test_the_watchdog_is_fed_after_an_exception(tmp_path: Path) -> None:
    desk, server = Desk(None, Continuous(kind="syscall_stats")), Failing()
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.setblocking(False)
    loop, heard = asyncio.get_running_loop(), list[str]()
    loop.add_reader(manager, lambda: heard.append(manager.recv(4096).decode()))
    notifier = Notifier(
        {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6)),
        }
    )

    with capture_logs() as logged:
        async with desk.supervisor, Readiness(desk.supervisor).kept_up(server, notifier):
            await until(lambda: server.reported[-1:] == [True])
            server.fails = True
            (session,) = desk.supervisor.at_work()
            await desk.supervisor.stop(session.id)
            await until(lambda: not server.fails)
            fed = heard.count("WATCHDOG=1")
            await until(lambda: heard.count("WATCHDOG=1") >= fed + 3)
            assert server.reported == [False, True, False]
    loop.remove_reader(manager)
    manager.close()
    notifier.close()
    assert [line["task"] for line in logged if line["event"] == "unexpected failure"] == [
        "readiness"
    ]
