"""What a caller is told when an agent cannot be reached, refuses, or does not answer; and that a
proxy of the environment is not asked for what is on this machine."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from coral.client import (
    AgentClient,
    AgentError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    Kind,
    LimitExceededError,
    OutOfRangeError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from coral.client.address import is_local
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.peer import Context, peer

NOBODY = 65_534


async def refusal(address: str, **options: Any) -> AgentError:
    """How a request to ADDRESS fails."""
    async with AgentClient(address, **options) as agent:
        with pytest.raises(AgentError) as refused:
            await agent.collectors()
    return refused.value


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


async def test_a_socket_that_is_not_there_and_one_that_nobody_serves_are_told_apart(
    tmp_path: Path,
) -> None:
    left = tmp_path / "left.sock"
    with socket.socket(socket.AF_UNIX) as once:
        once.bind(str(left))
    for path, why in (
        (tmp_path / "none.sock", "no such file or directory"),
        (left, "connection refused"),
    ):
        error = await refusal(f"unix:{path}")
        assert type(error) is UnavailableError
        assert str(error) == (
            f"no agent answers at unix:{path} ({why}): start one with `coral agent`, or name its "
            "address with --agent or CORAL_AGENT"
        )


async def test_a_port_that_nobody_serves_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    error = await refusal(f"127.0.0.1:{port}")
    assert str(error).startswith(f"no agent answers at 127.0.0.1:{port} (connection refused): ")


def test_a_socket_that_this_user_may_not_open_is_said_to_be_forbidden(directory: Path) -> None:
    path = directory / "agent.sock"
    script = f"""
import asyncio, os
from coral.client import AgentClient, PermissionDeniedError
if os.geteuid() == 0:
    os.setuid({NOBODY})
async def main():
    async with AgentClient("unix:{path}") as agent:
        try:
            await agent.collectors()
        except PermissionDeniedError as error:
            print(error.code.name, error)
