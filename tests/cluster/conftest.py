"""One cluster for all checks, with the image of this checkout."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cluster.agents import CACHE, Agent, installed
from tests.cluster.node import Cluster, cluster
from tests.containers import build


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that has the image; no agent yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(build, tmp_path_factory.mktemp("image"), CACHE / "image.pem")
        with cluster(CACHE) as it:
            it.load(made.result().archive)
            yield it


@pytest.fixture(scope="session")
def agent(running: Cluster) -> Agent:
    """The agent by the chart, with names of pods, reviews of tokens, and TLS; nothing else of it is
    installed any more."""
    return installed(running)
