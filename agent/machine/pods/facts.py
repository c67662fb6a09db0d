"""What sources tell about pods and containers, and the names that OpenTelemetry gives it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from coral.agent.machine.pods.cgroup_names import uid_key
from coral.agent.machine.pods.workloads import Workload

_ANNOTATION: Final = "resource.opentelemetry.io/"
_OF_SERVICE: Final = f"{_ANNOTATION}service."
_INSTANCE: Final = "app.kubernetes.io/instance"
_NAME: Final = "app.kubernetes.io/name"
_VERSION: Final = "app.kubernetes.io/version"
_MIRROR: Final = "kubernetes.io/config.mirror"
# What the agent itself says of where something runs.
_OWN_ATTRIBUTES: Final = ("k8s.", "container.")
# The order in which a service is named after a workload.
_NAMED_AFTER: Final = ("deployment", "replicaset", "statefulset", "daemonset", "cronjob", "job")
_MOST_LABELS: Final = 256  # of one pod, in what is kept of it, as the next
# Kubernetes bounds annotations by 256 KiB in all, and batches carry these.
_MOST_ANNOTATIONS: Final = 32
_MOST_TEXT: Final = 256  # characters of one


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of this node. `uid` is its key, of 32 digits, `workloads` what it is part of, the
    direct owner first. One that `mirrors` stands in the API for a static pod, whose key it has."""

    uid: str
    namespace: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    workloads: tuple[Workload, ...] = ()
    mirrors: bool = False

    @classmethod
    def of(
        cls,
        uid: str,
        namespace: str,
        name: str,
        *,
        labels: Mapping[str, str],
        annotations: Mapping[str, str],
        workloads: tuple[Workload, ...],
        may_mirror: bool = False,
    ) -> Pod:
        """As a source tells it. A static pod has another UID in the API (that of its mirror) than
        on its node, which an annotation of the mirror has: that counts where the pod MAY MIRROR,
        and nowhere else, since everybody may annotate their pods."""
        static = annotations.get(_MIRROR, "") if may_mirror else ""
        own = sorted(key for key in annotations if key.startswith(_ANNOTATION))
        own.sort(key=lambda key: not key.startswith(_OF_SERVICE))
        kept = {key: annotations[key][:_MOST_TEXT] for key in own[:_MOST_ANNOTATIONS]}
        few = dict(list(labels.items())[:_MOST_LABELS])
        key = uid_key(static or uid)
        return cls(key, namespace, name, few, kept, workloads, bool(static))

    def is_named_like(self, other: Pod) -> bool:
        """Whether OTHER is the same pod, by namespace and name."""
        return (self.namespace, self.name) == (other.namespace, other.name)

    @property
    def workload(self) -> Workload | None:
        """The outermost workload that it is part of."""
        return self.workloads[-1] if self.workloads else None


@dataclass(frozen=True, slots=True)
class Container:
    """A container of a pod; `pod` is the pod's key."""

    id: str
    pod: str
    name: str


@dataclass(frozen=True, slots=True)
class Facts:
    """All that a source knows at one moment."""

    pods: tuple[Pod, ...] = ()
    containers: tuple[Container, ...] = ()


def attributes_of(
    pod: Pod | None, container: Container | None = None, container_id: str = ""
) -> dict[str, str]:
    """The attributes of a container, or of all of a pod, as OpenTelemetry's semantic conventions
    for `k8s`, `container` and `service` name them. The service's follow the order of precedence of
    its page "Specify resource attributes using Kubernetes annotations"."""
    found: dict[str, str] = {}
    if pod:
        found["k8s.namespace.name"] = pod.namespace
        found["k8s.pod.name"] = pod.name
        for kind, name in pod.workloads:
            found[f"k8s.{kind}.name"] = name
        if pod.workload:
            found["k8s.workload.kind"], found["k8s.workload.name"] = pod.workload
    if container:
        found["k8s.container.name"] = container.name
    if container_id or container:
        found["container.id"] = container_id or (container.id if container else "")
    if pod:
        found |= _service(pod, container)
        own = {key.removeprefix(_ANNOTATION): text for key, text in pod.annotations.items()}
        found |= {
            key: text
            for key, text in own.items()
            if key and key not in found and not key.startswith(_OWN_ATTRIBUTES)
        }
    return {key: text for key, text in found.items() if text}


def _service(pod: Pod, container: Container | None) -> dict[str, str]:
    workloads = dict(pod.workloads)
    names = (
        pod.annotations.get(f"{_ANNOTATION}service.name"),
        pod.labels.get(_INSTANCE),
        pod.labels.get(_NAME),
        *(workloads.get(kind) for kind in _NAMED_AFTER),
        pod.name,
        container.name if container else "",
    )
    version = pod.annotations.get(f"{_ANNOTATION}service.version") or pod.labels.get(_VERSION)
    return {
        "service.namespace": pod.annotations.get(f"{_ANNOTATION}service.namespace")
        or pod.namespace,
        "service.name": next(filter(None, names), ""),
        "service.version": version or "",
    }


def common(of_each: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The attributes that are the same in all."""
    shared: dict[str, str] | None = None
    for attributes in of_each:
        if shared is None:
            shared = dict(attributes)
        else:
            shared = {k: text for k, text in shared.items() if attributes.get(k) == text}
    return shared or {}
