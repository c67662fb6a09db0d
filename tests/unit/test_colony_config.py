"""The colony's configuration: what is accepted, and how a refusal names the field and the value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec import Struct
from msgspec.structs import fields

from coral.client import Kind
from coral.client import Tls as ClientTls
from coral.colony.config import Config, ConfigError, load
from coral.colony.config_units import Duration
from coral.colony.follow.wanted import Wanted
from tests.support import ROOT


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "colony.yaml"


def test_by_default_two_kinds_are_wanted_of_the_host_every_ten_seconds() -> None:
    config = load()
    assert [rule.as_wanted() for rule in config.collect] == [
        Wanted(Kind.of(kind), config={"scope": "host", "interval": "10s"}, lease_s=300)
        for kind in ("http_latency", "tcp_metrics")
    ]
    assert config.agents.connecting == 50
    assert config.agents.tls.as_client() is None


def test_values_come_from_the_file_and_flags_override_them(path: Path) -> None:
    path.write_text("""
        data: /srv/coral
        agents:
            addresses: [one:9001, two:9001]
            lost_after: 2h
            tls: {ca: /ca, server_name: agent}
        collect:
          - {kind: cpu_profile, config: {frequency: 19, scope: host}, lease: 60}
          - {kind: syscall_stats, config: {mode: events, pid: 7}}
    """)
    config = load(path, {"agents.addresses": ["unix:/run/one"], "metrics": ""})
    assert config.data == "/srv/coral"
    assert config.metrics == ""
    assert config.agents.addresses == ("unix:/run/one",)
    assert config.agents.lost_after == Duration(7200)
    assert config.agents.tls.as_client() == ClientTls("/ca", server_name="agent")
    assert [rule.as_wanted() for rule in config.collect] == [
        Wanted(
            Kind.of("cpu_profile"), "", {"frequency": "19", "scope": "host", "interval": "10s"}, 60
        ),
        Wanted(Kind.of("syscall_stats"), "", {"mode": "events", "pid": "7"}),
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("agent: {}", "agent: no such key; did you mean `agents`? accepted are name, data,"),
        ("- 1", "a mapping of keys to values is expected"),
        ("a: {", "not YAML: "),
        ("[" * 2000, "not YAML: "),
        ("agents: {connecting: 0}", ("agents.connecting: 0 is not accepted; give a whole number "
         "from 1 to 10,000")),
        ("agents: {addresses: [here]}", ("agents.addresses[0]: 'here' is not accepted; give "
         "HOST:PORT, or unix:PATH")),
        ("agents: {addresses: ['a:99999']}", "agents.addresses[0]: 'a:99999' is not accepted"),
        ("agents: {addresses: ['::1:90']}", "agents.addresses[0]: '::1:90' is not accepted"),
        ("agents: {addresses: ['[::1:90']}", "agents.addresses[0]: '[::1:90' is not accepted"),
        ("agents: {addresses: ['unix:']}", "agents.addresses[0]: 'unix:' is not accepted"),
        ("agents: {addresses: a:1}", "agents.addresses: 'a:1' is not accepted; give a list"),
        ("agents: {dns: [agents]}", ("agents.dns[0]: 'agents' is not accepted; give NAME:PORT, or "
         "_NAME._tcp.DOMAIN")),
        ("agents: {dns_every: 5y}", "agents.dns_every: '5y' is not accepted; give a duration"),
        ("agents: {kubernetes: {service: a}}", ("agents.kubernetes.service: 'a' is not accepted; "
         "give NAMESPACE/NAME")),
        ("agents: {kubernetes: {server: a:6443}}", ("agents.kubernetes.server: 'a:6443' is not "
         "accepted; give https://HOST:PORT")),
        ("agents: {tls: {key: /k}}", "agents.tls.ca: it is missing; give the authorities"),
        ("agents: {tls: {ca: /c, key: /k}}", "agents.tls.certificate: give it too"),
        ("agents: {token_file: \"a\\nb\"}", "agents.token_file: 'a\\nb' has characters that"),
        ("collect: [{}]", "collect[0].kind: it is missing; give text"),
        ("collect: [{kind: http}]", "collect[0].kind: 'http' is not accepted; give one of "),
        ("collect: [{kind: tcp_metric}]", "did you mean `tcp_metrics`? give one of "),
        ("collect: [{kind: tcp_metrics, lease: -1}]", "collect[0].lease: -1 is not accepted"),
        ("collect: [{kind: tcp_metrics}, {kind: tcp_metrics}]",
         "collect[1]: it is the same as collect[0]"),
        ("tls: {key: /k}", "tls.certificate: give it too"),
        ("tokens: [{name: a}]", "tokens[0].file: it is missing; give text"),
        (
            "tokens: [{name: a, file: /t, role: admin}]",
            "tokens[0].role: 'admin' is not accepted; give one of view, operate",
        ),
        ("sql: {memory: lots}", "sql.memory: 'lots' is not accepted; give a size"),
        ("sql: {memory: 1MiB}", "sql.memory: 1048576 is not accepted; give at least 32MiB"),
        ("storage: {memory: 1}", "storage.memory: 1 is not accepted; give at least 32MiB"),
        ("bus: {mode: store}", "bus.servers: bus.mode is store; give at least one server"),
        ("bus: {servers: [a]}", "bus.servers[0]: 'a' is not accepted; give nats://HOST:PORT or"),
        ("bus: {shard: 1}", "bus.shard: 1 is not accepted; give a number below bus.shards, 1"),
        (
            "export: {otlp: {endpoint: a}}",
            "export.otlp.endpoint: 'a' is not accepted; give http://HOST:PORT",
        ),
        ("metrics: here", "metrics: 'here' is not accepted; give HOST:PORT, or nothing"),
        ("log_format: xml", "log_format: 'xml' is not accepted; give one of console, json"),
        ("data: ''", "data: it is empty; give a directory"),
        ("data: /a\ndata: /b", "not YAML: the key 'data' is given twice in line 2, column 1"),
        (f"data: /{'x' * 4096}", "[...] has more than 4,096 bytes"),
        ('data: "/\\e[2J"', "has characters that cannot be printed; give printable text"),
        ("collect: [{kind: cpu_profile, config: {1: a}}]", "config: the key 1 is not text"),
    ],
)  # fmt: skip
def test_what_is_not_accepted_is_named_with_its_path_and_what_is(
    text: str, problem: str, path: Path
) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_flag_that_is_not_accepted_is_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("--agents: agents.addresses[0]: 'x' is not")):
        load(None, {"agents.addresses": ["x"]})


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)


def keys(struct: type[Struct], prefix: str = "") -> list[str]:
    """The path of every value."""
    found = []
    for field in fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, Struct):
            found += keys(field.type, f"{prefix}{field.name}.")
        else:
            found.append(f"{prefix}{field.name}")
    return found


def test_every_key_is_on_the_page() -> None:
    page = (ROOT / "docs/colony.md").read_text()
    assert [key for key in keys(Config) if f"`{key}`" not in page] == []
