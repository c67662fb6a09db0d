"""The agent's configuration: a YAML file, then environment, then flags, each over the one before.

Every value is typed; an unknown key or a wrong type is a `ConfigError` with the path to it.
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
MAX_PORT: Final = 65535  # gRPC takes a greater one too, and listens at its remainder
_SIZE: Final = re.compile(r"(\d+)(KiB|MiB|GiB)?")
_UNITS: Final = {None: 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_VALUE_PATH: Final = re.compile(r" - at (?:key in )?`\$\.?(.*?)`$")


class ConfigError(ValueError):
    """A configuration that is not accepted; the message has the source, the path and the value."""


class Duration(float):
    """Seconds, written as a number or as `500ms`, `30s`, `5m`, `2h`."""


class ByteCount(int):
    """Bytes, written as a number or as `64KiB`, `8MiB`, `1GiB`."""


Positive = Annotated[int, Meta(ge=1)]


class Limits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the agent may spend."""

    concurrent_collectors: Annotated[
        Positive, Meta(description="collectors on demand at one time")
    ] = 3
    max_duration: Annotated[Duration, Meta(description="the longest lease")] = Duration(300)
    default_duration: Annotated[
        Duration,
        Meta(description="the lease where a request names none, if `max_duration` allows it"),
    ] = Duration(300)
    memory: Annotated[
        ByteCount, Meta(description="maps in the kernel and buffers here, of all collectors")
    ] = ByteCount(512 << 20)
    cpu_percent: Annotated[
        float,
        Meta(gt=0, description="of one CPU: the programs' run time and the agent's own, over 10 s"),
    ] = 5.0
    subscriber_bytes_per_second: Annotated[
        ByteCount, Meta(description="the rate of one subscriber; what is over it is a loss")
    ] = ByteCount(10 << 20)
    stalled_subscriber: Annotated[
        Duration, Meta(description="a subscriber that has not read for so long is let go")
    ] = Duration(30)
    connection_age: Annotated[
        Duration, Meta(description="connections are renewed after so long; clients resume")
    ] = Duration(3600)
    keepalive: Annotated[
        Duration, Meta(description="a silent connection is asked for a sign of life after so long")
    ] = Duration(20)
    replay_bytes: Annotated[
        ByteCount, Meta(description="what a session keeps for subscribers that come later")
    ] = ByteCount(4 << 20)
    subscriber_queue_bytes: Annotated[
        ByteCount, Meta(description="what waits for one subscriber before its oldest events go")
    ] = ByteCount(8 << 20)
    ended_sessions: Annotated[
        Duration, Meta(description="how long the stream of an ended session can still be read")
    ] = Duration(60)
    ended_bytes: Annotated[
        ByteCount,
        Meta(
            description="memory for the streams of all ended sessions, the oldest of which go "
            "first; it counts in `memory` and is given up before anything at work"
        ),
    ] = ByteCount(16 << 20)
    prometheus_series: Annotated[
        Positive, Meta(description="label sets of each collector's metrics; the rest is `other`")
    ] = 200


class Policy(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What callers may ask for."""

    collectors: Annotated[
        tuple[str, ...], Meta(description="the kinds that may be started; empty: all")
    ] = ()
    host_scope: Annotated[
        bool, Meta(description="whether a collector may watch every process of the machine")
    ] = True
    observe_only: Annotated[
        bool,
        Meta(description="never keep CAP_SYS_ADMIN; refuse collectors that need it on this kernel"),
    ] = False


class Auth(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Who may call."""

    token_file: Annotated[
        str,
        Meta(description="a file with a token that callers send as `authorization: Bearer TOKEN`"),
    ] = ""


class ServiceRule(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to find a service's processes."""

    comm: Annotated[str, Meta(description="processes of this command name")] = ""
    cgroup: Annotated[str, Meta(description="processes in this cgroup and below")] = ""
    pid_file: Annotated[str, Meta(description="the process whose id this file holds")] = ""


class Continuous(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A collector that runs as long as the agent does."""

    kind: Annotated[str, Meta(description="the collector")]
    service: Annotated[str, Meta(description="the service it watches, or its label")] = ""
    config: Annotated[
        dict[str, str], Meta(description="its options; values are texts, as in a request")
    ] = field(default_factory=dict)


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration."""

    agent_id: Annotated[str, Meta(description="this agent's id; empty: the host's name")] = ""
    user: Annotated[
        str,
        Meta(
            description="the user to become when started as root, by name or number; see "
            "[privileges](privileges.md)"
        ),
    ] = ""
    listen: Annotated[
        tuple[str, ...], Meta(description="gRPC addresses: `unix:PATH`, or `127.0.0.1:PORT`")
    ] = (DEFAULT_SOCKET,)
    metrics: Annotated[
        str, Meta(description="the address of /metrics for Prometheus; empty: none")
    ] = "127.0.0.1:9464"
    log_format: Annotated[
        Literal["console", "json"], Meta(description="lines for people, or for machines")
    ] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="the least that is logged")
    ] = "info"
    loader: Annotated[
        Literal["auto", "core", "bcc"],
        Meta(description="how programs get into the kernel; `auto`: `core`, `bcc` without BTF"),
    ] = "auto"
    limits: Limits = field(default_factory=Limits)
    policy: Policy = field(default_factory=Policy)
    auth: Auth = field(default_factory=Auth)
    continuous: Annotated[
        tuple[Continuous, ...], Meta(description="collectors that run as long as the agent does")
    ] = ()
    services: Annotated[
        dict[str, ServiceRule], Meta(description="services by name, each with one rule")
    ] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The agent's id, as it tells it."""
        return self.agent_id or socket.gethostname()


def load(
    path: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    flags: Mapping[str, object] | None = None,
) -> Config:
    """The configuration from its three sources; FLAGS by key of the top level. Raises
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
    """What TEXT, from the environment, means for the field at KEYS: a list is split at commas."""
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
