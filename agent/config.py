"""The agent's configuration: a YAML file, the environment, flags; later sources override earlier.

Every value is typed. An unknown key or a wrong type is a `ConfigError` with the path to the value.
docs/configuration.md is generated from this file.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

from coral.agent import config_otlp, config_tls
from coral.agent.addresses import ACCEPTED, is_unix, unix_address
from coral.agent.config_access import Audit, RoleRule, problem
from coral.agent.config_access import Auth as Auth  # noqa: PLC0414  others have it from here
from coral.agent.config_file import read_yaml
from coral.agent.config_kubernetes import Kubernetes
from coral.agent.config_otlp import Otlp
from coral.agent.config_tls import Tls
from coral.agent.config_units import ByteCount as ByteCount  # noqa: PLC0414
from coral.agent.config_units import Duration as Duration  # noqa: PLC0414
from coral.agent.config_words import choices, first_problem, shown
from coral.collectors.options import (
    OptionError,
    UnknownOptionError,
    format_duration,
    parse_duration_s,
)
from coral.collectors.selectors import SELECTORS
from coral.collectors.selectors import parse as parse_selector
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name, kind_of
from coral.wire.text import is_printable, safe

# The kinds of the contract, as users write them; an agent may lack some of them.
KINDS: Final = tuple(kind_name(kind) for kind in pb.EbpfCollectorKind.values() if kind)
ENV_PREFIX: Final = "CORAL__"
DEFAULT_SOCKET: Final = "unix:/run/coral/agent.sock"
MAX_PORT: Final = 65535  # gRPC accepts a greater one, and listens on its lower 16 bits
_SIZE: Final = re.compile(r"([0-9]{1,15})(KiB|MiB|GiB)?")
_MOST_SIZE_BYTES: Final = 1 << 40
_LEAST_S: Final = 1e-3
_MOST_S: Final = 366 * 86_400.0
# gRPC keeps these in milliseconds, in a signed number of 32 bits.
_MOST_GRPC_S: Final = 24 * 86_400.0
_GRPC_DURATIONS: Final = ("connection_age", "connection_idle", "keepalive")
_MOST_TEXT_BYTES: Final = 4096
_MOST_NAME_BYTES: Final = 128
_MOST_COMM_BYTES: Final = 15  # as in collectors/targets.py, which only a running agent needs
_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


class ConfigError(ValueError):
    """A configuration is not accepted; the message, one line, has the source, the path and the
    value."""

    def __init__(self, message: str) -> None:
        super().__init__("; ".join(safe(line) for line in message.splitlines()))


def _for_each_cpu(percent: float) -> float:
    return percent * (os.cpu_count() or 1)


Positive = Annotated[int, Meta(ge=1, le=1_000_000)]


class Limits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the agent may spend."""

    concurrent_collectors: Annotated[
        Positive, Meta(description="how many collectors on demand may run at a time")
    ] = 3
    max_duration: Annotated[Duration, Meta(description="the longest lease")] = Duration(300)
    default_duration: Annotated[
        Duration,
        Meta(description="the lease of a request without a duration, at most `max_duration`"),
    ] = Duration(300)
    memory: Annotated[
        ByteCount,
        Meta(
            description="maps in the kernel and buffers in the agent, for all collectors together"
        ),
    ] = ByteCount(512 << 20)
    cpu_percent: Annotated[
        float,
        Meta(
            gt=0,
            le=1_000_000,
            description="CPU time that all collectors together may cause, in percent of one CPU "
            "over 10 s; by default 25 for each CPU of the machine",
        ),
    ] = field(default_factory=lambda: _for_each_cpu(25))
    continuous_cpu_percent: Annotated[
        float,
        Meta(
            gt=0,
            le=1_000_000,
            description="the part of it that continuous collectors may cause while no person "
            "watches them; by default 5 for each CPU of the machine",
        ),
    ] = field(default_factory=lambda: _for_each_cpu(5))
    subscriber_bytes_per_second: Annotated[
        ByteCount, Meta(description="the rate for one subscriber; events beyond it are lost")
    ] = ByteCount(10 << 20)
    stalled_subscriber: Annotated[
        Duration, Meta(description="end a subscription that has not been read for this long")
    ] = Duration(30)
    connection_age: Annotated[
        Duration, Meta(description="close connections of this age; clients reconnect and resume")
    ] = Duration(3600)
    keepalive: Annotated[
        Duration, Meta(description="ping a connection that has been silent for this long")
    ] = Duration(20)
    replay_bytes: Annotated[
        ByteCount, Meta(description="how much of its stream a session keeps for later subscribers")
    ] = ByteCount(4 << 20)
    subscriber_queue_bytes: Annotated[
        ByteCount, Meta(description="the queue of one subscriber, at most and by default")
    ] = ByteCount(8 << 20)
    ended_sessions: Annotated[
        Duration, Meta(description="how long an ended session's stream can still be read")
    ] = Duration(60)
    ended_bytes: Annotated[
        ByteCount,
        Meta(
            description="how much the streams of ended sessions may keep; it counts towards "
            "`memory`, where ended sessions give way before collectors at work"
        ),
    ] = ByteCount(16 << 20)
    prometheus_series: Annotated[
        Positive,
        Meta(description="label sets in each collector's metrics; further ones are `other`"),
    ] = 200
    connections: Annotated[
        Positive,
        Meta(
            description="connections at a time, over TCP and over unix sockets each; fewer where "
            "they would take more than a quarter of the agent's descriptors (`RLIMIT_NOFILE`), or, "
            "over TCP, a quarter of those that the agent and its collectors leave"
        ),
    ] = 256
    connections_per_peer: Annotated[
        Positive,
        Meta(
            description="connections at a time of one user of this machine; over unix sockets, "
            "root and the agent's own user need only stay within `connections`"
        ),
    ] = 128
    connection_handshake: Annotated[
        Duration, Meta(description="close connections that have not begun HTTP/2 in this time")
    ] = Duration(5)
    connection_idle: Annotated[
        Duration, Meta(description="close connections without a call for this long")
    ] = Duration(300)
    peer_bytes_per_second: Annotated[
        ByteCount,
        Meta(description="how fast one peer may send, over all its connections; more has to wait"),
    ] = ByteCount(1 << 20)
    peer_calls_per_second: Annotated[
        Positive,
        Meta(
            description="how many calls a second one peer may begin, over all its connections; "
            "more have to wait"
        ),
    ] = 1000
    calls_per_connection: Annotated[
        Positive,
        Meta(description="calls under way on one connection; clients let further ones wait"),
    ] = 100
    http2_streams_per_peer: Annotated[
        Positive,
        Meta(
            description="HTTP/2 streams that one user of this machine may have open, over all its "
            "connections: calls that wait for their request, or whose answer is not read, count "
            "too; a connection that opens more is closed"
        ),
    ] = 1000
    calls: Annotated[
        Positive,
        Meta(
            description="calls under way that are answered once, over TCP and over unix sockets "
            "each"
        ),
    ] = 400
    calls_per_peer: Annotated[
        Positive, Meta(description="such calls of one user of this machine")
    ] = 100
    streams: Annotated[
        Positive,
        Meta(
            description="subscriptions and watches at a time, over TCP and over unix sockets each"
        ),
    ] = 256
    streams_per_peer: Annotated[
        Positive, Meta(description="subscriptions and watches of one user of this machine")
    ] = 128


