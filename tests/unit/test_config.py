"""The agent's configuration: three sources, and errors with the path to the value."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import msgspec
import pytest
from click.testing import CliRunner

from coral.agent.config import Config, ConfigError, Duration, Limits, load
from coral.agent.serving.server import _options
from coral.cli.agent_command import agent
from tests.support import coral


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
        (
            "limits: {max_durtion: 10m}",
            "yaml: limits.max_durtion: no such key; did you mean `max_duration`\\? accepted are c",
        ),
        (
            "limit: {}",
            "yaml: limit: no such key; did you mean `limits`\\? accepted are agent_id, user, ",
        ),
        ("verbose: true", "yaml: verbose: no such key; accepted are agent_id, user, listen"),
        ("5: 5", "yaml: 5: no such key; accepted are agent_id"),
        (
            "limits: {concurrent_collectors: three}",
            "concurrent_collectors: 'three' is not accepted; give a whole number from 1 to 1,000,0",
        ),
        (
            "limits: {concurrent_collectors: 0}",
            "limits.concurrent_collectors: 0 is not accepted; give a whole number from 1 to 1,000,",
        ),
        (
            "limits: {max_duration: 5 parsecs}",
            (
                "yaml: limits.max_duration: '5 parsecs' is not accepted; give a duration such as "
                "500ms, 30s or 5m, from 1ms to 366 days$"
            ),
        ),
        ("limits: {max_duration: 0}", "limits.max_duration: 0 is not accepted; give a duration"),
        (
            "limits: {replay_bytes: 4 MB}",
            "limits.replay_bytes: '4 MB' is not accepted; give a size such as 65536, 64KiB or 8M",
        ),
        ("limits: 5", "yaml: limits: 5 is not accepted; give a mapping of keys to values$"),
        ("listen: 5", "yaml: listen: 5 is not accepted; give a list$"),
        ("listen: [5]", r"yaml: listen\[0\]: 5 is not accepted; give text$"),
        ("agent_id: [a]", "yaml: agent_id: a list is not accepted; give text$"),
        ("agent_id: null", "yaml: agent_id: null is not accepted; give text$"),
        (
            "policy: {host_scope: 5m}",
            "policy.host_scope: '5m' is not accepted; give true or false$",
        ),
        ("log_format: xml", "log_format: 'xml' is not accepted; give one of console, json$"),
        (
            "services: {shop: {coom: a}}",
            "services.shop.coom: no such key; did you mean `comm`\\? accepted are comm, cgroup, pi",
        ),
        ("services: {shop: {comm: 5}}", "yaml: services.shop.comm: 5 is not accepted; give text$"),
        ("services: {5: {comm: a}}", "yaml: services: the key 5 is not text; put it in quotes$"),
        ("continuous: [{}]", r"continuous\[0\].kind: it is missing; give text$"),
        (
            "continuous: [{kind: syscall_stats, config: {top: [5]}}]",
            r"yaml: continuous\[0\].config.top: a list is not accepted; give text$",
        ),
        ("services: {shop: {}}", "yaml: services.shop: exactly one of comm, cgroup, pid_file"),
        (
            "services: {shop: {pod: a/b, comm: c}}",
            "yaml: services.shop: exactly one of comm, cgroup, pid_file, pod, pods, namespace",
        ),
        (
            "services: {shop: {workload: shop/web}}",
            (
                "yaml: services.shop.workload: 'shop/web' is not accepted; give "
                "NAMESPACE/KIND/NAME, such as shop/deploy/checkout"
            ),
        ),
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
    assert str(caught.value).startswith(f"{path}: ")


def test_a_bad_variable_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"^CORAL__LIMITS__CONCURRENT_COLLECTORS: limits"):
        load(environment={"CORAL__LIMITS__CONCURRENT_COLLECTORS": "x"})
    with pytest.raises(ConfigError, match=r"^CORAL__SPEED: speed: no such key; accepted"):
        load(environment={"CORAL__SPEED": "1"})
    with pytest.raises(ConfigError, match=r"^CORAL__METRICS__PORT: "):
        load(environment={"CORAL__METRICS": "a:1", "CORAL__METRICS__PORT": "1"})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: No such file"):
        load(tmp_path / "none.yaml", {})


NEAREST = (
    "is not accepted; did you mean `syscall_stats`? give one of syscall_stats, http_latency, "
    "cpu_profile, tcp_metrics"
)
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{last}'] * 10)}]\n"
    for last, this in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("policy: {collectors: [syscal_stats]}", f"policy.collectors: 'syscal_stats' {NEAREST}"),
        ("policy: {collectors: [SYSCALL_STATS]}", f"policy.collectors: 'SYSCALL_STATS' {NEAREST}"),
        (
            "continuous: [{kind: tcp}]",
            "continuous[0].kind: 'tcp' is not accepted; give one of syscall_stats, tcp_metrics",
        ),
        (
            "continuous: [{kind: syscall_stats, config: {intervall: 1s}}]",
            "continuous[0].config.intervall: no such option; did you mean `interval`? accepted",
        ),
        (
            'continuous: [{kind: syscall_stats, config: {cgroup: "a\\0b"}}]',
            "continuous[0].config.cgroup: 'a\\x00b' has characters that cannot be printed",
        ),
        ('agent_id: "a\\e[31m"', "agent_id: 'a\\x1b[31m' has characters that cannot be printed"),
        (f"agent_id: {'x' * 129}", "agent_id: a name of at most 128 bytes is expected"),
        (f"services: {{{'x' * 129}: {{comm: a}}}}", ": a name of at most 128 bytes is expected"),
        (f"user: {'x' * 5000}", "has more than 4,096 bytes"),
        ("limits: {max_duration: .inf}", "limits.max_duration: inf is not accepted; give a dura"),
        ("limits: {max_duration: .nan}", "limits.max_duration: nan is not accepted; give a dura"),
        ("limits: {max_duration: -1}", "limits.max_duration: -1 is not accepted; give a duration"),
        ("limits: {max_duration: 9000h}", "limits.max_duration: '9000h' is not accepted; give a d"),
        (f"limits: {{max_duration: {'9' * 400}s}}", "999[...] is not accepted; give a duration"),
        ("limits: {keepalive: 0.0005}", "limits.keepalive: 0.0005 is not accepted; give a durat"),
        (
            "limits: {keepalive: 25h, connection_age: 600h}",
            "connection_age: 36000m is not accepted; give a duration of at most 24 days",
        ),
        ("limits: {memory: 2048GiB}", "limits.memory: '2048GiB' is not accepted; give a size"),
        ("limits: {cpu_percent: .inf}", "limits.cpu_percent: inf is not accepted; give a num"),
        ("limits: {cpu_percent: .nan}", "limits.cpu_percent: "),
        ("limits: {cpu_percent: -5}", "-5 is not accepted; give a number more than 0, at most 1,"),
        ("limits: {prometheus_series: 10000000}", "10000000 is not accepted; give a whole num"),
        ("listen: []", "listen: at least one address is expected"),
        ('listen: [""]', "listen: at least one address is expected"),
        ("listen: ['unix:/a?mode=7']", "listen: unix:/a?mode=7: mode=7 is not accepted; give 0600"),
        ("tls: {certificate: a}", "tls.key: give it too: a certificate and its key belong tog"),
        ("tls: {key: a}", "tls.certificate: give it too"),
        ("tls: {client_ca: a}", "tls.certificate: clients can show theirs only where there is TLS"),
        ("tls: {certificate: a, key: b}", "tls.client_ca: give the authorities of clients'"),
        (
            "tls: {certificate: a, key: b, client_ca: c, client_certificates: none}",
            "tls.client_ca: tls.client_certificates is none, so nothing would use it",
        ),
        ("health: nowhere", "health: 'nowhere' is not accepted; give HOST:PORT, or nothing"),
        ("{metrics: '', metrics_web_config: a}", "metrics_web_config: there is no address in"),
        ("agent_id: a\nagent_id: b", "not YAML: the key 'agent_id' is given twice in line 2"),
        ("limits: {memory: 1GiB, memory: 2GiB}", "the key 'memory' is given twice"),
        (LAUGHS, "with its aliases resolved, it has too many values"),
        ("a: &a [*a]", "with its aliases resolved, it has too many values"),
        ("[" * 5000, "it is nested too deeply in line 1"),
        ("agent_id: 2026-13-45", "a value that does not fit its type"),
        ("agent_id: !!python/object:os.system x", "could not determine a constructor"),
        ("agent_id: !!int x", "a value that does not fit its type"),
        ("a: b\n" + "#" * (256 << 10), "it has more than 262,144 bytes"),
    ],
)
def test_a_senseless_value_is_refused_in_one_line_with_what_is_accepted(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), {})
    told = str(caught.value)
    assert message in told
    assert "\n" not in told
    assert len(told) < 1000


def test_aliases_that_stay_small_are_accepted(tmp_path: Path) -> None:
    config = load(write(tmp_path, "services: {a: &rule {comm: nginx}, b: *rule}"), {})
    assert config.services["a"] == config.services["b"]


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (os.mkfifo, "it is not a regular file"),
        (lambda path: path.write_bytes(b"a: 1\nagent_id: \xff"), "not UTF-8: byte 0xff in line 2"),
        (lambda path: path.write_bytes(b"\0"), "not YAML: "),
    ],
    ids=["directory", "fifo", "latin1", "nul"],
)
def test_a_file_that_is_no_text_is_refused_at_once(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "agent.yaml"
    make(path)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path, {})
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "listens"),
    [
        (["unix:/a,127.0.0.1:1"], ["unix:/a", "127.0.0.1:1"]),
        (["unix:/a", "127.0.0.1:1, 127.0.0.1:2"], ["unix:/a", "127.0.0.1:1", "127.0.0.1:2"]),
        ([","], []),
    ],
)
def test_addresses_in_one_flag_are_split_as_in_the_environment(
    given: list[str], listens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []

    def main(_path: Path | None, flags: dict[str, object]) -> int:
        found.append(flags["listen"])
        return 0

    monkeypatch.setattr("coral.agent.main.main", main)
    arguments = [argument for each in given for argument in ("--listen", each)]
    assert CliRunner().invoke(agent, arguments).exit_code == 0
    assert found == [listens]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("listen: []", "listen: at least one address is expected"),
        ("limits: {keepalive: .inf}", "limits.keepalive: inf is not accepted; give a duration"),
        ("a: 1\na: 2", "not YAML: the key 'a' is given twice in line 2, column 1"),
        ("continuous: [{kind: syscall_stats}]", "continuous[0]: name a service, or one of pid, "),
        (None, "Is a directory"),
    ],
    ids=["listen", "inf", "twice", "no target", "directory"],
)
def test_the_agent_ends_with_status_2_and_one_line(
    text: str | None, told: str, tmp_path: Path
) -> None:
    path = tmp_path if text is None else write(tmp_path, text)
    done = subprocess.run(
        coral("agent", "--config", str(path)), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("coral agent: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


LONGEST = Duration(366 * 86_400.0)
DURATIONS_OF_GRPC = [
    name
    for name, kind in get_type_hints(Limits).items()
    if kind is Duration
    and _options(msgspec.structs.replace(Limits(), **{name: LONGEST})) != _options(Limits())
]


def test_the_durations_of_grpc_are_found() -> None:
    assert len(DURATIONS_OF_GRPC) >= 3


@pytest.mark.parametrize("name", DURATIONS_OF_GRPC)
def test_each_duration_that_grpc_keeps_is_one_that_it_can_keep(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"limits\.{name}: .* at most 24 days$"):
        load(None, {f"CORAL__LIMITS__{name.upper()}": "8784h"})
    accepted = load(None, {f"CORAL__LIMITS__{name.upper()}": "576h"})
    assert max(value for _, value in _options(accepted.limits)) < 1 << 31


STATS = "continuous: [{kind: syscall_stats, "


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "continuous: [{kind: syscall_stats}]",
            (
                "continuous[0]: name a service, or one of pid, comm, cgroup, pod, pods, namespace, "
                "workload, container, scope in config"
            ),
        ),
        (
            STATS + "service: shop, config: {top: x}}]",
            "continuous[0].config.top: 'x' is not accepted; give a whole number from 0 to 10240",
        ),
        (
            STATS + "config: {scope: all}}]",
            "continuous[0].config.scope: 'all' is not accepted; give host",
        ),
        (
            STATS + "config: {pid: me}}]",
            (
                "continuous[0].config.pid: 'me' is not accepted; give process ids, such as 1234 or "
                "1234,5678"
            ),
        ),
        (
            STATS + "config: {pid: 1, scope: host}}]",
            (
                "continuous[0].config.scope: 'host' is not accepted; give only one of pid, comm, "
                "cgroup, pod, pods, namespace, workload, container, scope; pid is given too"
            ),
        ),
        (
            STATS + "service: shop, config: {comm: a, until_exit: true}}]",
            (
                "continuous[0].config.until_exit: 'true' is not accepted; give it with pid or a "
                "service only"
            ),
        ),
        (
            STATS + "config: {scope: host, sample: 5}}]",
            "continuous[0].config.sample: '5' is not accepted; give it with mode=events only",
        ),
        (
            "services: {shop: {comm: a-name-of-16-byt}}",
            (
                "services.shop.comm: 'a-name-of-16-byt' is not accepted; give a command name of at "
                "most 15 bytes, as the kernel cuts them off there"
            ),
        ),
        (
            "services: {shop: {pid_file: run/shop.pid}}",
            "services.shop.pid_file: 'run/shop.pid' is not accepted; give an absolute path",
        ),
        ("metrics: nowhere", "metrics: 'nowhere' is not accepted; give HOST:PORT, or nothing"),
    ],
)
def test_what_can_never_work_is_refused_at_load(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    assert str(caught.value) == f"{path}: {problem}"


def test_what_depends_on_the_machine_is_not_checked_at_load(tmp_path: Path) -> None:
    options = "{pid: 4194303}", "{cgroup: /not/there}", "{comm: not-there}"
    rules = ", ".join(f"{{kind: syscall_stats, config: {one}}}" for one in options)
    config = load(write(tmp_path, f"continuous: [{rules}, {{kind: tcp_metrics, service: x}}]"), {})
    assert len(config.continuous) == 4


def test_numbers_and_booleans_are_options_as_in_a_request(tmp_path: Path) -> None:
    text = STATS + "config: {scope: host, top: 5, interval: 0.5, follow_children: false}}]"
    config = load(write(tmp_path, text), {})
    assert config.continuous[0].config == {
        "scope": "host",
        "top": "5",
        "interval": "0.5",
        "follow_children": "false",
    }


def test_a_later_check_names_the_source_of_the_value(tmp_path: Path) -> None:
    path = write(tmp_path, "listen: [unix:/a]\npolicy: {collectors: [x]}\n")
    with pytest.raises(ConfigError, match=rf"^{path}: policy\.collectors: 'x' is not accepted"):
        load(path, {})
    environment = {"CORAL__POLICY__COLLECTORS": "y"}
    with pytest.raises(ConfigError, match=r"^CORAL__POLICY__COLLECTORS: policy\.collectors: 'y'"):
        load(path, environment)
    with pytest.raises(ConfigError, match=r"^--metrics: metrics: 'a' is not accepted"):
        load(None, {"CORAL__METRICS": "b"}, {"metrics": "a"})
    with pytest.raises(ConfigError, match=r"^--listen: listen: at least one address"):
        load(path, {}, {"listen": []})
