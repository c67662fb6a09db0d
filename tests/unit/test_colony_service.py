"""A colony's server and its client: answers, refusals, who may ask what."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import grpc
import pytest
from structlog.testing import capture_logs

from coral.client import (
    AgentError,
    ColonyClient,
    InvalidArgumentError,
    LimitExceededError,
    NotFoundError,
    PermissionDeniedError,
    Tls,
    UnauthenticatedError,
    UnavailableError,
)
from coral.colony.answers.access import Access, Refusals, Role, TokenFile, WrongTokenError
from coral.colony.answers.refusals import unknown
from coral.colony.answers.server import Answers, ServingError
from coral.colony.answers.settings import Serving, ServingTls
from coral.colony.answers.sources import Sources
from coral.colony.delivery import Away
from coral.mesh.colony.v1 import colony_pb2 as pb
from tests.certificates import Authority
from tests.colony import until
from tests.colony_tables import PlainReads

NOW = 1_700_000_000_000_000_000
ASKED = "a-token-of-enough-bytes"


@dataclass(frozen=True)
class Outcome:
    agent_id: str
    collector_id: str = ""
    error: str = ""
    notes: tuple[str, ...] = ()


class Asked:
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        self.collected: list[tuple[Any, ...]] = []

    async def collect(
        self,
        kind: int | str,
        *,
        config: Mapping[str, str] | None = None,
        service: str = "",
        duration_s: float | None = None,
        agents: Collection[str] = (),
    ) -> Sequence[Outcome]:
        if why := (config or {}).get("refused"):
            raise InvalidArgumentError(grpc.StatusCode.INVALID_ARGUMENT, f"config: {why}")
        self.collected.append((kind, config, service, duration_s, tuple(agents)))
        return [Outcome("n1", "c1", notes=("a note",)), Outcome("n2", error="away")]

    def away(self) -> Sequence[Away]:
        return [Away("", "n3:9001", 1, "no such host"), Away("n1", "n1b:9001", 1, "twice", True)]

    async def stop(self, agent_id: str, collector_id: str) -> Outcome:
        return Outcome(agent_id, collector_id, "it has ended" if agent_id == "n2" else "")


def reads() -> PlainReads:
    reads = PlainReads(NOW)
    call = {"agent": "n1", "service": "checkout", "syscall": "read", "call_count": 7}
    reads.add(
        "syscall_stats",
        *({**call, "time_ns": 1, "service": f"s{number}"} for number in range(3)),
    )
    return reads


@asynccontextmanager
async def served(serving: Serving, fleet: Asked | None = None) -> AsyncIterator[list[str]]:
    async with Answers(reads(), fleet or Asked(), serving).serving() as addresses:
        yield addresses


@asynccontextmanager
async def colony(tmp_path: Path, fleet: Asked | None = None) -> AsyncIterator[ColonyClient]:
    serving = Serving((f"unix:{tmp_path}/colony.sock",))
    async with served(serving, fleet) as (address,), ColonyClient(address) as client:
        yield client


async def test_the_owner_of_the_socket_asks_and_collects(tmp_path: Path) -> None:
    fleet = Asked()
    async with colony(tmp_path, fleet) as client:
        mode = (tmp_path / "colony.sock").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
        since = datetime.fromtimestamp(0, UTC)
        async with client.query("syscalls", since=since, by=["service"], top=2) as answer:
            table = await answer.table()
        assert table.column("service").to_pylist() == ["s0", "s1"]
        assert table.column("calls").to_pylist() == [7, 7]
        assert (answer.coverage.cut, answer.coverage.left_out) == (True, 1)
        assert [(gap.agent, gap.to_ns, gap.why) for gap in answer.coverage.gaps] == [
            ("n3:9001", None, "no such host")
        ]
        async with client.query("syscalls", since=since) as answer:
            batches = [batch async for batch in answer.batches()]
        assert sum(batch.num_rows for batch in batches) == 3
        async with client.sql("SELECT sum(call_count) AS n FROM syscall_stats") as answer:
            assert (await answer.table()).to_pylist() == [{"n": 21}]
        assert answer.coverage.rows == 1
        told = await client.collect("http_latency", service_name="checkout", duration_s=30)
        assert [(it.agent, it.collector_id, it.error) for it in told] == [
            ("n1", "c1", ""),
            ("n2", "", "away"),
        ]
        assert fleet.collected == [("http_latency", {}, "checkout", 30.0, ())]
        ended = await client.stop_collect([pb.Collected(agent="n1", collector_id="c1")])
        assert [it.error for it in ended] == [""]
    assert not (tmp_path / "colony.sock").exists()


async def test_describe_names_queries_and_tables(tmp_path: Path) -> None:
    async with colony(tmp_path) as client:
        told = await client.describe()
    queries = {query.name: query for query in told.queries}
    assert list(queries["http"].by) == ["service", "role", "method", "route"]
    assert queries["http"].has_against
    assert not queries["agents"].has_against
    tables = {it.name: {column.name: column.type for column in it.columns} for it in told.tables}
    assert tables["http_latency_1h"]["time_ns"] == "BIGINT"
    assert tables["ledger"]["service"] == "VARCHAR"
    assert "generations" not in tables


async def test_a_name_of_any_length_is_refused_in_a_few_words(tmp_path: Path) -> None:
    # Neither a search for names like it, in the loop of all callers, nor more than a status holds.
    name = "abcdefghij" * 300_000
    async with colony(tmp_path) as client:
        for given in ({"by": [name]}, {"where": {name: "x"}}):
            with pytest.raises(InvalidArgumentError, match="no such column: 'abc") as refused:
                async with client.query("http", **given) as answer:
                    await answer.table()
            assert len(str(refused.value)) < 500
        with pytest.raises(InvalidArgumentError, match=r"^config: \w+ \[\.\.\.\] \w+$"):
            await client.collect("http_latency", config={"refused": name})


def test_of_many_names_none_is_searched_for_the_nearest() -> None:
    assert str(unknown("service", "shop", ["shop2"])).endswith("did you mean shop2?")
    assert str(unknown("service", "shop", map(str, range(10**5)))) == "no such service: 'shop'"


async def test_refusals_say_what_would_be_accepted(tmp_path: Path) -> None:
    async with colony(tmp_path) as client:
        cases: tuple[tuple[type[AgentError], str, dict[str, Any]], ...] = (
            (NotFoundError, "query: no such query: 'htp'; did you mean http", {"name": "htp"}),
            (InvalidArgumentError, "by: no such column: 'x'", {"name": "http", "by": ["x"]}),
            (
                InvalidArgumentError,
                "since: it is in the future",
                {"name": "http", "since": datetime(2100, 1, 1, tzinfo=UTC)},
            ),
            (
                InvalidArgumentError,
                "since: it is not before the end",
                {"name": "http", "since": 60, "until": 120},
            ),
            (NotFoundError, "no such service: 's'", {"name": "http", "services": ["s"]}),
        )
        for error, why, asked in cases:
            with pytest.raises(error, match=why):
                async with client.query(**asked) as answer:
                    await answer.table()
        with pytest.raises(InvalidArgumentError, match="sql: give one SELECT statement"):
            async with client.sql("DROP TABLE x") as answer:
                await answer.table()
        with pytest.raises(InvalidArgumentError, match="deadline: 3600 s is not accepted"):
            async with client.sql("SELECT 1", deadline_s=3600) as answer:
                await answer.table()
        with pytest.raises(
            InvalidArgumentError, match="kind: 'x' is not accepted; give one of cpu"
        ):
            await client.collect("x")


async def test_no_colony_there_is_said_so(tmp_path: Path) -> None:
    async with ColonyClient(f"unix:{tmp_path}/none.sock") as client:
        with pytest.raises(UnavailableError, match=r"no colony answers at .*`coral colony`"):
            await client.describe()


async def test_over_tcp_a_token_has_its_role(tmp_path: Path) -> None:
    for name in ("viewer", "operator"):
        (tmp_path / name).write_text(f"{ASKED}-{name}")
    authority = Authority()
    certificate, key = authority.sign("colony").write(tmp_path, "colony")
    serving = Serving(
        ("127.0.0.1:0",),
        ServingTls(certificate, key),
        (
            TokenFile("viewer", tmp_path / "viewer", Role.VIEW),
            TokenFile("operator", tmp_path / "operator", Role.OPERATE),
        ),
    )
    tls = Tls(str(authority.write(tmp_path / "ca.crt")), server_name="colony")
    async with served(serving) as (address,):
        async with ColonyClient(address, f"{ASKED}-viewer", tls=tls) as client:
            assert (await client.describe()).queries
            with pytest.raises(PermissionDeniedError, match="token:viewer may view"):
                await client.collect("http_latency")
        async with ColonyClient(address, f"{ASKED}-operator", tls=tls) as client:
            assert await client.collect("http_latency")
        for token, why in (("", "a token is missing"), ("x" * 20, "the token is wrong")):
            async with ColonyClient(address, token, tls=tls) as client:
                with pytest.raises(UnauthenticatedError, match=why):
                    await client.describe()
        async with ColonyClient(address, f"{ASKED}-viewer") as client:
            with pytest.raises(AgentError):
                await client.describe()


T = TypeVar("T")


class Held:
    """A store whose snapshots wait until they may begin."""

    def __init__(self, reads: PlainReads) -> None:
        self.may_read = asyncio.Event()
        self.reading = 0
        self._reads = reads

    async def snapshot(
        self, work: Callable[[duckdb.DuckDBPyConnection, Sources], T], *, deadline_s: float
    ) -> T:
        self.reading += 1
        await self.may_read.wait()
        return await self._reads.snapshot(work, deadline_s=deadline_s)


async def test_one_caller_leaves_places_to_others(tmp_path: Path) -> None:
    for name in ("viewer", "operator"):
        (tmp_path / name).write_text(f"{ASKED}-{name}")
    tokens = [TokenFile(name, tmp_path / name, Role.VIEW) for name in ("viewer", "operator")]
    held = Held(reads())

    async def ask(client: ColonyClient) -> int:
        async with client.query("syscalls", since=datetime.fromtimestamp(0, UTC)) as answer:
            rows: int = (await answer.table()).num_rows
            return rows

    answers = Answers(held, Asked(), Serving(("127.0.0.1:0",), tokens=tokens))
    async with (
        answers.serving() as (address,),
        ColonyClient(address, f"{ASKED}-viewer") as viewer,
        ColonyClient(address, f"{ASKED}-operator") as operator,
    ):
        asked = [asyncio.create_task(ask(viewer)) for _ in range(20)]
        done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_EXCEPTION)
        while len(done) < 4:
            more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
            done |= more
        for one in done:
            with pytest.raises(LimitExceededError, match="token:viewer has 16 questions"):
                one.result()
        assert held.reading == 2
        with pytest.raises(LimitExceededError, match="token:viewer has 16 questions"):
            await viewer.describe()
        other = asyncio.create_task(ask(operator))
        await until(lambda: held.reading == 3)
        held.may_read.set()
        assert await asyncio.gather(other, *waiting) == [3] * 17


def test_tokens_are_read_again_when_they_change(tmp_path: Path) -> None:
    now_s = 0.0
    path = tmp_path / "token"
    path.write_text(ASKED)
    access = Access((TokenFile("ci", path, Role.VIEW),), clock=lambda: now_s)
    assert access.caller("ipv4:1.2.3.4:5", f"Bearer {ASKED}").name == "token:ci"
    path.write_text(f"{ASKED}-2")
    now_s = 2.0
    with pytest.raises(WrongTokenError):
        access.caller("ipv4:1.2.3.4:5", f"Bearer {ASKED}")
    path.unlink()
    with capture_logs() as logged:
        for now_s in (4.0, 6.0, 8.0):  # noqa: B007  the clock
            assert access.caller("ipv4:1.2.3.4:5", f"Bearer {ASKED}-2").role is Role.VIEW
    assert [line["event"] for line in logged] == ["the last token stays in force"]


def test_a_token_that_others_could_choose_is_none(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(ASKED)
    path.chmod(0o620)
    with pytest.raises(ValueError, match=r"token ci: .*: others than its owner may write it"):
        Access((TokenFile("ci", path, Role.VIEW),))


def test_a_token_that_every_user_may_read_is_told_once(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(ASKED)
    path.chmod(0o644)
    now_s = 0.0
    with capture_logs() as logged:
        access = Access((TokenFile("ci", path, Role.VIEW),), clock=lambda: now_s)
        now_s = 2.0
        access.caller("ipv4:1.2.3.4:5", f"Bearer {ASKED}")
    assert [(line["event"], line["mode"]) for line in logged] == [
        ("every user may read the token", "0644")
    ]


async def test_a_key_that_others_may_read_is_refused_by_the_server_and_by_clients(
    tmp_path: Path,
) -> None:
    (tmp_path / "token").write_text(ASKED)
    (tmp_path / "token").chmod(0o600)
    tokens = (TokenFile("ci", tmp_path / "token", Role.VIEW),)
    authority = Authority()
    certificate, key = authority.sign("colony").write(tmp_path, "colony")
    serving = Serving(("127.0.0.1:0",), ServingTls(certificate, key), tokens)
    ca = str(authority.write(tmp_path / "ca.crt"))
    key.chmod(0o640)
    Tls(ca, str(certificate), str(key)).credentials()
    async with served(serving):
        pass

    async def is_refused(why: str) -> None:
        with pytest.raises(ServingError, match=f"tls.key: .*{why}"):
            async with served(serving):
                pass
        with pytest.raises(ValueError, match=f"--tls-key: .*{why}"):
            Tls(ca, str(certificate), str(key)).credentials()

    key.chmod(0o644)
    await is_refused(r"colony.key: others than its owner may read or write it \(mode 0644\): give")
    key.write_bytes(b"x" * ((1 << 20) + 1))
    key.chmod(0o600)
    await is_refused(": it has more than 1,048,576 bytes")


def test_refusals_are_logged_one_a_second() -> None:
    now_s = 0.0
    refusals = Refusals(lambda: now_s)
    with capture_logs() as logged:
        for _ in range(1000):
            refusals.log("ipv4:1.2.3.4:5", "authorization: a token is missing")
        now_s = 1.0
        refusals.log("ipv4:1.2.3.4:6", "authorization: the token is wrong")
    assert [(line["peer"][-1], line["others_before"]) for line in logged] == [("5", 0), ("6", 999)]


@pytest.mark.parametrize(
    ("serving", "why"),
    [
        (Serving(("0.0.0.0:9002",)), "beyond loopback, and without TLS"),
        (Serving(("127.0.0.1:9002",)), "without tokens nobody could ask here"),
        (Serving(("9002",)), "is not accepted; give HOST:PORT"),
        (Serving(("unix:colony.sock",)), "give an absolute path"),
    ],
)
def test_an_address_at_which_anybody_could_ask_is_refused(serving: Serving, why: str) -> None:
    with pytest.raises(ServingError, match=why):
        Answers(reads(), Asked(), serving)


async def test_a_socket_that_another_colony_holds_is_left_alone(tmp_path: Path) -> None:
    serving = Serving((f"unix:{tmp_path}/colony.sock",))
    async with served(serving) as (address,):
        with pytest.raises(ServingError, match="another colony answers there"):
            async with served(serving):
                pass
        async with ColonyClient(address) as client:
            assert (await client.describe()).queries
