"""gRPC's health: watchers get the latest status, and a change waits for none of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from grpc_health.v1 import health_pb2

from coral.agent.caller import LIBRARY
from coral.agent.errors import NotFoundError
from coral.agent.serving.health import HEALTH, Health
from coral.agent.streams import Readers

SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3
NAME = "coral"


def request(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def status(messages: AsyncIterator[bytes]) -> int:
    """The next one that a watcher gets."""
    async with asyncio.timeout(5):
        return health_pb2.HealthCheckResponse.FromString(await anext(messages)).status


async def test_a_slow_watcher_gets_the_latest_status_and_none_between() -> None:
    readers = Readers(30)
    health = Health(readers, NAME)
    with health.Watch(request(NAME), LIBRARY) as (slow, _):
        assert await status(slow) == NOT_SERVING
        for ready in (True, False, True):
            health.set_ready(ready=ready)
        assert await status(slow) == SERVING
        for ready in (False, True):
            health.set_ready(ready=ready)
        unchanged = asyncio.ensure_future(anext(slow))
        await asyncio.sleep(0)
        assert not unchanged.done()
        health.shut_down()
        async with asyncio.timeout(5):
            assert await unchanged == bytes([8, NOT_SERVING])
        assert len(readers) == 1
    assert len(readers) == 0


async def test_life_and_readiness_are_told_apart_and_unknown_services_are_refused() -> None:
    health = Health(Readers(30), NAME)
    health.set_alive()
    assert (await health.Check(request(""), LIBRARY)).status == SERVING
    assert (await health.Check(request(NAME), LIBRARY)).status == NOT_SERVING
    with pytest.raises(NotFoundError, match="'other' is not here"):
        await health.Check(request("other"), LIBRARY)
    with health.Watch(request("other"), LIBRARY) as (messages, _):
        assert await status(messages) == UNKNOWN
    listed = await health.List(request(""), LIBRARY)
    assert {name: each.status for name, each in listed.statuses.items()} == {  # type: ignore[attr-defined]
        "": SERVING,
        NAME: NOT_SERVING,
    }


def test_each_method_of_the_protocol_is_served() -> None:
    health = Health(Readers(30))
    assert [hasattr(health, method.name) for method in HEALTH.methods] == [True] * 3
