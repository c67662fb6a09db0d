"""`coral colony` as its users run it: what it stores is exact, however often it is killed and its
connections are cut."""

from __future__ import annotations

import asyncio
import json
import platform
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.bus import nats_server
from tests.colony_process import RunningColony, running_colony, stored_in
from tests.events import connected, start_events
from tests.peer import cutting_proxy
from tests.support import INSECURE, Puppet, RunningAgent, coral, running_agent, wait_until

CONFIG: Final = {
    "limits": {"subscriber_bytes_per_second": "1GiB", "cpu_percent": 1000},
    "auth": INSECURE,
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    directory = tmp_path_factory.mktemp("colony") / "agent"
    with running_agent(directory, CONFIG, "--listen", "127.0.0.1:0") as running:
        yield running


def has_read_all(colony: RunningColony) -> bool:
    """Whether every session has ended for it."""
    return colony.total("coral_colony_agents", state="followed") == 1 and not colony.total(
        "coral_colony_sessions"
    )


async def exact_over(
    agent: RunningAgent, directory: Path, *, kills: int, cuts: int, seed: int
) -> None:
    """A colony that is killed KILLS times, and whose connections are cut CUTS times, stores every
    event of a session once, or says where it was lost."""
    chance, made, cut, killed = random.Random(seed), 0, 0, 0
    with Puppet() as puppet:
        async with (
            connected(agent) as client,
            cutting_proxy(agent.address, seed, (0.2, 2.0)) as proxy,
        ):
            session = await start_events(client, puppet.pid, include="getppid")
            config = {"agents": {"addresses": [proxy]}, "collect": []}

            def life(*, last: bool) -> None:
                nonlocal made, cut, killed
                with running_colony(directory, config) as colony:
                    lives_s = chance.uniform(0.2, 3.0)
                    for _ in range(max(int(lives_s * 10), 1)):
                        made += 2_000
                        puppet.getppid(2_000)
                        puppet.do("time.sleep(0.1)")
                    wait_until(lambda: colony.total("coral_colony_received_rows_total") > 0, 60)
                    cut += int(colony.total("coral_colony_failures_total"))
                    if not last:
                        colony.kill()
                        killed += 1
                        made += 500
                        puppet.getppid(500)

            while killed < kills or cut < cuts:
                await asyncio.to_thread(life, last=False)
            await client.stop(session)

        def end() -> None:
            with running_colony(
                directory, {"agents": {"addresses": [agent.address]}, "collect": []}
            ) as colony:
                wait_until(lambda: has_read_all(colony), timeout_s=60)
                assert colony.stop() == 0

        await asyncio.to_thread(end)
    stored = await stored_in(directory)
    (standing,) = (it for it in stored.standings if it.session.collector_id == session)
    assert standing.ended
    assert standing.ended.reason == "stopped"
    assert standing.produced + sum(standing.lost_in_kernel.values()) == made
    assert standing.produced == standing.last_seq == standing.stored + sum(standing.lost.values())
    assert stored.rows[standing.session.key] == (standing.stored, standing.stored)


async def test_a_colony_that_is_killed_and_cut_stores_every_event_once(
    agent: RunningAgent, tmp_path: Path
) -> None:
    await exact_over(agent, tmp_path, kills=2, cuts=1, seed=1)


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_twenty_kills_and_twenty_cuts(agent: RunningAgent, tmp_path: Path) -> None:
    await exact_over(agent, tmp_path, kills=20, cuts=20, seed=2)


def test_a_colony_says_how_it_is_and_ends_in_order(agent: RunningAgent, tmp_path: Path) -> None:
    with Puppet() as puppet:
        config = {
            "agents": {"addresses": [agent.address, "127.0.0.1:1"]},
            "collect": [{"kind": "syscall_stats", "config": {"pid": puppet.pid, "interval": "1s"}}],
        }
        with running_colony(tmp_path, config) as colony:
            wait_until(lambda: colony.page("/readyz") == (200, "ready\n"), 60)
            assert colony.page("/healthz") == (200, "ok\n")
            assert colony.page("/nothing") == (404, "there are /metrics, /healthz, /readyz\n")
            wait_until(lambda: colony.total("coral_colony_started_total") == 1, 60)
            wait_until(lambda: colony.total("coral_colony_sessions") == 1, 60)
            assert colony.total("coral_colony_agents", state="followed") == 1
            assert colony.total("coral_colony_agents", state="away") == 1
            assert colony.total("coral_colony_missing_collectors") == 0
            python = platform.python_version()
            assert colony.total("coral_colony_build_info", python=python) == 1
            puppet.getppid(10)
            wait_until(lambda: colony.total("coral_colony_store_rows_total") > 0, 60)
            assert colony.stop() == 0
            events = [line["event"] for line in colony.log()]
            assert events[:2] == ["starting", "listening"]
            assert events[-2:] == ["stopping", "stopped"]
            (away,) = (line for line in colony.log() if line["event"] == "agent is away")
            assert away["address"] == "127.0.0.1:1"
            assert "refused" in away["reason"]


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with running_colony(tmp_path, {"collect": []}) as colony:
        (warned,) = (line for line in colony.log() if line["level"] == "warning")
        assert warned["event"].startswith("no agents are configured")
        colony.process.send_signal(signal.SIGTERM)
        colony.process.send_signal(signal.SIGTERM)
        assert colony.process.wait(10) in (0, 128 + signal.SIGTERM)


def test_a_directory_has_one_colony(tmp_path: Path) -> None:
    with running_colony(tmp_path, {"collect": []}):
        second = subprocess.run(
            coral("colony", "--data", tmp_path / "data", "--metrics", ""),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert second.returncode == 2
    (_, said) = second.stderr.splitlines()
    assert "has this directory open; give each colony a directory of its own" in said


def test_a_bad_configuration_ends_it_with_one_line() -> None:
    ended = subprocess.run(
        coral("colony", "--agents", "nowhere"),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr == (
        "coral colony: --agents: agents.addresses[0]: 'nowhere' is not accepted; give HOST:PORT, "
        "or unix:PATH\n"
    )


def test_a_colony_publishes_what_another_one_stores_and_answers(
    agent: RunningAgent, tmp_path: Path
) -> None:
    with nats_server(tmp_path / "nats") as bus, Puppet() as puppet:
        publishing = {
            "agents": {"addresses": [agent.address]},
            "bus": {"mode": "publish", "servers": [bus.url], "max_bytes": "256MiB"},
            "collect": [{"kind": "syscall_stats", "config": {"pid": puppet.pid, "interval": "1s"}}],
        }
        storing = {"bus": {"mode": "store", "servers": [bus.url]}}
        with (
            running_colony(tmp_path / "publishing", publishing) as publisher,
            running_colony(tmp_path / "storing", storing) as store,
        ):
            wait_until(lambda: publisher.total("coral_colony_started_total") == 1, 60)
            puppet.getppid(77)
            wait_until(lambda: calls_answered(store, puppet.pid) == 77, 60)
            assert publisher.page("/readyz")[0] == store.page("/readyz")[0] == 200
            assert not (tmp_path / "publishing/data").exists()
            assert publisher.stop() == store.stop() == 0


def calls_answered(colony: RunningColony, pid: int) -> int:
    """How often that process called getppid, as `coral query sql` says. Sessions of earlier tests
    on the same agent are stored, too."""
    calls = f"syscall_stats WHERE syscall = 'getppid' AND pid = {pid}"
    answer = subprocess.run(
        coral(
            "query", "sql", "--colony", f"unix:{colony.directory}/colony.sock", "-o", "json",
            f"SELECT sum(call_count)::BIGINT AS calls FROM {calls}",
        ),
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    (row, *_) = map(json.loads, answer.stdout.splitlines())
    return int(row["calls"] or 0)


def test_a_colony_whose_bus_does_not_answer_ends_at_a_signal(tmp_path: Path) -> None:
    config = {"bus": {"mode": "publish", "servers": ["nats://127.0.0.1:1"]}, "collect": []}
    path = tmp_path / "colony.yaml"
    path.write_text(yaml.safe_dump(config))
    with subprocess.Popen(
        coral("colony", "--config", path, "--log-format", "json"), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        assert json.loads(process.stderr.readline())["event"] == "starting"
        process.terminate()
        assert process.wait(60) == 0
