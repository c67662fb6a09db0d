"""The agent's configuration: a YAML file, the environment, flags; later sources override earlier.

Every value is typed. An unknown key or a wrong type is a `ConfigError` with the path to the value.
docs/configuration.md is generated from this file.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

from coral.collectors.options import format_duration, parse_duration_s

ENV_PREFIX: Final = "CORAL__"
DEFAULT_SOCKET: Final = "unix:/run/coral/agent.sock"
MAX_PORT: Final = 65535  # gRPC accepts a greater one, and listens on its lower 16 bits
_SIZE: Final = re.compile(r"(\d+)(KiB|MiB|GiB)?")
_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_VALUE_PATH: Final = re.compile(r" - at (?:key in )?`\$\.?(.*?)`$")


class ConfigError(ValueError):
    """A configuration is not accepted; the message has the source, the path and the value."""


class Duration(float):
    """Seconds, written as a number or as `500ms`, `30s`, `5m`, `2h`."""


class ByteCount(int):
    """Bytes, written as a number or as `64KiB`, `8MiB`, `1GiB`."""


def _for_each_cpu(percent: float) -> float:
    return percent * (os.cpu_count() or 1)


Positive = Annotated[int, Meta(ge=1)]


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
            description="CPU time that all collectors together may cause, in percent of one CPU "
            "over 10 s; by default 25 for each CPU of the machine",
        ),
    ] = field(default_factory=lambda: _for_each_cpu(25))
    continuous_cpu_percent: Annotated[
        float,
        Meta(
            gt=0,
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


class Policy(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What callers may ask for."""

    collectors: Annotated[
        tuple[str, ...], Meta(description="the kinds that callers may start; empty: all")
    ] = ()
    host_scope: Annotated[
        bool, Meta(description="whether collectors may watch every process of the machine")
    ] = True
    observe_only: Annotated[
        bool,
        Meta(description="drop CAP_SYS_ADMIN; refuse collectors that need it on this kernel"),
    ] = False


class Auth(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which callers are let in."""

    token_file: Annotated[
        str,
        Meta(description="a file with a token that callers send as `authorization: Bearer TOKEN`"),
    ] = ""


class ServiceRule(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to find a service's processes."""

    comm: Annotated[str, Meta(description="the processes with this command name")] = ""
    cgroup: Annotated[str, Meta(description="the processes in this cgroup and below it")] = ""
    pid_file: Annotated[str, Meta(description="the process whose id is in this file")] = ""


class Continuous(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A collector that runs for as long as the agent."""

    kind: Annotated[str, Meta(description="the kind of collector")]
    service: Annotated[
        str, Meta(description="the service to watch; a label only, where `config` names processes")
    ] = ""
    config: Annotated[
        dict[str, str], Meta(description="its options, as strings like those of a request")
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
        Meta(description="addresses for gRPC, each `unix:PATH` or `127.0.0.1:PORT`"),
    ] = (DEFAULT_SOCKET,)
    metrics: Annotated[
        str, Meta(description="the address that serves /metrics to Prometheus; empty: none")
    ] = "127.0.0.1:9464"
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
    values: dict[str, Any] = _read_yaml(path) if path else {}
    config = _convert(values, f"{path}" if path else "defaults")
    for name, text in sorted(environment.items()):
        if name.startswith(ENV_PREFIX):
            keys = name.removeprefix(ENV_PREFIX).lower().split("__")
            _put(values, keys, _from_text(Config, keys, text), name)
            config = _convert(values, name)
    for key, value in (flags or {}).items():
        values[key] = value
        config = _convert(values, f"--{key.replace('_', '-')}")
    _check(config)
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # noqa: PLC0415  a megabyte that an agent without a file never needs

    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of keys to values is expected")
    return values


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
    try:
        return msgspec.convert(values, Config, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        match = _VALUE_PATH.search(str(error))
        path = match[1] if match else ""
        message = _VALUE_PATH.sub("", str(error))
        found = _value_at(values, path)
        value = "" if found is None else f" (found {found!r})"
        raise ConfigError(f"{source}: {path or 'top level'}: {message}{value}") from None


def _value_at(values: object, path: str) -> object:
    for key in filter(None, re.split(r"[.\[\]]+", path)):
        if isinstance(values, dict):
            values = values.get(key)
        elif isinstance(values, list) and key.isdigit():
            values = values[int(key)]
        else:
            return None
    return None if isinstance(values, dict) else values


def _decode(wanted: type, value: object) -> object:
    if wanted is Duration:
        if isinstance(value, str):
            value = parse_duration_s(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return Duration(value)
        raise ValueError("Expected a duration such as 500ms, 30s or 5m")
    if wanted is ByteCount:
        if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
            value = int(match[1]) * _UNITS[match[2]]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return ByteCount(value)
        raise ValueError("Expected a size such as 65536, 64KiB or 8MiB")
    raise NotImplementedError(wanted)


def _check(config: Config) -> None:
    for name, rule in config.services.items():
        if sum(map(bool, (rule.comm, rule.cgroup, rule.pid_file))) != 1:
            raise ConfigError(f"services.{name}: exactly one of comm, cgroup, pid_file is expected")


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
        if base == tuple[Continuous, ...]:
            yield from describe(Continuous, f"{prefix}{key.name}[].")


def _show(value: object) -> str:
    if isinstance(value, Duration):
        return format_duration(value)
    if isinstance(value, ByteCount):
        return f"{value >> 20}MiB"
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(hint: object) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if hint == tuple[Continuous, ...]:
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
