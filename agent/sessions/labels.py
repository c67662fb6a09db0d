"""What metrics and spans call a session: its service, and where it runs in Kubernetes."""

from __future__ import annotations

from typing import Final

from coral.agent.sessions.session import Session
from coral.wire.series import Service

_NAMESPACE: Final = ("k8s.namespace.name", "service.namespace")
_KIND: Final = "k8s.workload.kind"
_WORKLOAD: Final = "k8s.workload.name"
_CONTAINER: Final = "k8s.container.name"
_POD: Final = "k8s.pod.name"


def label_of(session: Session, *, pod_label: bool) -> str:
    """The label `service` of metrics: with `namespace`, `workload` and `container` where all that
    SESSION watches shares them, and with `pod` too if POD_LABEL. Their number is bounded by what
    runs in the cluster, not by how often it is started again."""
    found = session.attributes
    if not found:
        return session.service_name
    kind = found.get(_KIND, "")
    labels = {
        "namespace": found.get(_NAMESPACE[0], ""),
        "workload": f"{kind}/{found.get(_WORKLOAD, '')}" if kind else "",
        "container": found.get(_CONTAINER, ""),
        "pod": found.get(_POD, "") if pod_label else "",
    }
    more = {name: text for name, text in labels.items() if text}
    kept = (*_NAMESPACE, _KIND, _WORKLOAD, f"k8s.{kind}.name", _CONTAINER)
    attributes = {name: found[name] for name in (*kept, *[_POD] * pod_label) if found.get(name)}
    return Service(session.service_name, more, attributes) if more else session.service_name


def whole_label(session: Session) -> str:
    """The same with all attributes that SESSION has now: for spans, of which each is told once."""
    found = session.attributes
    return Service(session.service_name, {}, found) if found else session.service_name
