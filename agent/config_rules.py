"""The keys of the configuration that say what may be watched, which processes a service has, and
what is watched all the time: `policy`, `services` and `continuous`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

from msgspec import Meta, Struct, field

from coral.collectors.options import OptionError, UnknownOptionError
from coral.collectors.selectors import SELECTORS
from coral.collectors.selectors import parse as parse_selector
from coral.wire.kinds import kind_name, kind_of
from coral.wire.settings.words import ConfigError, choices, shown

_MOST_NAME_BYTES: Final = 128
_MOST_COMM_BYTES: Final = 15  # as COMM_BYTES of collectors, which only a running agent needs


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


def check_name(path: str, name: str) -> None:
    """Raises ConfigError for a name that is too long for messages and labels."""
    if len(name.encode()) > _MOST_NAME_BYTES:
        raise ConfigError(f"{path}: a name of at most {_MOST_NAME_BYTES} bytes is expected")


def check_kind(path: str, kind: str, accepted: Sequence[str]) -> None:
    """Raises ConfigError for a kind that is none of ACCEPTED."""
    if kind not in accepted:
        raise ConfigError(
            f"{path}: {shown(kind)} is not accepted{choices(kind, accepted, 'give one of')}"
        )


def check_service(path: str, rule: ServiceRule) -> None:
    """Raises ConfigError for a rule by which no process could be found."""
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


def check_continuous(path: str, rule: Continuous) -> None:
    """Raises ConfigError for what no collector would accept."""
    # Programs without an agent need neither.
    from coral.collectors.contract import ServiceProcesses  # noqa: PLC0415
    from coral.collectors.registry import COLLECTORS  # noqa: PLC0415
    from coral.collectors.target_options import TARGETS  # noqa: PLC0415

    check_kind(f"{path}.kind", rule.kind, tuple(map(kind_name, COLLECTORS)))
    check_name(f"{path}.service", rule.service)
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
