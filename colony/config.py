"""The colony's configuration: a YAML file, then flags, which override it.

Every value is typed. An unknown key or a wrong type is a `ConfigError` with the path to the value.
docs/colony.md lists the keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct, field

from coral.client import Kind
from coral.client import Tls as ClientTls
from coral.colony.answers.settings import Serving
from coral.colony.config_answers import Sql, Tls, Token
from coral.colony.config_answers import problem as problem_of_answers
from coral.colony.config_bus import Bus
from coral.colony.config_bus import problem as problem_of_bus
from coral.colony.config_export import Export
from coral.colony.config_export import problem as problem_of_export
from coral.colony.config_storage import Storage
from coral.colony.config_units import Duration, converted
from coral.colony.follow.discovery.addresses import agent_address, host_and_port
from coral.colony.follow.discovery.dns import is_srv
from coral.colony.follow.wanted import Wanted
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name
from coral.wire.leases import MAX_LEASE_S
from coral.wire.settings.texts import problem_of_texts, write_options_as_text
from coral.wire.settings.words import ConfigError, choices, shown
from coral.wire.settings.yaml_file import read_yaml

__all__ = ["KINDS", "Agents", "AgentsTls", "Collect", "Config", "ConfigError", "Endpoints", "load"]

KINDS: Final = tuple(kind_name(kind) for kind in pb.EbpfCollectorKind.values() if kind)
_LEAST_MEMORY_BYTES: Final = 32 << 20
_INTERVAL: Final = "10s"
_SERVICE: Final = re.compile(r"[a-z0-9.-]+/[a-z0-9.-]+")  # DNS labels


class AgentsTls(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How agents are reached over TLS."""

    ca: Annotated[
        str,
        Meta(description="a PEM file with the authorities that sign agents' certificates"),
    ] = ""
    certificate: Annotated[
        str, Meta(description="a PEM file with the certificate that the colony shows")
    ] = ""
    key: Annotated[str, Meta(description="a PEM file with its key")] = ""
    server_name: Annotated[
        str,
        Meta(
            description="the name in every agent's certificate; empty: the host in its address, "
            "which is an IP address where DNS or Kubernetes found it"
        ),
    ] = ""

    def as_client(self) -> ClientTls | None:
        """For the client; None where there is no TLS."""
        if not (self.ca or self.certificate or self.key):
            return None
        return ClientTls(self.ca, self.certificate, self.key, self.server_name)


