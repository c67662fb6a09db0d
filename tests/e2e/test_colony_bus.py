"""A real agent, a colony that publishes, NATS JetStream, and a colony that stores: exact, whichever
of them is killed."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coral.colony.bus.consumer import Consumer
from coral.colony.store import Settings, Store
from coral.colony.tables import ContractRows
from tests.bus import nats_server, settings_for
from tests.colony import until
from tests.colony_process import running_colony, stored_in
from tests.events import connected, start_events
from tests.support import INSECURE, Puppet, RunningAgent, coral, running_agent, wait_until


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    directory = tmp_path_factory.mktemp("colony") / "agent"
    limits = {"subscriber_bytes_per_second": "1GiB", "cpu_percent": 1000}
    config = {"limits": limits, "auth": INSECURE}
    with running_agent(directory, config, "--listen", "127.0.0.1:0") as running:
        yield running


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.timeout(600)
async def test_every_event_is_stored_once_whichever_is_killed(
    agent: RunningAgent, rounds: int, tmp_path: Path
) -> None:
    chance, made = random.Random(rounds), 0
    with nats_server(tmp_path / "nats") as server, Puppet() as puppet:
        bus = {"servers": [server.url], "max_bytes": "256MiB"}
        follow = {
            "agents": {"addresses": [agent.address]}, "collect": [],
            "bus": {"mode": "publish", **bus},
        }  # fmt: skip
        store = {"collect": [], "bus": {"mode": "store", **bus}}

        def calls(seconds: float) -> int:
            counts = [2_000] * max(int(seconds * 10), 1)
            for count in counts:
                puppet.getppid(count)
                puppet.do("time.sleep(0.1)")
            return sum(counts)

        def life() -> int:
            with (
                running_colony(tmp_path / "follow", follow) as following,
                running_colony(tmp_path / "store", store) as storing,
            ):
                says_where_to_ask(tmp_path)
                count = calls(chance.uniform(0.2, 1.0))
                wait_until(lambda: following.total("coral_colony_received_rows_total") > 0)
                wait_until(lambda: storing.total("coral_colony_store_rows_total") > 0)
                server.kill()
                count += calls(chance.uniform(0.2, 0.5))
                server.start()
                count += calls(chance.uniform(0.2, 1.0))
                for colony in chance.sample((following, storing), 2):
                    colony.kill()
                    count += calls(0.1)
            return count

        def has_read_all() -> None:
            with running_colony(tmp_path / "follow", follow) as following:
                wait_until(
                    lambda: (
                        following.total("coral_colony_agents", state="followed") == 1
                        and not following.total("coral_colony_sessions")
                    ),
                    timeout_s=60,
                )
                assert following.stop() == 0

        async with connected(agent) as client:
            session = await start_events(client, puppet.pid, include="getppid")
            for _ in range(rounds):
                made += await asyncio.to_thread(life)
            await client.stop(session)
        await asyncio.to_thread(has_read_all)
        await read_to_the_end(server.url, tmp_path / "store" / "data", session)
    stored = await stored_in(tmp_path / "store")
    (standing,) = (it for it in stored.standings if it.session.collector_id == session)
    assert standing.ended
    assert standing.ended.reason == "stopped"
    assert standing.produced + sum(standing.lost_in_kernel.values()) == made
    assert standing.produced == standing.last_seq == standing.stored + sum(standing.lost.values())
    assert stored.rows[standing.session.key] == (standing.stored, standing.stored)


def says_where_to_ask(directory: Path) -> None:
    """The colony that publishes says who answers, and the one that stores says who collects."""
    for name, command, words in (
        ("follow", ("query", "agents"), "stores nothing: ask one with bus.mode store"),
        ("follow", ("query", "sql", "SELECT 1 FROM http_latency"), "stores nothing: ask one"),
        ("store", ("collect", "http_latency"), "follows no agents: collect by one with bus.mode"),
    ):
        told = subprocess.run(
            coral(*command, "--colony", f"unix:{directory}/{name}/colony.sock"),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert told.returncode, told.stdout
        assert words in " ".join(told.stderr.split())


async def read_to_the_end(url: str, directory: Path, session: str) -> None:
    """Reads the bus into the store of DIRECTORY until the end of SESSION is durable."""
    store: Any = Store(directory, Settings(), ContractRows())
    await store.start()
    reading = asyncio.create_task(Consumer(settings_for(url), store).run())

    def has_ended() -> bool:
        found = (it for it in store.standings() if it.session.collector_id == session)
        return reading.done() or any(it.ended for it in found)

    await until(has_ended, timeout_s=60)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await store.close()
