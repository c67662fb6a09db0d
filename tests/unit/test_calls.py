"""What a caller gets for each failure of a method, over a real gRPC server."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from structlog.testing import LogCapture

from coral.agent.caller import Caller
from coral.agent.errors import (
    DeniedError,
    FailedPreconditionError,
    InvalidRequestError,
    LimitError,
    NotFoundError,
    OutOfRangeError,
    UnavailableError,
)
from coral.agent.serving import calls
from coral.agent.serving.calls import handlers
from coral.agent.serving.service import SERVICE
from coral.agent.streams import SubscriptionEndedError
from coral.bpf import BpfError
from coral.collectors.metering import Charge
from coral.mesh.v1 import ebpf_pb2 as pb


class Failing:
    """A service whose every method raises the same; streams do after a first message."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, method: str) -> Any:
        return self._stream if SERVICE.methods_by_name[method].server_streaming else self._answer

    async def _answer(self, _request: object, _caller: Caller) -> pb.EbpfCapabilities:
        raise self._error

    @contextmanager
    def _stream(
        self, _request: object, _caller: Caller
    ) -> Iterator[tuple[AsyncIterator[bytes], Charge]]:
        async def messages() -> AsyncIterator[bytes]:
            yield b""
            raise self._error

        yield messages(), lambda _cpu_ns: None


@asynccontextmanager
async def serving(directory: Path, service: object) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers(SERVICE, service),))
    address = f"unix:{directory}/agent.sock"
    server.add_insecure_port(address)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield channel
    finally:
        await server.stop(None)


async def refusal(channel: grpc.aio.Channel, method: str) -> tuple[grpc.StatusCode, str]:
    path = f"/{SERVICE.full_name}/{method}"
    call: Any
    try:
        if SERVICE.methods_by_name[method].server_streaming:
            call = channel.unary_stream(path)
            async for message in call(b""):
                assert message == b""
        else:
            call = channel.unary_unary(path)
            await call(b"")
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError(f"{method} was not refused")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequestError("told"), grpc.StatusCode.INVALID_ARGUMENT),
        (OutOfRangeError("told"), grpc.StatusCode.OUT_OF_RANGE),
        (NotFoundError("told"), grpc.StatusCode.NOT_FOUND),
        (FailedPreconditionError("told"), grpc.StatusCode.FAILED_PRECONDITION),
        (LimitError("told"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (DeniedError("told"), grpc.StatusCode.PERMISSION_DENIED),
        (UnavailableError("told"), grpc.StatusCode.UNAVAILABLE),
        (SubscriptionEndedError("told"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (BpfError("told", errno.EINVAL), grpc.StatusCode.FAILED_PRECONDITION),
        (BpfError("told", errno.EMFILE), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (NotFoundError("told \udcff \0 \n é"), grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_each_failure_has_its_status_and_its_text(
    error: Exception, code: grpc.StatusCode, tmp_path: Path
) -> None:
    async with serving(tmp_path, Failing(error)) as channel:
        for method in SERVICE.methods:
            answer = await refusal(channel, method.name)
            assert answer == (code, str(error).replace("\udcff", "\\udcff"))


@pytest.mark.parametrize("error", [ValueError("secret"), KeyError("secret"), OSError(5, "secret")])
async def test_what_nobody_expected_is_internal_and_in_the_log_alone(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = LogCapture()
    monkeypatch.setattr(calls, "log", structlog.wrap_logger(None, processors=[logged]))
    async with serving(tmp_path, Failing(error)) as channel:
        for method in SERVICE.methods:
            assert await refusal(channel, method.name) == (
                grpc.StatusCode.INTERNAL,
                f"{method.name} failed: the agent's log says why",
            )
            line = logged.entries.pop()
            assert (line["event"], line["method"]) == ("call failed unexpectedly", method.name)
            assert line["exc_info"] is True
    assert not logged.entries