class Endpoints(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Agents behind a Service of Kubernetes."""

    service: Annotated[
        str, Meta(description="`NAMESPACE/NAME` of the Service of the agents; empty: none")
    ] = ""
    port: Annotated[
        str, Meta(description="the name or the number of the port of gRPC in its EndpointSlices")
    ] = "grpc"
    server: Annotated[
        str, Meta(description="the API server; empty: the one of the cluster that this pod is in")
    ] = ""
    token_file: Annotated[
        str,
        Meta(description="a file with the token for it; empty: that of the pod's ServiceAccount"),
    ] = ""
    ca_file: Annotated[
        str,
        Meta(
            description="the authorities of its certificate, in PEM; empty: those of the pod's "
            "ServiceAccount"
        ),
    ] = ""


class Agents(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where agents are, and how they are connected to."""

    addresses: Annotated[
        tuple[str, ...], Meta(description="agents, each `HOST:PORT` or `unix:PATH`")
    ] = ()
    file: Annotated[
        str,
        Meta(
            description="a file with the address of an agent on each line, which is read again "
            "when it changes; `#` begins a comment"
        ),
    ] = ""
    dns: Annotated[
        tuple[str, ...],
        Meta(
            description="names whose addresses are agents: `NAME:PORT` (A and AAAA), or "
            "`_NAME._tcp.DOMAIN` (SRV)"
        ),
    ] = ()
    dns_every: Annotated[Duration, Meta(description="how often they are asked for")] = Duration(15)
    kubernetes: Endpoints = field(default_factory=Endpoints)
    tls: AgentsTls = field(default_factory=AgentsTls)
    token_file: Annotated[
        str,
        Meta(
            description="a file with the token for agents, which is read again at each connection"
        ),
    ] = ""
    connecting: Annotated[
        int,
        Meta(ge=1, le=10_000, description="how many agents are connected to at a time"),
    ] = 50
    timeout: Annotated[
        Duration, Meta(description="how long an agent may take to answer a request")
    ] = Duration(10)
    lost_after: Annotated[
        Duration,
        Meta(description="the sessions of an agent that has not answered for this long are ended"),
    ] = Duration(3600)


class Collect(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A collector that is at work on every agent."""

    kind: Annotated[str, Meta(description="the kind of collector")]
    service: Annotated[
        str, Meta(description="the service to watch; a label only, where `config` names a target")
    ] = ""
    config: Annotated[
        dict[str, str],
        Meta(
            description="its options, as in a request to an agent; `interval` is 10s unless it is "
            "given or `mode` is"
        ),
    ] = field(default_factory=dict)
    lease: Annotated[
        Duration,
        Meta(
            description="how long it goes on without the colony, which renews it after a third "
            "of that; at most the agents' `limits.max_duration`"
        ),
    ] = Duration(MAX_LEASE_S)

    def as_wanted(self) -> Wanted:
        """For followers."""
        config = dict(self.config)
        if "mode" not in config:
            config.setdefault("interval", _INTERVAL)
        return Wanted(Kind.of(self.kind), self.service, config, self.lease)


def _everywhere() -> tuple[Collect, ...]:
    """Two of the three that agents run on demand by default: one is left for people."""
    host = {"scope": "host"}
    return Collect(kind="http_latency", config=host), Collect(kind="tcp_metrics", config=host)


class Config(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration."""

    name: Annotated[
        str,
        Meta(description="what exported metrics call this colony; empty: the host name"),
    ] = ""
    data: Annotated[str, Meta(description="the directory of what is stored")] = (
        "/var/lib/coral/colony"
    )
    agents: Agents = field(default_factory=Agents)
    collect: Annotated[
        tuple[Collect, ...],
        Meta(
            description="collectors that are at work on every agent; by default `http_latency` and "
            "`tcp_metrics` of the whole host"
        ),
    ] = field(default_factory=_everywhere)
    storage: Storage = field(default_factory=Storage)
    bus: Bus = field(default_factory=Bus)
    export: Export = field(default_factory=Export)
    listen: Annotated[
        tuple[str, ...],
        Meta(description="addresses for questions, each `unix:PATH` or `HOST:PORT`"),
    ] = ("unix:/run/coral/colony.sock",)
    tls: Tls = field(default_factory=Tls)
    tokens: Annotated[
        tuple[Token, ...],
        Meta(
            description="who may ask over TCP; whoever may open the unix socket, which is its "
            "owner's alone, needs none"
        ),
    ] = ()
    insecure_loopback: Annotated[
        bool,
        Meta(
            description="let every user of this machine ask and start collectors, without a token, "
            "at addresses of `listen` on loopback"
        ),
    ] = False
    sql: Sql = field(default_factory=Sql)
    metrics: Annotated[
        str,
        Meta(description="the address that serves /metrics, /healthz and /readyz; empty: none"),
    ] = "127.0.0.1:9465"
    log_format: Annotated[
        Literal["console", "json"], Meta(description="log lines for people, or as JSON")
    ] = "console"
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="the lowest level that is logged"),
    ] = "info"

    def as_serving(self) -> Serving:
        """For the server of answers."""
        return Serving(
            self.listen,
            self.tls.as_serving(),
            tuple(token.as_file() for token in self.tokens),
            self.insecure_loopback,
            self.sql.as_limits(),
        )


