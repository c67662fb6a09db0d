"""The metrics port with a web configuration, as a real Prometheus and curl meet it; and health on a
port of its own."""

from __future__ import annotations

import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import urlopen

import bcrypt
import pytest
import yaml

from tests.certificates import Authority
from tests.prometheus import prometheus, value_of
from tests.support import RunningAgent, running_agent, wait_until

PASSWORD: Final = "correct horse"
FILES: Final = {
    "cert_file": "server.crt",
    "key_file": "server.key",
    "client_auth_type": "RequireAndVerifyClientCert",
    "client_ca_file": "ca.crt",
}


def write(directory: Path, **content: Mapping[str, Any]) -> Path:
    path = directory / "web.yml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One that has signed the agent's certificate, and a client's."""
    found = Authority()
    found.write(tmp_path / "ca.crt")
    found.sign("localhost", "127.0.0.1").write(tmp_path, "server")
    found.sign("prometheus.monitoring").write(tmp_path, "client")
    return found


@contextmanager
def guarded(directory: Path, **web: Mapping[str, Any]) -> Iterator[RunningAgent]:
    config = {"metrics_web_config": str(write(directory, **web)), "health": "127.0.0.1:0"}
    with running_agent(directory / "agent", config) as agent:
        yield agent


def curl(agent: RunningAgent, *options: str) -> str:
    """The status of /metrics, or curl's own error as a negative number."""
    ran = subprocess.run(
        [
            "curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}",
            "--max-time", "20", f"https://{agent.metrics}/metrics", *options,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ran.stdout if ran.returncode == 0 else f"-{ran.returncode}"


def test_prometheus_scrapes_by_mtls_and_password_and_others_do_not(
    authority: Authority, tmp_path: Path
) -> None:
    hashed = bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(10)).decode()
    web: dict[str, Mapping[str, Any]] = {
        "tls_server_config": {**FILES, "client_allowed_sans": ["prometheus.monitoring"]},
        "http_server_config": {"headers": {"X-Frame-Options": "deny"}},
        "basic_auth_users": {"prometheus": hashed},
    }
    client = {
        "ca_file": str(tmp_path / "ca.crt"),
        "cert_file": str(tmp_path / "client.crt"),
        "key_file": str(tmp_path / "client.key"),
    }
    job = {
        "scheme": "https",
        "tls_config": client,
        "basic_auth": {"username": "prometheus", "password": PASSWORD},
        "scrape_timeout": "2s",
        "scrape_interval": "2s",
    }
    trusts = ("--cacert", client["ca_file"])
    shows = (*trusts, "--cert", client["cert_file"], "--key", client["key_file"])
    knows = ("--user", f"prometheus:{PASSWORD}")
    with guarded(tmp_path, **web) as agent:
        with prometheus(tmp_path / "prometheus", agent, job) as query:
            wait_until(lambda: value_of(query('up{job="coral"}')) == 1, timeout_s=30)
            expiry = 'coral_tls_certificate_expiry_timestamp_seconds{file="certificate"}'
            wait_until(lambda: value_of(query(f"{expiry} - time() > 3600")), timeout_s=30)
        assert curl(agent, *shows, *knows) == "200"
        assert curl(agent, *shows) == "401"
        assert curl(agent, *shows, "--user", "prometheus:guess") == "401"
        assert curl(agent, *shows, "--user", f"other:{PASSWORD}") == "401"
        assert int(curl(agent, *trusts, *knows)) < 0  # no certificate
        assert int(curl(agent, *shows[2:], *knows)) < 0  # it does not trust the agent's
        assert int(curl(agent, *shows, *knows, "--tls-max", "1.1")) < 0
        other, key = authority.sign("other").write(tmp_path, "other")
        named = (*trusts, "--cert", str(other), "--key", str(key))
        assert curl(agent, *named, *knows) == "403"
        # In place: the next connection has the new certificate, and the user is gone.
        pair = authority.sign("localhost", "127.0.0.1")
        pair.write(tmp_path, "server")
        web["basic_auth_users"] = {"ann": hashed}
        write(tmp_path, **web)
        wait_until(lambda: curl(agent, *shows, *knows) == "401")
        assert curl(agent, *shows, "--user", f"ann:{PASSWORD}") == "200"
        host, _, port = agent.metrics.rpartition(":")
        wait_until(lambda: serial(host, int(port), tmp_path) == pair.serial)
        assert not any("error" in line.get("level", "") for line in agent.log())  # type: ignore[operator]


def serial(host: str, port: int, directory: Path) -> int:
    """Of the certificate that a new connection is shown."""
    ca = directory / "ca.crt"
    pem = ssl.get_server_certificate((host, port), ca_certs=str(ca), timeout=60)
    from cryptography import x509  # noqa: PLC0415

    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def test_health_has_a_port_of_its_own_without_metrics(authority: Authority, tmp_path: Path) -> None:
    del authority
    with guarded(tmp_path, tls_server_config=FILES) as agent:
        (line,) = [line for line in agent.log() if line["event"] == "listening"]
        health = f"http://{line['health']}"

        def page(path: str) -> tuple[int, str]:
            try:
                with urlopen(f"{health}{path}", timeout=60) as response:
                    return response.status, response.read().decode()
            except HTTPError as error:
                return error.code, error.read().decode()

        assert page("/healthz") == (200, "ok\n")
        found = page("/readyz")  # it may still probe the kernel
        assert found in ((200, "ready\n"), (503, "the kernel is being probed\n"))
        wait_until(lambda: page("/readyz") == (200, "ready\n"))
        assert page("/metrics")[0] == 404
