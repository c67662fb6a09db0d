"""Fixtures of the tests without a kernel."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings

from coral.agent import logs
from tests.scripted import Desk

# As the agent logs: structlog's own way takes seconds to draw a traceback.
logs.configure("console", "info")

# A busy machine takes its time.
settings.register_profile(
    "coral", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("coral")


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    async with desk.supervisor:
        yield desk
