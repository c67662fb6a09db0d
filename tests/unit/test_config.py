"""The agent's configuration: three sources, and errors with the path to the value."""

from __future__ import annotations

from pathlib import Path

import pytest

from coral.agent.config import Config, ConfigError, load


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agent.yaml"
    path.write_text(text)
    return path


def test_without_any_source_the_defaults_hold() -> None:
    config = load(environment={})
    assert config == Config()
    assert float(config.limits.max_duration) == 300
    assert config.limits.concurrent_collectors == 3
    assert config.listen == ("unix:/run/coral/agent.sock",)


def test_flags_win_over_environment_and_environment_over_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "agent_id: file\nmetrics: file:1\nlog_format: json\nlimits: {max_duration: 10m}\n"
        "services: {shop: {comm: nginx}}\n",
    )
    environment = {
        "CORAL__AGENT_ID": "environment",
        "CORAL__METRICS": "environment:1",
        "CORAL__LISTEN": "unix:/a, 127.0.0.1:1",
        "CORAL__LIMITS__CONCURRENT_COLLECTORS": "7",
        "CORAL__LIMITS__REPLAY_BYTES": "1MiB",
        "CORAL_AGENT_SERVICE_HOST": "set by Kubernetes, not by us",
    }
    config = load(path, environment, {"metrics": ""})
    assert config.agent_id == "environment"
    assert config.metrics == ""
    assert config.log_format == "json"
    assert config.listen == ("unix:/a", "127.0.0.1:1")
    assert float(config.limits.max_duration) == 600
    assert config.limits.concurrent_collectors == 7
    assert config.limits.replay_bytes == 1 << 20
    assert config.services["shop"].comm == "nginx"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limits: {max_durtion: 10m}", "limits: Object contains unknown field `max_durtion`"),
        ("verbose: true", "top level: Object contains unknown field `verbose`"),
        ("limits: {concurrent_collectors: three}", "limits.concurrent_collectors: Expected `int`"),
        ("limits: {concurrent_collectors: 0}", "limits.concurrent_collectors: Expected `int` >= 1"),
        ("limits: {max_duration: soon}", "limits.max_duration: a duration such as 500ms, 30s"),
        ("limits: {max_duration: 0}", "limits.max_duration: Expected a duration"),
        ("limits: {replay_bytes: 4 MB}", "limits.replay_bytes: Expected a size"),
        ("listen: 5", r"listen: Expected `array`, got `int` \(found 5\)"),
        ("log_format: xml", "log_format: Invalid enum value 'xml'"),
        ("services: {shop: {}}", "services.shop: exactly one of comm, cgroup, pid_file"),
        ("services: {shop: {comm: a, cgroup: b}}", "services.shop: exactly one of"),
        ("[1, 2]", "a mapping of keys to values is expected"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_path(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path, {})
    assert str(path) in str(caught.value) or "services.shop" in str(caught.value)


def test_a_bad_variable_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"^CORAL__LIMITS__CONCURRENT_COLLECTORS: limits"):
        load(environment={"CORAL__LIMITS__CONCURRENT_COLLECTORS": "x"})
    with pytest.raises(ConfigError, match=r"^CORAL__SPEED: top level: .* unknown field `speed`"):
        load(environment={"CORAL__SPEED": "1"})
    with pytest.raises(ConfigError, match=r"^CORAL__METRICS__PORT: "):
        load(environment={"CORAL__METRICS": "a:1", "CORAL__METRICS__PORT": "1"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        load(tmp_path / "none.yaml", {})
