"""Fixtures of tests of `coral tap`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import RunningAgent, collectors_at_work, running_agent


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """An agent for all tests of a module."""
    limits = {"limits": {"cpu_percent": 1000}}  # however slow the machine: that is not asked here
    with running_agent(tmp_path_factory.mktemp("tap") / "agent", limits) as running:
        yield running


@pytest.fixture(autouse=True)
def no_collector_left(agent: RunningAgent) -> Iterator[None]:
    """Fails if the test leaves a collector at work."""
    yield
    assert collectors_at_work(agent) == {}
