"""What an agent knows of the pods of its node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from coral.mesh.v1 import ebpf_pb2 as pb


@dataclass(frozen=True, slots=True)
class PodInfo:
    """A pod. `attributes` have the names of OpenTelemetry's semantic conventions; `containers` are
    names by id."""

    namespace: str
    name: str
    labels: Mapping[str, str]
    attributes: Mapping[str, str]
    containers: Mapping[str, str]

    @classmethod
    def of(cls, message: pb.PodInfo) -> Self:
        """From the contract's message."""
        return cls(
            message.namespace,
            message.name,
            dict(message.labels),
            dict(message.attributes),
            {each.id: each.name for each in message.containers},
        )


@dataclass(frozen=True, slots=True)
class PodSource:
    """Something that tells of pods or containers: whether it is used; which one, or why none."""

    name: str
    used: bool
    detail: str

    @classmethod
    def of(cls, message: pb.PodSource) -> Self:
        """From the contract's message."""
        return cls(message.name, message.used, message.detail)


@dataclass(frozen=True, slots=True)
class Pods:
    """The pods of a node, by namespace and name, and what the agent knows them by."""

    pods: tuple[PodInfo, ...]
    sources: tuple[PodSource, ...]
    message: pb.ListPodsResponse = field(repr=False, compare=False)

    @classmethod
    def of(cls, message: pb.ListPodsResponse) -> Self:
        """From the contract's message."""
        return cls(
            tuple(map(PodInfo.of, message.pods)),
            tuple(map(PodSource.of, message.sources)),
            message,
        )
