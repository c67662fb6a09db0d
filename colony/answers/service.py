"""The colony's RPCs: each checks its caller, asks the store or a worker, and sends the answer in
parts. It knows nothing of sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol

import duckdb
import grpc
import structlog
from google.protobuf.message import Message

from coral.colony.answers.access import Access, Caller, Refusals, Role, WrongTokenError
from coral.colony.answers.answer import answered
from coral.colony.answers.arrow import parts_of
from coral.colony.answers.away import add_gaps, named
from coral.colony.answers.calls import Context, abort, send, whole
from coral.colony.answers.coverage import Scope, covered
from coral.colony.answers.listings import AskedListing, listed
from coral.colony.answers.refusals import RefusedError
from coral.colony.answers.requests import asked_of, described, window_of
from coral.colony.answers.shares import Shares
from coral.colony.answers.sources import Reads, Sources
from coral.colony.answers.sql.hot import BOOKS, Shipment, ship, tables_of
from coral.colony.answers.sql.pool import Finished, Limits, Pool
from coral.colony.answers.window import Window
from coral.colony.clock import now_ns
from coral.colony.delivery import Away
from coral.colony.tables import TABLES, base_of
from coral.colony.versions import version_of
from coral.mesh.colony.v1 import colony_pb2 as pb
from coral.wire.text import safe

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

SERVICE: Final = pb.DESCRIPTOR.services_by_name["ColonyService"].full_name
DEADLINE_S: Final = 30.0
"""Of a named query, at most; a caller's own deadline may be shorter."""
AT_A_TIME: Final = 4
"""Named queries that read the store at a time, half of them for one caller; more wait."""
MOST_COLLECT_S: Final = 86_400.0
"""How long a collector that callers ask for may be kept at work."""
_MOST_SHOWN: Final = 500
_MOST_ANSWERS: Final = 16  # each may be held in memory until its caller has read it
_MOST_WAITING: Final = 16  # questions of one caller, with those that are being answered
_READ_S: Final = 90.0  # for a whole answer to get a place and to be read, beside making it


class Outcome(Protocol):
    """What came of a request at one agent."""

    @property
    def agent_id(self) -> str:
        """The agent."""

    @property
    def collector_id(self) -> str:
        """The collector; empty where there is none."""

    @property
    def error(self) -> str:
        """Why not; empty where all went well."""

    @property
    def notes(self) -> Sequence[str]:
        """What may not be expected."""


class Fleet(Protocol):
    """The agents, as far as questions need them."""

    async def collect(
        self,
        kind: int | str,
        *,
        config: Mapping[str, str] | None = None,
        service: str = "",
        duration_s: float | None = None,
        agents: Collection[str] = (),
    ) -> Sequence[Outcome]:
        """Starts a collector on each of AGENTS, by default on all."""

    async def stop(self, agent_id: str, collector_id: str) -> Outcome:
        """Ends a collector."""

    def away(self) -> Sequence[Away]:
        """The addresses that are not followed now."""