asyncio.run(main())
"""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0)
        done = subprocess.run(
            [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True
        )
    user = os.geteuid() or NOBODY
    assert done.stdout == (
        f"PERMISSION_DENIED permission denied: user {user} may not open unix:{path}; run this as "
        "the socket's owner, usually root\n"
    )


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgumentError),
        (grpc.StatusCode.OUT_OF_RANGE, OutOfRangeError),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, LimitExceededError),
        (grpc.StatusCode.FAILED_PRECONDITION, FailedPreconditionError),
        (grpc.StatusCode.ABORTED, AgentError),
    ],
)
async def test_a_refusal_has_a_type_and_the_agents_own_words(
    tmp_path: Path, code: grpc.StatusCode, kind: type[AgentError]
) -> None:
    async def script(_request: Any, context: Context) -> None:
        await context.abort(code, "limits.example is 3")

    async with peer(f"unix:{tmp_path}/agent.sock", ListCollectors=script) as address:
        error = await refusal(address)
    assert (type(error), error.code, str(error)) == (kind, code, "limits.example is 3")


async def test_a_token_is_sent_and_a_wrong_one_is_said_to_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(_request: Any, context: Context) -> pb.ListCollectorsResponse:
        sent = dict(context.invocation_metadata() or ())
        if sent.get("authorization") != "Bearer right":
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "authorization: wrong token")
        return pb.ListCollectorsResponse()

    async with peer(f"unix:{tmp_path}/agent.sock", ListCollectors=script) as address:
        error = await refusal(address, token="left")
        assert type(error) is UnauthenticatedError
        assert str(error) == "authorization: wrong token (set CORAL_TOKEN, or pass `token`)"
        monkeypatch.setenv("CORAL_TOKEN", "right")
        async with AgentClient(address) as agent:
            assert len(await agent.collectors()) == 0


async def test_a_call_that_is_not_answered_ends_at_its_deadline(tmp_path: Path) -> None:
    async def script(_request: Any, _context: Context) -> None:
        await asyncio.Event().wait()

    async with peer(
        f"unix:{tmp_path}/agent.sock", ListCollectors=script, StreamEventBatches=script
    ) as address:
        error = await refusal(address, timeout_s=0.2)
        assert type(error) is DeadlineExceededError
        assert str(error) == f"the agent at {address} did not answer ListCollectors within 0.2 s"
        async with AgentClient(address, timeout_s=0.2) as agent:
            with pytest.raises(DeadlineExceededError, match="answer StreamEventBatches within"):
                await agent.subscribe("c").__aenter__()


async def test_a_kind_may_be_a_name_or_a_number_and_an_unknown_name_lists_the_known_ones(
    tmp_path: Path,
) -> None:
    asked: list[int] = []
    configs: list[dict[str, str]] = []

    async def script(
        request: pb.StartEbpfCollectorRequest, _context: Context
    ) -> pb.StartEbpfCollectorResponse:
        asked.append(request.kind)
        configs.append(dict(request.config))
        answer = pb.StartEbpfCollectorResponse(supported=True, collector_id="c-1")
        answer.expires_at.FromNanoseconds(1_500_000_000_000_000_123)
        return answer

    async with (
        peer(f"unix:{tmp_path}/agent.sock", StartCollector=script) as address,
        AgentClient(address) as agent,
    ):
        for kind in ("tcp_metrics", 4, pb.EBPF_COLLECTOR_KIND_TCP_METRICS, 99):
            started = await agent.start(kind, config={"pid": 12, "until_exit": True, "top": "5"})
        with pytest.raises(InvalidArgumentError) as refused:
            await agent.start("tcp")
    assert asked == [4, 4, 4, 99]
    assert configs == [{"pid": "12", "until_exit": "true", "top": "5"}] * 4
    assert started.supported
    assert started.expires_at_ns == 1_500_000_000_000_000_123
    assert str(refused.value) == (
        "kind: 'tcp' is not known; kinds of the contract: syscall_stats, http_latency, "
        "cpu_profile, tcp_metrics; `capabilities()` lists what this agent has"
    )
    assert (f"{Kind(4)}", Kind(99).name, Kind(4) == 4) == ("tcp_metrics", "99", True)


async def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        nowhere = server.getsockname()[1]
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{nowhere}")
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)

    async def script(_request: Any, _context: Context) -> pb.ListCollectorsResponse:
        return pb.ListCollectorsResponse(collectors=[pb.CollectorInfo(collector_id="c-1")])

    async with (
        peer("127.0.0.1:0", ListCollectors=script) as address,
        AgentClient(address) as agent,
    ):
        assert [it.collector_id for it in await agent.collectors()] == ["c-1"]


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("unix:/run/coral/agent.sock", True),
        ("127.0.0.1:9001", True),
        ("127.8.0.1:9001", True),
        ("[::1]:9001", True),
        ("ipv4:127.0.0.1:9001", True),
        ("dns:///localhost:9001", True),
        ("localhost:9001", True),
        ("10.0.0.1:9001", False),
        ("localhost.example.org:9001", False),
        ("node-7:9001", False),
    ],
)
def test_local_addresses_are_recognised(address: str, *, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize("address", ["unix:", "unix:/" + "x" * 107, "a\nb:1", "unix:/\udcff"])
def test_an_address_that_grpc_cannot_take_is_an_error_of_ours(address: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^address: .* is not accepted; give HOST:PORT"):
        AgentClient(address)


@pytest.mark.parametrize("token", ["a\nb", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_token_that_no_header_can_carry_is_an_error_of_ours(token: str) -> None:
    with pytest.raises(InvalidArgumentError, match="printable ASCII"):
        AgentClient("unix:/nowhere", token)


def test_an_empty_variable_means_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORAL_AGENT", "")
    assert AgentClient().address == "unix:/run/coral/agent.sock"


async def test_values_that_no_request_can_hold_are_errors_of_ours() -> None:
    async with AgentClient("unix:/nowhere") as agent:
        with pytest.raises(InvalidArgumentError):
            await agent.stop("\ud800")
        with pytest.raises(InvalidArgumentError, match="duration_s: inf is not accepted"):
            await agent.renew("x", float("inf"))
        with pytest.raises(InvalidArgumentError):
            async with agent.subscribe("x", pids=["x"]):  # type: ignore[list-item]
                pass
        with pytest.raises(InvalidArgumentError, match="colums: there is no such term"):
            async with agent.subscribe("x", colums=True):  # type: ignore[call-arg]
                pass
