"""The colony follows real agents: every event of every session is in exactly one place, however
connections break, agents die and colonies start again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from coral.client import Kind
from coral.colony.agents import connecting
from coral.colony.config import Agents, AgentsTls
from coral.colony.delivery import AGENT_LOST
from coral.colony.follow import visit
from coral.colony.follow.status import State
from coral.colony.follow.wanted import Wanted
from tests.certificates import Authority, put
from tests.colony import Shelf, ended, following, until
from tests.events import connected, start_events
from tests.peer import cutting_proxy
from tests.support import INSECURE, Calls, Puppet, RunningAgent, running_agent

CONFIG: Final = {
    "limits": {
        "concurrent_collectors": 10,
        "subscriber_bytes_per_second": "1GiB",
        "cpu_percent": 1000,
        "replay_bytes": "1MiB",
    },
    "auth": INSECURE,
}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    directory = tmp_path_factory.mktemp("colony") / "agent"
    with running_agent(directory, CONFIG, "--listen", "127.0.0.1:0") as running:
        yield running


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as running:
        yield running


def stats(puppet: Puppet, **config: str) -> Wanted:
    """`syscall_stats` of the process."""
    wanted = {"pid": str(puppet.pid), "interval": "100ms", **config}
    return Wanted(Kind.of("syscall_stats"), config=wanted)


def calls_stored(shelf: Shelf, name: str) -> int:
    """How often the system call of that name was counted in all that is kept."""
    count = 0
    for deliveries in shelf.kept.values():
        for batch in (it.batch for it in deliveries if it.batch):
            of_name = batch.strings[batch.columns["syscall"]] == name
            count += int(batch.columns["call_count"][of_name].sum())
    return count


async def test_what_is_wanted_is_started_once_and_adopted_by_the_next_colony(
    agent: RunningAgent, puppet: Puppet
) -> None:
    shelf, wanted = Shelf(), stats(puppet)
    async with following(shelf, agent.address, wanted=[wanted]) as fleet:
        await until(lambda: not fleet.missing())
        puppet.getppid(1_000)
        await until(lambda: calls_stored(shelf, "getppid") == 1_000)
        assert fleet.counts.started == {"syscall_stats": 1}
        assert fleet.missing() == {}
    puppet.getppid(500)
    async with following(shelf, agent.address, wanted=[wanted]) as fleet:
        await until(lambda: calls_stored(shelf, "getppid") == 1_500)
        assert fleet.counts.started == {}
        (standing,) = shelf.standings()
        collector_id = standing.session.collector_id
        (asked,) = [await fleet.stop(standing.session.agent_id, collector_id)]
        assert not asked.error
        await until(lambda: ended(shelf.of(collector_id)))
        last = shelf.of(collector_id)
        assert last
        assert last.ended
        assert last.ended.reason == "stopped"
        assert last.produced == last.last_seq == last.stored
        # It is wanted still, so another one follows.
        await until(lambda: len(shelf.standings()) == 2)


async def test_every_call_is_in_one_place_over_connections_that_are_cut(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    shelf, running = Shelf(), calls("getppid", 1_000_000, threads=2)
    async with (
        connected(agent) as client,
        cutting_proxy(agent.address, 7, (0.02, 0.1), longer_by=1.03) as proxy,
        following(shelf, proxy) as fleet,
    ):
        session = await start_events(
            client, running.pid, include="getppid", until_exit="true", ring="256KiB"
        )
        running.go()
        await until(lambda: ended(shelf.of(session)), 90)
        assert fleet.counts.failures > 2
    standing = shelf.of(session)
    assert standing
    assert standing.produced == standing.stored + sum(standing.lost.values())
    assert standing.produced + sum(standing.lost_in_kernel.values()) == 2_000_000
    assert standing.ended
    assert standing.ended.reason == "target_exited"


async def test_a_session_that_its_agent_took_along_ends_as_lost_and_the_next_agent_is_followed(
    puppet: Puppet, tmp_path: Path
) -> None:
    shelf, wanted = Shelf(), stats(puppet)
    with running_agent(tmp_path / "agent", CONFIG) as first:
        async with following(shelf, first.address, wanted=[wanted]) as fleet:
            await until(lambda: not fleet.missing())
            puppet.getppid(100)
            await until(lambda: calls_stored(shelf, "getppid") == 100)
            first.process.kill()
            first.process.wait()
            await until(lambda: fleet.statuses[0].state is State.AWAY)
            (lost,) = shelf.standings()
            assert not lost.ended
            with running_agent(tmp_path / "agent", CONFIG) as second:
                assert second.address == first.address
                collector_id = lost.session.collector_id
                await until(lambda: ended(shelf.of(collector_id)))
                await until(lambda: len(shelf.standings()) == 2 and not fleet.missing())
                puppet.getppid(50)
                await until(lambda: calls_stored(shelf, "getppid") == 150)
    closed = shelf.of(collector_id)
    assert closed
    assert closed.ended
    assert closed.ended.reason == AGENT_LOST
    assert closed.stored == closed.last_seq == closed.produced == lost.last_seq
    (gap,) = shelf.gaps
    assert gap.agent_id == closed.session.agent_id
    assert gap.from_ns < gap.to_ns


async def test_an_agent_that_ends_in_order_has_its_last_rows_stored(
    puppet: Puppet, tmp_path: Path
) -> None:
    shelf = Shelf()
    wanted = stats(puppet, interval="60s")
    with running_agent(tmp_path / "agent", CONFIG) as agent:
        async with following(shelf, agent.address, wanted=[wanted]):
            await until(shelf.standings)
            puppet.getppid(321)
            agent.process.terminate()
            await until(lambda: ended(shelf.standings()[0]))
    (standing,) = shelf.standings()
    assert standing.ended
    assert standing.ended.reason == "agent_shutdown"
    assert calls_stored(shelf, "getppid") == 321
    assert standing.produced == standing.stored


async def test_a_follower_reads_on_only_while_there_is_room(
    agent: RunningAgent, calls: Callable[..., Calls]
) -> None:
    shelf, running = Shelf(), calls("getppid", 50_000)
    async with connected(agent) as client, following(shelf, agent.address):
        session = await start_events(client, running.pid, include="getppid", until_exit="true")
        await until(lambda: shelf.of(session))
        shelf.open.clear()
        running.go()
        running.finish()
        at_rest = shelf.of(session)
        assert at_rest
        assert at_rest.last_seq < 50_000
        shelf.open.set()
        await until(lambda: ended(shelf.of(session)))
    standing = shelf.of(session)
    assert standing
    assert standing.produced == standing.stored + sum(standing.lost.values()) == 50_000


class Lingering(Shelf):
    """Whoever waits for room, and is cancelled, leaves when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.leaving, self.let_go = asyncio.Event(), asyncio.Event()

    async def room(self) -> None:
        try:
            await super().room()
        except asyncio.CancelledError:
            self.leaving.set()
            await self.let_go.wait()
            raise


