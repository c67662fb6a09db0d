"""A real Prometheus, and its checker; and VictoriaMetrics, which receives OTLP."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import yaml

from tests.support import ROOT, RunningAgent

Query = Callable[[str], list[Any]]


def program(name: str, package: str = "prometheus") -> Path:
    """The path of a program of Debian's PACKAGE."""
    built = ROOT / "build" / package / name
    found = str(built) if built.exists() else shutil.which(name)
    assert found, f"{name} is missing: make build/{package}/{package}"
    return Path(found)


@contextmanager
def prometheus(
    directory: Path, agent: RunningAgent, job: Mapping[str, object] | None = None
) -> Iterator[Query]:
    """A Prometheus that scrapes AGENT twice a second, by what else JOB says; yields a function
    that queries it."""
    address = _free_address()
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms"},
        "scrape_configs": [
            {"job_name": "coral", "static_configs": [{"targets": [agent.metrics]}], **(job or {})},
        ],
    }
    directory.mkdir()
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = (
        str(program("prometheus")),
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address={address}",
    )
    with _queried(command, address, directory) as query:
        yield query


@contextmanager
def written_prometheus(directory: Path) -> Iterator[tuple[str, Query]]:
    """A Prometheus that scrapes nothing; yields the URL at which it receives remote write, and a
    function that queries it."""
    address = _free_address()
    directory.mkdir()
    (directory / "prometheus.yml").write_text("{}")
    command = (
        str(program("prometheus")),
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address={address}",
        "--web.enable-remote-write-receiver",
    )
    with _queried(command, address, directory) as query:
        yield f"http://{address}/api/v1/write", query


@contextmanager
def victoria_metrics(directory: Path) -> Iterator[tuple[str, Query]]:
    """A VictoriaMetrics; yields the endpoint at which it receives OTLP over HTTP, and a function
    that queries it."""
    address = _free_address()
    directory.mkdir()
    command = (
        str(program("victoria-metrics", "victoria-metrics")),
        f"-httpListenAddr={address}",
        f"-storageDataPath={directory}/data",
        "-opentelemetry.usePrometheusNaming",
        "-search.latencyOffset=1ms",
        "-memory.allowedBytes=64MB",
    )
    with _queried(command, address, directory) as query:

        def query_all(expression: str) -> list[Any]:
            # By itself it shows new series only after some seconds.
            with suppress(OSError), urlopen(f"http://{address}/internal/force_flush", timeout=30):
                pass
            return query(expression)

        yield f"http://{address}/opentelemetry", query_all


def _free_address() -> str:
    # A port that was free on an address of this process alone is still free afterwards.
    pid = os.getpid()
    host = f"127.{64 + (pid >> 16)}.{pid >> 8 & 255}.{pid & 255}"
    with socket.create_server((host, 0)) as free:
        return f"{host}:{free.getsockname()[1]}"


@contextmanager
def _queried(command: Sequence[str], address: str, directory: Path) -> Iterator[Query]:
    """COMMAND, running, as something that answers PromQL at ADDRESS."""
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)

    def query(expression: str) -> list[Any]:
        assert process.poll() is None, (directory / "log").read_text()
        try:
            url = f"http://{address}/api/v1/query?query={quote(expression)}"
            with urlopen(url, timeout=10) as response:
                answer = json.load(response)
        except OSError:  # it is still starting, or kept waiting
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
