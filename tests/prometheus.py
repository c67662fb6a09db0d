"""A real Prometheus, and its checker."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import yaml

from tests.support import ROOT, RunningAgent


def program(name: str) -> Path:
    """The path of Prometheus's program NAME."""
    built = ROOT / "build/prometheus" / name
    found = str(built) if built.exists() else shutil.which(name)
    assert found, f"{name} is missing: make build/prometheus/prometheus"
    return Path(found)


@contextmanager
def prometheus(directory: Path, agent: RunningAgent) -> Iterator[Callable[[str], list[Any]]]:
    """A Prometheus that scrapes AGENT five times a second; yields a function that queries it."""
    # A port that was free on an address of this process alone is still free afterwards.
    pid = os.getpid()
    host = f"127.{64 + (pid >> 16)}.{pid >> 8 & 255}.{pid & 255}"
    with socket.create_server((host, 0)) as free:
        address = f"{host}:{free.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
        "scrape_configs": [
            {"job_name": "coral", "static_configs": [{"targets": [agent.metrics]}]},
        ],
    }
    directory.mkdir()
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program("prometheus"),
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address={address}",
            ],
            stderr=log,
        )

    def query(expression: str) -> list[Any]:
        assert process.poll() is None, (directory / "log").read_text()
        try:
            url = f"http://{address}/api/v1/query?query={quote(expression)}"
            with urlopen(url, timeout=10) as response:
                answer = json.load(response)
        except URLError:  # it is still starting
            return []
        assert answer["status"] == "success"
        found: list[Any] = answer["data"]["result"]
        return found

    try:
        yield query
    finally:
        process.kill()
        process.wait()


def value_of(result: list[Any]) -> float | None:
    """The value of a query that returns at most one sample."""
    if not result:
        return None
    (one,) = result
    return float(one["value"][1])
