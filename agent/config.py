"""The agent's configuration: a YAML file, the environment, flags; later sources override earlier.

Every value is typed. An unknown key or a wrong type is a `ConfigError` with the path to the value.
The keys of each group are in a file of their own; others have all of them from here.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct, field

from coral.agent import config_otlp, config_tls
from coral.agent.addresses import ACCEPTED, MAX_PORT, host_and_port, is_unix, unix_address
from coral.agent.config_access import Audit, Auth, RoleRule, problem
from coral.agent.config_kubernetes import Kubernetes
from coral.agent.config_limits import Limits
from coral.agent.config_otlp import Otlp
from coral.agent.config_rules import (
    Continuous,
    Policy,
    ServiceRule,
    check_continuous,
    check_kind,
    check_name,
    check_service,
)
from coral.agent.config_tls import Tls
from coral.agent.config_units import ByteCount, Duration, decode
from coral.collectors.options import format_duration
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name
from coral.wire.settings.texts import problem_of_texts, write_options_as_text
from coral.wire.settings.words import ConfigError, first_problem, shown
from coral.wire.settings.yaml_file import read_yaml

__all__ = [
    "DEFAULT_SOCKET",
    "MAX_PORT",
    "Auth",
    "ByteCount",
    "Config",
    "ConfigError",
    "Continuous",
    "Duration",
    "Limits",
    "Policy",
    "ServiceRule",
    "host_and_port",
    "load",
]

# The kinds of the contract, as users write them; an agent may lack some of them.
KINDS: Final = tuple(kind_name(kind) for kind in pb.EbpfCollectorKind.values() if kind)
ENV_PREFIX: Final = "CORAL__"
DEFAULT_SOCKET: Final = "unix:/run/coral/agent.sock"
# gRPC keeps these in milliseconds, in a signed number of 32 bits.
_MOST_GRPC_S: Final = 24 * 86_400.0
_GRPC_DURATIONS: Final = ("connection_age", "connection_idle", "keepalive")


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
    write_options_as_text(values.get("continuous"))
    try:
        config = msgspec.convert(values, Config, strict=False, dec_hook=decode)
    except msgspec.ValidationError as error:
        problem = first_problem(values, Config, decode) or str(error)
        raise ConfigError(f"{source}: {problem}") from None
    if problem := problem_of_texts(values):
        raise ConfigError(f"{source}: {problem}")
    return config


def _check(config: Config) -> None:
    for name, rule in config.services.items():
        given = [key for key in rule.__struct_fields__ if getattr(rule, key)]
        if len(given) != 1:
            keys = ", ".join(rule.__struct_fields__)
            raise ConfigError(f"services.{name}: exactly one of {keys} is expected")
        check_name(f"services.{name}", name)
        check_service(f"services.{name}", rule)
    check_name("agent_id", config.agent_id)
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
        check_kind("policy.collectors", kind, KINDS)
    for index, continuous in enumerate(config.continuous):
        check_continuous(f"continuous[{index}]", continuous)


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
