"""A connection to one colony. Errors of gRPC become `AgentError`, with a text for people.

    async with ColonyClient() as colony:
        async with colony.query("http", since_s=900, services=["checkout"]) as answer:
            table = await answer.table()
            print(table.num_rows, answer.coverage.is_whole)

Only reading rows needs pyarrow; it is imported then.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import grpc
from google.protobuf.message import DecodeError, Message

from coral.client.address import default_colony
from coral.client.connection import Connection, duration_of
from coral.client.coverage import Coverage
from coral.client.errors import COLONY, AgentError, ContractError, building_a_request, error_of
from coral.client.tls import Tls
from coral.mesh.colony.v1 import colony_pb2 as pb

if TYPE_CHECKING:
    import pyarrow as pa

DEFAULT_TIMEOUT_S: Final = 60.0
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["ColonyService"].full_name

Moment = float | datetime
"""Seconds before the colony's present, or a time; one without a zone is local."""


class Answer:
    """A table on its way. `coverage` is there once all parts have been read."""

    def __init__(self, call: Any, response: type[Message], error: Any) -> None:  # noqa: ANN401
        self._call = call
        self._response: Any = response
        self._error = error
        self._coverage: Coverage | None = None

    @property
    def coverage(self) -> Coverage:
        """What the answer covers. Raises RuntimeError before its end."""
        if not self._coverage:
            raise RuntimeError("the answer has not been read to its end")
        return self._coverage

    async def parts(self) -> AsyncIterator[bytes]:
        """The messages of an Arrow IPC stream: all of them, one after the other, are the stream.
        Raises `AgentError`."""
        try:
            async for wire in self._call:
                message = self._response.FromString(wire)
                if message.WhichOneof("part") == "arrow":
                    yield message.arrow
                else:
                    self._coverage = Coverage.of(message.coverage)
        except grpc.aio.AioRpcError as failed:
            raise self._error(failed.code(), failed.details() or "") from failed
        except DecodeError as error:
            raise ContractError(f"the colony sent what is no message: {error}") from error
        if not self._coverage:
            raise ContractError("the answer ended without saying what it covers")

    async def batches(self) -> AsyncIterator[pa.RecordBatch]:
        """The rows as they come, as pyarrow.RecordBatches. Raises `AgentError`, ImportError without
        pyarrow."""
        import pyarrow as pa  # noqa: PLC0415

        schema = None
        async for part in self.parts():
            if schema is None:
                schema = pa.ipc.read_schema(pa.py_buffer(part))
            else:
                yield pa.ipc.read_record_batch(pa.py_buffer(part), schema)

    async def table(self) -> pa.Table:
        """All rows, as a pyarrow.Table. Raises `AgentError`, ImportError without pyarrow."""
        import pyarrow as pa  # noqa: PLC0415

        stream = b"".join([part async for part in self.parts()])
        return pa.ipc.open_stream(pa.py_buffer(stream)).read_all()


class ColonyClient(Connection):
    """One colony. Use it as a context manager; every method raises `AgentError`.

    ADDRESS is `unix:PATH` or `HOST:PORT`; by default the environment's CORAL_COLONY, else the local
    socket. TOKEN is by default the environment's CORAL_TOKEN. TLS is for `HOST:PORT`, by default
    what the environment's CORAL_TLS_* say. A call that has not ended after TIMEOUT_S raises
    `DeadlineExceededError`.
    """

    def __init__(
        self,
        address: str | None = None,
        token: str | None = None,
        *,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__(
            _SERVICE, address or default_colony(), token=token, tls=tls, timeout_s=timeout_s
        )

    async def describe(self) -> pb.DescribeResponse:
        """What can be asked: queries, tables and their columns."""
        return await self._call("Describe", pb.DescribeRequest(), pb.DescribeResponse)

    @asynccontextmanager
    async def query(
        self,
        name: str,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        by: Sequence[str] = (),
        top: int = 0,
        services: Sequence[str] = (),
        where: Mapping[str, str] | None = None,
        against_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        """The answer to a named query, such as `http`, for the last 15 minutes by default.
        AGAINST_S compares with the window that began and ended so many seconds earlier."""
        with building_a_request():
            request = pb.QueryRequest(
                query=name, by=by, top=top, services=services, where=where or {}
            )
            _set_moment(request, "since", since)
            _set_moment(request, "until", until)
            if against_s is not None:
                request.against.CopyFrom(duration_of(against_s, "against_s"))
        async with self._answer("Query", request, pb.QueryResponse) as answer:
            yield answer

    @asynccontextmanager
    async def sql(
        self,
        statement: str,
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        most_rows: int = 0,
        deadline_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        """The answer to one SELECT, in DuckDB's SQL, over the tables of `describe`. SINCE and UNTIL
        say which rows these have; by default all that are kept."""
        with building_a_request():
            request = pb.SqlRequest(sql=statement, most_rows=most_rows)
            _set_moment(request, "since", since)
            _set_moment(request, "until", until)
            if deadline_s is not None:
                request.deadline.CopyFrom(duration_of(deadline_s, "deadline_s"))
        async with self._answer("Sql", request, pb.SqlResponse) as answer:
            yield answer

    async def collect(
        self,
        kind: str,
        *,
        service_name: str = "",
        config: Mapping[str, str] | None = None,
        duration_s: float | None = None,
        agents: Sequence[str] = (),
    ) -> Sequence[pb.Collected]:
        """Starts a collector on AGENTS, by default on all that the colony follows; what came of it
        at each."""
        with building_a_request():
            request = pb.CollectRequest(
                kind=kind, service_name=service_name, config=config or {}, agents=agents
            )
            if duration_s is not None:
                request.duration.CopyFrom(duration_of(duration_s, "duration_s"))
        return (await self._call("Collect", request, pb.CollectResponse)).results

    async def stop_collect(self, collectors: Sequence[pb.Collected]) -> Sequence[pb.Collected]:
        """Ends collectors that `collect` has started."""
        request = pb.StopCollectRequest(collectors=collectors)
        return (await self._call("StopCollect", request, pb.StopCollectResponse)).results

    @asynccontextmanager
    async def _answer(
        self, method: str, request: Message, response: type[Message]
    ) -> AsyncIterator[Answer]:
        call = self._stream(method, request, self.timeout_s)
        try:
            yield Answer(call, response, lambda code, details: self._error(method, code, details))
        finally:
            call.cancel()

    def _error(self, method: str, code: grpc.StatusCode, details: str) -> AgentError:
        # The colony's own words, where it gave up by itself.
        if code is grpc.StatusCode.DEADLINE_EXCEEDED and details.startswith("the answer took"):
            return AgentError(code, details)
        return error_of(
            code, details, self.address, method, self.timeout_s, tls=self._tls, peer=COLONY
        )


def _set_moment(
    request: pb.QueryRequest | pb.SqlRequest, field: str, moment: Moment | None
) -> None:
    if moment is None:
        return
    into = request.since if field == "since" else request.until
    if isinstance(moment, datetime):
        into.time.FromNanoseconds(round(moment.timestamp() * 1e6) * 1000)
    else:
        into.ago.CopyFrom(duration_of(moment, field))
