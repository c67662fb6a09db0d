"""Where a row was seen: agent, session, service, and the pod and container by the attributes that
the agent gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Self

from coral.colony.delivery import Session


class Place(NamedTuple):
    """The common columns of rows, by their names; "" where one is not known."""

    agent: str
    session: str
    service: str
    namespace: str
    workload: str
    pod: str
    container: str

    @classmethod
    def of(cls, session: Session, attributes: Mapping[str, str]) -> Self:
        """From attributes by OpenTelemetry's names. A workload is `deployment/web`, as in the
        agents' metrics."""
        kind = attributes.get("k8s.workload.kind", "")
        name = attributes.get("k8s.workload.name", "")
        return cls(
            session.agent_id,
            session.collector_id,
            attributes.get("service.name") or session.service,
            attributes.get("k8s.namespace.name", ""),
            f"{kind}/{name}" if kind and name else name,
            attributes.get("k8s.pod.name", ""),
            attributes.get("k8s.container.name", ""),
        )
