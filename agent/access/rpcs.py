"""The table of RPCs: the least role that each one needs, and what it is about.

Every RPC that the agent serves has a row; one without would need the role `admin`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, NamedTuple


class Role(enum.IntEnum):
    """What a caller may do. Each role includes those before it."""

    NONE = 0
    """Only what needs no role: health checks."""
    VIEW = 1
    """Lists, watches and reads."""
    OPERATE = 2
    """Starts collectors too, renews and stops its own."""
    ADMIN = 3
    """Everything, the sessions of others and the whole machine included."""

    def __str__(self) -> str:
        return self.name.lower()


class About(enum.Enum):
    """What a decision about an RPC depends on, beside the caller."""

    NOTHING = "nothing"
    TARGET = "target"
    """What the request resolves to."""
    SESSION = "session"
    """The session that it names."""


class Rpc(NamedTuple):
    """One RPC. VERB is the one that Kubernetes is asked about, of `collectors.coral.io`."""

    least: Role
    about: About
    verb: str


_EBPF: Final = "coral.mesh.v1.EbpfService."
START: Final = f"{_EBPF}StartCollector"

RPCS: Final[Mapping[str, Rpc]] = {
    START: Rpc(Role.OPERATE, About.TARGET, "create"),
    f"{_EBPF}RenewCollector": Rpc(Role.OPERATE, About.SESSION, "create"),
    f"{_EBPF}StopCollector": Rpc(Role.OPERATE, About.SESSION, "delete"),
    f"{_EBPF}StreamEvents": Rpc(Role.VIEW, About.SESSION, "get"),
    f"{_EBPF}StreamEventBatches": Rpc(Role.VIEW, About.SESSION, "get"),
    f"{_EBPF}ListCollectors": Rpc(Role.VIEW, About.NOTHING, "list"),
    f"{_EBPF}WatchCollectors": Rpc(Role.VIEW, About.NOTHING, "list"),
    f"{_EBPF}ListPods": Rpc(Role.VIEW, About.NOTHING, "list"),
    f"{_EBPF}GetCapabilities": Rpc(Role.VIEW, About.NOTHING, "list"),
    "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo": Rpc(
        Role.VIEW, About.NOTHING, "list"
    ),
    # Probes have no credentials, and learn one bit.
    "grpc.health.v1.Health.Check": Rpc(Role.NONE, About.NOTHING, ""),
    "grpc.health.v1.Health.List": Rpc(Role.NONE, About.NOTHING, ""),
    "grpc.health.v1.Health.Watch": Rpc(Role.NONE, About.NOTHING, ""),
}
_UNKNOWN: Final = Rpc(Role.ADMIN, About.NOTHING, "list")


def rpc_of(full_name: str) -> Rpc:
    """The row of the RPC of that FULL_NAME, such as `grpc.health.v1.Health.Check`."""
    return RPCS.get(full_name, _UNKNOWN)


def short(full_name: str) -> str:
    """Its name alone, for messages."""
    return full_name.rpartition(".")[2]