async def test_a_fleet_that_ends_while_a_connection_does_ends(
    tmp_path: Path, calls: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "_LAST_WORDS_S", 0.1)
    shelf, running = Lingering(), calls("getppid", 1_000)
    with running_agent(tmp_path / "agent", CONFIG) as agent:
        async with asyncio.timeout(60), following(shelf, agent.address):
            async with connected(agent) as client:
                session = await start_events(client, running.pid, include="getppid")
            await until(lambda: shelf.of(session))
            shelf.open.clear()
            running.go()
            await until(lambda: (it := shelf.of(session)) and it.last_seq)
            agent.process.kill()
            await shelf.leaving.wait()
            # The fleet ends first.
            asyncio.get_running_loop().call_later(0.1, shelf.let_go.set)


async def test_an_agent_at_two_addresses_is_followed_at_one(agent: RunningAgent) -> None:
    port = agent.address.rpartition(":")[2]
    async with following(Shelf(), agent.address, f"localhost:{port}") as fleet:
        states = sorted(status.state.value for status in fleet.statuses)
        assert states == ["followed", "refused"]
        (why,) = (status.why for status in fleet.statuses if status.why)
        assert "has two addresses, or two agents have the same agent_id" in why


async def test_what_an_agent_refuses_is_told_in_its_words(agent: RunningAgent) -> None:
    wanted = Wanted(Kind.of("syscall_stats"), "nobody-here", {"interval": "1s"})
    async with following(Shelf(), agent.address, wanted=[wanted]) as fleet:
        await until(lambda: fleet.counts.refused)
        (missing,) = fleet.missing().values()
        assert missing.keys() == {"syscall_stats nobody-here"}
        assert "nobody-here" in missing["syscall_stats nobody-here"]
        (asked,) = await fleet.collect("syscall_stats", config={"pid": "0"})
        assert "config" in asked.error
        (unknown,) = await fleet.collect("syscall_stats", agents=["elsewhere"])
        assert unknown.error == "agent 'elsewhere' is not known"


