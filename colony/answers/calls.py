"""How a call is answered part by part, and how it ends where it cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

import duckdb
import grpc
import structlog
from google.protobuf.message import Message

from coral.client import AgentError
from coral.colony.answers.refusals import BusyError, NotFoundError, RefusedError
from coral.colony.store.errors import StoreError
from coral.wire.refusal import fitting

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

Context = grpc.aio.ServicerContext[Any, Any]

_SEND_S: Final = 30.0

_CODES: Final[Sequence[tuple[type[Exception], grpc.StatusCode]]] = (
    (NotFoundError, grpc.StatusCode.NOT_FOUND),
    (BusyError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (RefusedError, grpc.StatusCode.INVALID_ARGUMENT),
    (StoreError, grpc.StatusCode.FAILED_PRECONDITION),
    (TimeoutError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (duckdb.OutOfMemoryException, grpc.StatusCode.RESOURCE_EXHAUSTED),
)


async def send(context: Context, part: Message) -> None:
    """Returns when there is room for more. Raises TimeoutError for a caller that does not read."""
    try:
        async with asyncio.timeout(_SEND_S):
            await context.write(part)
    except TimeoutError as error:
        raise TimeoutError(f"the caller has not read for {_SEND_S:g} s") from error


@asynccontextmanager
async def whole(answer_s: float) -> AsyncIterator[None]:
    """Raises TimeoutError where the block takes longer."""
    try:
        async with asyncio.timeout(answer_s) as deadline:
            yield
    except TimeoutError as error:
        if not deadline.expired():
            raise
        raise TimeoutError(
            f"the answer was not read within {answer_s:g} s, or had no place: others are answered"
        ) from error


async def abort(context: Context, error: Exception) -> NoReturn:
    """Tells the caller what ERROR says."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, AgentError):
        await context.abort(error.code, fitting(str(error)))
    for kind, code in _CODES:
        if isinstance(error, kind):
            await context.abort(code, fitting(str(error)))
    log.error("a question failed unexpectedly", exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "the colony failed: its log says why")
    raise AssertionError