def load(path: Path | None = None, flags: Mapping[str, object] | None = None) -> Config:
    """Reads the configuration. FLAGS are values by path, such as `agents.addresses`. Raises
    `ConfigError`."""
    values: dict[str, Any] = _read(path) if path else {}
    config = _converted(values, str(path) if path else "defaults")
    sources = dict.fromkeys(values, str(path))
    for keys, value in (flags or {}).items():
        *above, last = keys.split(".")
        into = values
        for key in above:
            into = into.setdefault(key, {})
        into[last] = value
        sources[keys] = f"--{last.replace('_', '-')}" if not above else f"--{above[0]}"
        config = _converted(values, sources[keys])
    if problem := _problem(config):
        where = problem.partition(":")[0].partition("[")[0]
        source = sources.get(where) or sources.get(where.partition(".")[0])
        raise ConfigError(f"{source}: {problem}" if source else problem)
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _converted(values: dict[str, Any], source: str) -> Config:
    write_options_as_text(values.get("collect"))
    try:
        config = converted(values, Config)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    if problem := problem_of_texts(values):
        raise ConfigError(f"{source}: {problem}")
    return config


def _problem(config: Config) -> str:
    """`PATH: what is wrong` with values of the right type; empty if nothing is."""
    checks = (_of_addresses, _of_kubernetes, _of_tls, _of_collect, _of_memory)
    problems = (problem for check in checks if (problem := check(config)))
    return (
        next(problems, "")
        or problem_of_answers(config.tls)
        or problem_of_bus(config.bus)
        or problem_of_export(config.export)
    )


def _of_addresses(config: Config) -> str:
    if not config.data:
        return "data: it is empty; give a directory"
    for index, address in enumerate(config.agents.addresses):
        try:
            agent_address(address)
        except ValueError as error:
            return f"agents.addresses[{index}]: {error}"
    for index, name in enumerate(config.agents.dns):
        if not is_srv(name) and not _is_host_and_port(name):
            accepts = "give NAME:PORT, or _NAME._tcp.DOMAIN"
            return f"agents.dns[{index}]: {shown(name)} is not accepted; {accepts}"
    if config.metrics and not _is_host_and_port(config.metrics):
        return f"metrics: {shown(config.metrics)} is not accepted; give HOST:PORT, or nothing"
    return ""


def _is_host_and_port(text: str) -> bool:
    try:
        host_and_port(text)
    except ValueError:
        return False
    return True


def _of_kubernetes(config: Config) -> str:
    told = config.agents.kubernetes
    if told.service and not _SERVICE.fullmatch(told.service):
        accepts = "give NAMESPACE/NAME"
        return f"agents.kubernetes.service: {shown(told.service)} is not accepted; {accepts}"
    if told.server and not told.server.startswith(("https://", "http://")):
        accepts = "give https://HOST:PORT"
        return f"agents.kubernetes.server: {shown(told.server)} is not accepted; {accepts}"
    return ""


def _of_tls(config: Config) -> str:
    tls = config.agents.tls
    if (tls.certificate or tls.key or tls.server_name) and not tls.ca:
        return "agents.tls.ca: it is missing; give the authorities of agents' certificates"
    if bool(tls.certificate) != bool(tls.key):
        lacking = "key" if tls.certificate else "certificate"
        return f"agents.tls.{lacking}: give it too: a certificate and its key belong together"
    return ""


def _of_memory(config: Config) -> str:
    sizes = {"storage.memory": config.storage.memory, "sql.memory": config.sql.memory}
    for path, size_bytes in sizes.items():
        if size_bytes < _LEAST_MEMORY_BYTES:
            accepts = f"give at least {_LEAST_MEMORY_BYTES >> 20}MiB"
            return f"{path}: {int(size_bytes)} is not accepted; {accepts}"
    return ""


def _of_collect(config: Config) -> str:
    seen: list[Wanted] = []
    for index, rule in enumerate(config.collect):
        if rule.kind not in KINDS:
            near = choices(rule.kind, KINDS, "give one of")
            return f"collect[{index}].kind: {shown(rule.kind)} is not accepted{near}"
        wanted = rule.as_wanted()
        if wanted in seen:
            return f"collect[{index}]: it is the same as collect[{seen.index(wanted)}]"
        seen.append(wanted)
    return ""