class Service:
    """Answers from STORE; `collect` goes to FLEET. CLOCK is the colony's, in Unix nanoseconds."""

    def __init__(
        self,
        store: Reads,
        fleet: Fleet,
        access: Access,
        limits: Limits | None = None,
        clock: Callable[[], int] = now_ns,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._access = access
        self._clock = clock
        self._reading = Shares(AT_A_TIME, AT_A_TIME // 2)
        self._answering = Shares(_MOST_ANSWERS, _MOST_ANSWERS // 2)
        self._refusals = Refusals()
        self._answer_s = max(DEADLINE_S, (limits or Limits()).deadline_s) + _READ_S
        self.pool = Pool(limits)

    def handlers(self) -> grpc.GenericRpcHandler:
        """For a server of grpc.aio."""
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        made: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Describe": unary(
                self._unary(Role.VIEW, self.describe), pb.DescribeRequest.FromString, _bytes
            ),
            "Query": stream(
                self._stream(Role.VIEW, self.query), pb.QueryRequest.FromString, _bytes
            ),
            "Sql": stream(self._stream(Role.VIEW, self.sql), pb.SqlRequest.FromString, _bytes),
            "Collect": unary(
                self._unary(Role.OPERATE, self.collect), pb.CollectRequest.FromString, _bytes
            ),
            "StopCollect": unary(
                self._unary(Role.OPERATE, self.stop_collect),
                pb.StopCollectRequest.FromString,
                _bytes,
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE, made)

    async def describe(self, _request: pb.DescribeRequest, caller: Caller) -> pb.DescribeResponse:
        """What can be asked."""

        def work(
            cursor: duckdb.DuckDBPyConnection, sources: Sources
        ) -> Mapping[str, Mapping[str, str]]:
            found = {}
            for table in tables_of(sources):
                relation = cursor.sql(f"SELECT * FROM ({sources.rows(table, 0, 0)}) LIMIT 0")
                types = map(str, relation.types)
                found[table] = dict(zip(relation.columns, types, strict=True))
            return found

        columns = await self._snapshot(caller, work)
        return described(columns, version_of("coral-ebpf-agent"), self._clock())

    async def query(
        self, request: pb.QueryRequest, caller: Caller
    ) -> AsyncIterator[pb.QueryResponse]:
        """A named query."""
        asked, addresses = asked_of(request, self._clock()), self._fleet.away()

        def work(
            cursor: duckdb.DuckDBPyConnection, sources: Sources
        ) -> tuple[list[bytes], pb.Coverage]:
            away = named(cursor, addresses)
            if isinstance(asked, AskedListing):
                table, coverage = listed(cursor, sources, asked, away)
            else:
                answer = answered(cursor, sources, asked)
                table, coverage = answer.table, answer.coverage
            add_gaps(coverage, away, asked.where.get("agent", "*"))
            return list(parts_of(table)), coverage

        parts, coverage = await self._snapshot(caller, work)
        for part in parts:
            yield pb.QueryResponse(arrow=part)
        yield pb.QueryResponse(coverage=coverage)

    async def sql(self, request: pb.SqlRequest, caller: Caller) -> AsyncIterator[pb.SqlResponse]:
        """A statement of a stranger."""
        log.info("sql", caller=caller.name, sql=safe(request.sql[:_MOST_SHOWN]))
        has_window = request.HasField("since") or request.HasField("until")
        window = window_of(request, self._clock()) if has_window else None
        limits = self.pool.limits
        most_rows = min(request.most_rows or limits.most_rows, limits.most_rows)
        deadline_s = limits.deadline_s
        if request.HasField("deadline"):
            wanted_s = request.deadline.ToNanoseconds() / 1e9
            if not 0 < wanted_s <= limits.deadline_s:
                raise RefusedError(
                    f"deadline: {wanted_s:g} s is not accepted; give at most {limits.deadline_s:g}s"
                )
            deadline_s = wanted_s
        told: list[tuple[Shipment, pb.Coverage]] = []

        async def shipped(tables: Sequence[str], words: Sequence[str] | None) -> Shipment:
            addresses = self._fleet.away()

            def work(
                cursor: duckdb.DuckDBPyConnection, sources: Sources
            ) -> tuple[Shipment, pb.Coverage]:
                shipment = ship(cursor, sources, tables, words, window)
                try:
                    coverage = _covered(cursor, sources, shipment, window, self._clock())
                    if coverage.HasField("complete_to"):
                        add_gaps(coverage, named(cursor, addresses))
                    return shipment, coverage
                except BaseException:
                    shipment.close()
                    raise

            told.append(await self._snapshot(caller, work))
            return told[0][0]

        answer = self.pool.answer(
            request.sql, shipped, most_rows=most_rows, deadline_s=deadline_s, caller=caller.name
        )
        async with aclosing(answer):
            async for part in answer:
                if isinstance(part, Finished):
                    coverage = told[0][1] if told else pb.Coverage()
                    coverage.rows, coverage.cut = part.rows, part.cut
                    yield pb.SqlResponse(coverage=coverage)
                else:
                    yield pb.SqlResponse(arrow=part)

    async def collect(self, request: pb.CollectRequest, caller: Caller) -> pb.CollectResponse:
        """Starts a collector on many agents."""
        log.info(
            "collect", caller=caller.name, kind=request.kind, service=request.service_name,
            agents=len(request.agents) or "all",
        )  # fmt: skip
        kinds = sorted({table.kind.name for table in TABLES.values()})
        if request.kind not in kinds:
            raise RefusedError(
                f"kind: {request.kind!r} is not accepted; give one of {', '.join(kinds)}"
            )
        duration_s = None
        if request.HasField("duration"):
            duration_s = request.duration.ToNanoseconds() / 1e9
            if duration_s > MOST_COLLECT_S:
                raise RefusedError(
                    f"duration: {duration_s:g} s is not accepted; give at most "
                    f"{MOST_COLLECT_S:g} s: what is always to be at work belongs into `collect` "
                    "of the colony's configuration"
                )
        outcomes = await self._fleet.collect(
            request.kind,
            config=dict(request.config),
            service=request.service_name,
            duration_s=duration_s,
            agents=tuple(request.agents),
        )
        return pb.CollectResponse(results=map(_collected, outcomes))

    async def stop_collect(
        self, request: pb.StopCollectRequest, caller: Caller
    ) -> pb.StopCollectResponse:
        """Ends collectors."""
        log.info("stop", caller=caller.name, collectors=len(request.collectors))
        stopping = (self._fleet.stop(it.agent, it.collector_id) for it in request.collectors)
        outcomes = await asyncio.gather(*stopping)
        return pb.StopCollectResponse(results=map(_collected, outcomes))

    async def _snapshot(
        self, caller: Caller, work: Callable[[duckdb.DuckDBPyConnection, Sources], Any]
    ) -> Any:  # noqa: ANN401
        try:
            async with asyncio.timeout(DEADLINE_S), self._reading.place(caller.name):
                return await self._store.snapshot(work, deadline_s=DEADLINE_S)
        except TimeoutError as error:
            raise TimeoutError(
                f"the answer took longer than {DEADLINE_S:g} s: ask for a shorter window, or for "
                "fewer services"
            ) from error

    def _unary(
        self, role: Role, method: Callable[[Any, Caller], Awaitable[Message]]
    ) -> Callable[[Any, Context], Awaitable[Message]]:
        async def call(request: Any, context: Context) -> Message:  # noqa: ANN401
            caller = await self._allowed(role, context)
            try:
                async with self._answering.place(caller.name, _MOST_WAITING):
                    return await method(request, caller)
            except Exception as error:  # noqa: BLE001  it is told to the caller
                await abort(context, error)

        return call

    def _stream(
        self, role: Role, method: Callable[[Any, Caller], AsyncIterator[Message]]
    ) -> Callable[[Any, Context], Awaitable[None]]:
        async def call(request: Any, context: Context) -> None:  # noqa: ANN401
            caller = await self._allowed(role, context)
            try:
                async with (
                    whole(self._answer_s),
                    self._answering.place(caller.name, _MOST_WAITING),
                    aclosing(method(request, caller)) as parts,  # type: ignore[type-var]
                ):
                    async for part in parts:
                        await send(context, part)
            except Exception as error:  # noqa: BLE001  it is told to the caller
                await abort(context, error)

        return call

    async def _allowed(self, role: Role, context: Context) -> Caller:
        """The caller, if it may do what ROLE may. Else ends the call."""
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        try:
            caller = self._access.caller(context.peer(), str(given))
        except WrongTokenError as error:
            self._refusals.log(context.peer(), str(error))
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        if caller.role < role:
            why = (
                f"{caller.name} may {caller.role.name.lower()}, and this needs {role.name.lower()}"
            )
            self._refusals.log(context.peer(), why)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, why)
        return caller


def _covered(
    cursor: duckdb.DuckDBPyConnection,
    sources: Sources,
    shipment: Shipment,
    window: Window | None,
    now_ns: int,
) -> pb.Coverage:
    """What is missing in the tables that a statement reads."""
    kinds = [TABLES[base].kind.name for it in shipment.tables if (base := base_of(it)[0]) in TABLES]
    if window is None:
        oldest = (sources.kept_from_ns(it) for it in shipment.tables if it not in BOOKS)
        window = Window(min((it for it in oldest if it is not None), default=now_ns), now_ns + 1)
    coverage = covered(cursor, sources, window, Scope(tuple(dict.fromkeys(kinds))))
    if not kinds:
        coverage.ClearField("complete_to")
        del coverage.lost[:]
    return coverage


def _collected(outcome: Outcome) -> pb.Collected:
    return pb.Collected(
        agent=outcome.agent_id,
        collector_id=outcome.collector_id,
        error=outcome.error,
        notes=outcome.notes,
    )


def _bytes(message: Message) -> bytes:
    return message.SerializeToString()
