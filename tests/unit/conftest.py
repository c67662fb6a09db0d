"""Fixtures of the tests without a kernel."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.scripted import Desk


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    async with desk.supervisor:
        yield desk