class Policy(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What callers may ask for."""

    collectors: Annotated[
        tuple[str, ...], Meta(description="the kinds that callers may start; empty: all")
    ] = ()
    host_scope: Annotated[
        bool, Meta(description="whether collectors may watch every process of the machine")
    ] = True
    cgroups: Annotated[
        tuple[str, ...],
        Meta(
            description="the cgroups whose processes callers may watch, each with those below it; "
            "with `services` empty too: all"
        ),
    ] = ()
    services: Annotated[
        tuple[str, ...],
        Meta(
            description="the services that callers may watch, by name or by a pattern such as "
            "`shop-*`; with `cgroups` empty too: all"
        ),
    ] = ()
    allow_agent: Annotated[
        bool, Meta(description="whether callers may watch the agent's own process")
    ] = False
    allow_init: Annotated[
        bool, Meta(description="whether callers may watch process 1, which starts all others")
    ] = False
    observe_only: Annotated[
        bool,
        Meta(description="drop CAP_SYS_ADMIN; refuse collectors that need it on this kernel"),
    ] = False


class ServiceRule(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to find a service's processes."""

    comm: Annotated[str, Meta(description="the processes with this command name")] = ""
    cgroup: Annotated[str, Meta(description="the processes in this cgroup and below it")] = ""
    pid_file: Annotated[str, Meta(description="the process whose id is in this file")] = ""
    pod: Annotated[
        str, Meta(description="a pod, `NAMESPACE/POD`, or one of its containers, with `/CONTAINER`")
    ] = ""
    pods: Annotated[
        str, Meta(description="the pods with some labels, also later ones: `NAMESPACE?app=web`")
    ] = ""
    namespace: Annotated[str, Meta(description="the pods of this namespace, also later ones")] = ""
    workload: Annotated[
        str,
        Meta(
            description="the pods of a workload, also later ones: `NAMESPACE/KIND/NAME`, such as "
            "`shop/deploy/checkout`"
        ),
    ] = ""
    container: Annotated[str, Meta(description="a container, by its id or the beginning of it")] = (
        ""
    )

    @property
    def selectors(self) -> dict[str, str]:
        """Those of pods and containers, by key."""
        return {key: text for key in SELECTORS if (text := getattr(self, key))}


class Continuous(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A collector that runs for as long as the agent."""

    kind: Annotated[str, Meta(description="the kind of collector")]
    service: Annotated[
        str, Meta(description="the service to watch; a label only, where `config` names processes")
    ] = ""
    config: Annotated[
        dict[str, str],
        Meta(
            description="its options, as in a request; without `service`, one of those that name a "
            "target is needed, such as `comm`, `namespace` or `scope`"
        ),
    ] = field(default_factory=dict)


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration."""

    agent_id: Annotated[str, Meta(description="this agent's id; empty: the host name")] = ""
    user: Annotated[
        str,
        Meta(
            description="the user to become when started as root, by name or number; see "
            "[privileges](privileges.md)"
        ),
    ] = ""
    listen: Annotated[
        tuple[str, ...],
        Meta(
            description="addresses for gRPC, each `HOST:PORT`, with `tls` if it is beyond "
            "loopback, or `unix:PATH`; a socket for others than its owner is "
            "`unix:PATH?mode=0660&group=GROUP`, whose callers roles know as `socket:view`, or as "
            "`socket:NAME` with `&name=NAME`"
        ),
    ] = (DEFAULT_SOCKET,)
    metrics: Annotated[
        str,
        Meta(
            description="the address that serves /metrics to Prometheus; empty: none; beyond "
            "loopback, whoever reaches it can read it, unless `metrics_web_config` says otherwise"
        ),
    ] = "127.0.0.1:9464"
    metrics_web_config: Annotated[
        str,
        Meta(
            description="a file in the web configuration format of Prometheus' exporter-toolkit, "
            "with TLS and passwords for `metrics`; read again when it changes; see [TLS](tls.md)"
        ),
    ] = ""
    health: Annotated[
        str,
        Meta(
            description="an address that serves /healthz and /readyz alone, in plain HTTP; "
            "`metrics` serves them too"
        ),
    ] = ""
    log_format: Annotated[
        Literal["console", "json"], Meta(description="log lines for people, or as JSON")
    ] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="the lowest level that is logged"),
    ] = "info"
    loader: Annotated[
        Literal["auto", "core", "bcc"],
        Meta(
            description="what loads the programs; `auto`: `core`, or `bcc` on kernels without BTF"
        ),
    ] = "auto"
    limits: Limits = field(default_factory=Limits)
    policy: Policy = field(default_factory=Policy)
    auth: Auth = field(default_factory=Auth)
    otlp: Otlp = field(default_factory=Otlp)
    roles: Annotated[
        tuple[RoleRule, ...],
        Meta(description="what callers may do, by their names; see [access](access.md)"),
    ] = ()
    audit: Audit = field(default_factory=Audit)
    tls: Tls = field(default_factory=Tls)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    continuous: Annotated[
        tuple[Continuous, ...], Meta(description="collectors that run for as long as the agent")
    ] = ()
    services: Annotated[
        dict[str, ServiceRule],
        Meta(description="services by name, each with exactly one of the keys below"),
    ] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The agent's id in messages."""
        return self.agent_id or socket.gethostname()