async def test_what_is_asked_for_outlives_the_agents_lease_and_ends_when_it_is_stopped(
    agent: RunningAgent, puppet: Puppet
) -> None:
    shelf, config = Shelf(), {"pid": str(puppet.pid), "interval": "100ms"}

    async with connected(agent) as client:

        async def expires_ns(session: str) -> int:
            infos = {it.collector_id: it for it in await client.collectors()}
            return infos[session].expires_at_ns or 0

        async with following(shelf, agent.address) as fleet:
            (asked,) = await fleet.collect("syscall_stats", config=config, duration_s=650.0)
            began_s, began_ns = time.monotonic(), await expires_ns(asked.collector_id)
            await fleet.renew(began_s + 90.0)
            assert await expires_ns(asked.collector_id) == began_ns
            await fleet.renew(began_s + 110.0)
            renewed_ns = await expires_ns(asked.collector_id)
            assert renewed_ns > began_ns
            assert fleet.kept
            await fleet.renew(began_s + 400.0)  # of which 250 s are left
            assert renewed_ns - 60 * 10**9 < await expires_ns(asked.collector_id) < renewed_ns
            assert not fleet.kept
            (other,) = await fleet.collect("syscall_stats", config=config, duration_s=650.0)
            (short,) = await fleet.collect("syscall_stats", config=config, duration_s=30.0)
            assert len(fleet.kept) == 1
            assert not (await fleet.stop(other.agent_id, other.collector_id)).error
            assert not fleet.kept
            await until(lambda: ended(shelf.of(other.collector_id)))
            (again,) = await fleet.collect("syscall_stats", config=config, duration_s=650.0)
            last_ns = await expires_ns(again.collector_id)
        # Another life of the colony follows it, and lets its lease run out.
        async with following(shelf, agent.address) as fleet:
            await until(lambda: shelf.of(again.collector_id))
            await fleet.renew(time.monotonic() + 250.0)
            assert await expires_ns(again.collector_id) == last_ns
            for each in (asked, short, again):
                await fleet.stop(each.agent_id, each.collector_id)


async def test_what_is_asked_for_is_not_renewed_after_its_agent_has_lost_it(
    tmp_path: Path, puppet: Puppet
) -> None:
    address, config, now_s = f"unix:{tmp_path}/a.sock", {"pid": str(puppet.pid)}, time.monotonic()
    async with following(Shelf(), address) as fleet:

        def is_(state: State) -> bool:
            return fleet.statuses[0].state is state

        with running_agent(tmp_path, CONFIG, "--listen", address) as agent:
            await until(lambda: is_(State.FOLLOWED))
            one, two = [
                (await fleet.collect("syscall_stats", config=config, duration_s=650.0))[0]
                for _ in range(2)
            ]
            agent.process.kill()
            await until(lambda: is_(State.AWAY))
        stopped = await fleet.stop(one.agent_id, one.collector_id)
        assert stopped.error.endswith("it is not renewed any more, and ends within 300 s")
        await fleet.renew(now_s + 200.0)
        assert len(fleet.kept) == 1
        with running_agent(tmp_path, CONFIG, "--listen", address):
            await until(lambda: is_(State.FOLLOWED))
            await fleet.renew(now_s + 210.0)
            assert not fleet.kept
            assert (await fleet.stop(two.agent_id, two.collector_id)).error


async def test_an_agent_is_followed_over_tls_with_a_certificate_and_a_token_that_changes(
    puppet: Puppet, tmp_path: Path
) -> None:
    authority = Authority()
    ca = str(authority.write(tmp_path / "ca.crt"))
    certificate, key = map(str, authority.sign("127.0.0.1").write(tmp_path, "server"))
    own, own_key = map(str, authority.sign(subject=None).write(tmp_path, "colony"))
    token, known = tmp_path / "token", tmp_path / "known"
    put(known, b"0123456789abcdef", 0o600)
    put(token, b"a-token-of-another", 0o600)
    config = {
        **CONFIG,
        "tls": {"certificate": certificate, "key": key, "client_ca": ca},
        "auth": {"token_file": str(known)},
        "listen": ["127.0.0.1:0"],
    }
    told = Agents(tls=AgentsTls(ca=ca, certificate=own, key=own_key), token_file=str(token))
    with running_agent(tmp_path / "agent", config) as agent:
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        address: str = line["grpc"][0]  # type: ignore[index]
        connect = connecting(told)
        async with following(Shelf(), address, connect=connect) as fleet:
            (status,) = fleet.statuses
            assert status.state is State.REFUSED
            assert "authorization" in status.why
        token.unlink()
        async with following(Shelf(), address, connect=connect) as fleet:
            (status,) = fleet.statuses
            assert status.why == f"agents.token_file: {token}: No such file or directory"
        put(token, b"0123456789abcdef\n", 0o600)
        shelf = Shelf()
        async with following(shelf, address, wanted=[stats(puppet)], connect=connect) as fleet:
            await until(lambda: not fleet.missing())
            puppet.getppid(10)
            await until(lambda: calls_stored(shelf, "getppid") == 10)