def load(
    path: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, object] | None = None,
) -> Config:
    """Reads the configuration from its three sources. FLAGS are values by top-level key. Raises
    `ConfigError`."""
    values: dict[str, Any] = _read(path) if path else {}
    config = _convert(values, f"{path}" if path else "defaults")
    sources = dict.fromkeys(values, f"{path}")
    for name, text in sorted(environment.items()):
        if name.startswith(ENV_PREFIX):
            keys = name.removeprefix(ENV_PREFIX).lower().split("__")
            _put(values, keys, _from_text(Config, keys, text), name)
            config = _convert(values, name)
            sources[".".join(keys)] = name
    for key, value in (flags or {}).items():
        values[key] = value
        sources[key] = f"--{key.replace('_', '-')}"
        config = _convert(values, sources[key])
    try:
        _check(config)
    except ConfigError as error:
        raise ConfigError(_with_source(str(error), sources)) from error
    return config


def _with_source(message: str, sources: Mapping[str, str]) -> str:
    """MESSAGE, which begins with the path of a value, after the source that the value has by
    SOURCES, which are by path."""
    keys = re.split(r"[.\[]", message.partition(":")[0])
    for count in range(len(keys), 0, -1):
        if source := sources.get(".".join(keys[:count])):
            return f"{source}: {message}"
    return message


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _put(values: dict[str, Any], keys: list[str], value: object, source: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{source}: {key} has no keys of its own")
    values[keys[-1]] = value


def _from_text(struct: type, keys: list[str], text: str) -> object:
    """TEXT, from the environment, as a value for the field at KEYS: lists are split at commas."""
    hint = get_type_hints(struct).get(keys[0])
    if hint and len(keys) > 1 and isinstance(hint, type) and issubclass(hint, Struct):
        return _from_text(hint, keys[1:], text)
    if get_origin(hint) is tuple:
        return [item.strip() for item in text.split(",") if item.strip()]
    return text


def _convert(values: dict[str, Any], source: str) -> Config:
    _write_options_as_text(values.get("continuous"))
    try:
        config = msgspec.convert(values, Config, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        problem = first_problem(values, Config, _decode) or str(error)
        raise ConfigError(f"{source}: {problem}") from None
    _check_texts(values, "", source)
    return config


def _write_options_as_text(rules: object) -> None:
    """Makes numbers and booleans, as YAML reads an option such as `top: 5`, the texts that a
    request would have."""
    for rule in rules if isinstance(rules, list) else ():
        options = rule.get("config") if isinstance(rule, dict) else None
        if isinstance(options, dict):
            for name, value in options.items():
                if isinstance(value, bool | int | float):
                    options[name] = str(value).lower()


def _check_texts(value: object, path: str, source: str) -> None:
    """Every text can be printed: it is a name, a path or an address."""
    if isinstance(value, dict):
        for key, below in value.items():
            _check_texts(str(key), f"{path}.{key}" if path else str(key), source)
            _check_texts(below, f"{path}.{key}" if path else str(key), source)
    elif isinstance(value, list | tuple):
        for index, below in enumerate(value):
            _check_texts(below, f"{path}[{index}]", source)
    elif isinstance(value, str):
        if not is_printable(value):
            raise ConfigError(
                f"{source}: {path}: {shown(value)} has characters that cannot be printed; give "
                "printable text"
            )
        if len(value.encode()) > _MOST_TEXT_BYTES:
            raise ConfigError(
                f"{source}: {path}: {shown(value)} has more than {_MOST_TEXT_BYTES:,} bytes"
            )


def _decode(wanted: type, value: object) -> object:
    if wanted is Duration:
        if isinstance(value, str):
            value = parse_duration_s(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            value = 0
        if _LEAST_S <= value <= _MOST_S:
            return Duration(value)
        raise ValueError(Duration.accepts)
    if wanted is ByteCount:
        if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
            value = int(match[1]) * _UNITS[match[2]]
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_SIZE_BYTES:
            return ByteCount(value)
        raise ValueError(ByteCount.accepts)
    raise NotImplementedError(wanted)


def _check(config: Config) -> None:
    for name, rule in config.services.items():
        given = [key for key in rule.__struct_fields__ if getattr(rule, key)]
        if len(given) != 1:
            keys = ", ".join(rule.__struct_fields__)
            raise ConfigError(f"services.{name}: exactly one of {keys} is expected")
        _check_name(f"services.{name}", name)
        _check_service(f"services.{name}", rule)
    _check_name("agent_id", config.agent_id)
    _check_addresses(config)
    for refused in (config_otlp.problem(config.otlp), config_tls.problem(config.tls)):
        if refused:
            raise ConfigError(refused)
    for key in _GRPC_DURATIONS:
        if (value_s := getattr(config.limits, key)) > _MOST_GRPC_S:
            raise ConfigError(
                f"limits.{key}: {format_duration(value_s)} is not accepted; give a duration of "
                "at most 24 days"
            )
    if text := problem(config.auth, config.roles, config.audit, KINDS):
        raise ConfigError(text)
    for kind in config.policy.collectors:
        _check_kind("policy.collectors", kind, KINDS)
    for index, continuous in enumerate(config.continuous):
        _check_continuous(f"continuous[{index}]", continuous)


def _check_addresses(config: Config) -> None:
    if not all(config.listen) or not config.listen:
        raise ConfigError("listen: at least one address is expected, each unix:PATH or HOST:PORT")
    for address in config.listen:
        if is_unix(address):
            try:
                unix_address(address)
            except ValueError as error:
                raise ConfigError(f"listen: {error}") from error
        elif not host_and_port(address):
            raise ConfigError(f"listen: {shown(address)} is not accepted; {ACCEPTED}")
    for key in ("metrics", "health"):
        if (address := getattr(config, key)) and not host_and_port(address):
            raise ConfigError(
                f"{key}: {shown(address)} is not accepted; give HOST:PORT, or nothing"
            )
    if config.metrics_web_config and not config.metrics:
        raise ConfigError("metrics_web_config: there is no address in `metrics` that it is for")


def host_and_port(address: str) -> tuple[str, int] | None:
    """The two parts of `HOST:PORT`; None for anything else. An IPv6 address is in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
        return None
    return host, int(port)


def _check_name(path: str, name: str) -> None:
    if len(name.encode()) > _MOST_NAME_BYTES:
        raise ConfigError(f"{path}: a name of at most {_MOST_NAME_BYTES} bytes is expected")


def _check_kind(path: str, kind: str, accepted: Sequence[str]) -> None:
    if kind not in accepted:
        raise ConfigError(
            f"{path}: {shown(kind)} is not accepted{choices(kind, accepted, 'give one of')}"
        )


def _check_service(path: str, rule: ServiceRule) -> None:
    if len(rule.comm.encode()) > _MOST_COMM_BYTES:
        raise ConfigError(
            f"{path}.comm: {shown(rule.comm)} is not accepted; give a command name of at most "
            f"{_MOST_COMM_BYTES} bytes, as the kernel cuts them off there"
        )
    for key, text in rule.selectors.items():
        try:
            parse_selector(key, text)
        except ValueError as error:
            raise ConfigError(
                f"{path}.{key}: {shown(text)} is not accepted; give {error}"
            ) from error
    if rule.pid_file and not Path(rule.pid_file).is_absolute():
        raise ConfigError(
            f"{path}.pid_file: {shown(rule.pid_file)} is not accepted; give an absolute path"
        )


def _check_continuous(path: str, rule: Continuous) -> None:
    # Programs without an agent need neither.
    from coral.collectors.contract import ServiceProcesses  # noqa: PLC0415
    from coral.collectors.registry import COLLECTORS  # noqa: PLC0415
    from coral.collectors.target_options import TARGETS  # noqa: PLC0415

    _check_kind(f"{path}.kind", rule.kind, tuple(map(kind_name, COLLECTORS)))
    _check_name(f"{path}.service", rule.service)
    # Its processes are not looked for: they may start later.
    service = ServiceProcesses(rule.service, ()) if rule.service else None
    try:
        COLLECTORS[kind_of(rule.kind)].check(rule.config, service)
    except UnknownOptionError as error:
        known = choices(error.name, error.known, "accepted are")
        raise ConfigError(f"{path}.config.{error.name}: no such option{known}") from error
    except OptionError as error:
        if not error.value and error.name not in rule.config:
            raise ConfigError(
                f"{path}: name a service, or one of {', '.join(TARGETS)} in config"
            ) from error
        accepts = error.accepts.replace("service_name", "service")  # the key of a rule
        raise ConfigError(
            f"{path}.config.{error.name}: {shown(error.value)} is not accepted; give {accepts}"
        ) from error


def describe(
    struct: type[Struct] = Config, prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Every key of the configuration: its path, type, default and meaning."""
    for key in msgspec.structs.fields(struct):
        hint = get_type_hints(struct, include_extras=True)[key.name]
        if isinstance(hint, type) and issubclass(hint, Struct):
            yield from describe(hint, f"{prefix}{key.name}.")
            continue
        base, *metas = get_args(hint)
        description = next(m.description for m in reversed(metas) if m.description)
        default = "" if key.default is msgspec.NODEFAULT else _show(key.default)
        yield f"{prefix}{key.name}", _type_name(base), default, description
        if base == dict[str, ServiceRule]:
            yield from describe(ServiceRule, f"{prefix}{key.name}.NAME.")
        if struct_of := _listed_struct(base):
            yield from describe(struct_of, f"{prefix}{key.name}[].")


def _listed_struct(hint: object) -> type[Struct] | None:
    """The structure that HINT is a list of."""
    each = get_args(hint)[0] if get_origin(hint) is tuple else None
    return each if isinstance(each, type) and issubclass(each, Struct) else None


def _show(value: object) -> str:
    if isinstance(value, Duration):
        return format_duration(value)
    if isinstance(value, ByteCount):
        if not value:
            return ""
        return f"{value >> 20}MiB" if value >= 1 << 20 else f"{value >> 10}KiB"
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if _listed_struct(hint):
        return "list"
    if get_origin(hint) is tuple:
        return "list of texts"
    if get_origin(hint) is dict:
        return "mapping"
    names = {
        str: "text",
        bool: "boolean",
        int: "number",
        float: "number",
        Duration: "duration",
        ByteCount: "size",
    }
    return names[hint]  # type: ignore[index]
