"""What the agent knows of pods, as the contract describes it."""

from __future__ import annotations

from coral.agent.sessions.supervisor import Supervisor
from coral.collectors.runner import in_thread
from coral.mesh.v1 import ebpf_pb2 as pb


async def listed_pods(supervisor: Supervisor, namespace: str = "") -> pb.ListPodsResponse:
    """The pods of this node, of one NAMESPACE unless it is empty."""
    answer = pb.ListPodsResponse()
    for known in await in_thread(supervisor.pods.listing):
        pod = known.pod
        if namespace in ("", pod.namespace):
            answer.pods.add(
                namespace=pod.namespace,
                name=pod.name,
                labels=pod.labels,
                attributes=known.attributes,
                containers=[
                    pb.PodContainer(name=name, id=each) for each, name in known.containers.items()
                ],
            )
    answer.sources.extend(await pod_sources(supervisor))
    return answer


async def pod_sources(supervisor: Supervisor) -> list[pb.PodSource]:
    """What tells of pods here, and what could."""
    features = await supervisor.features()
    states = await in_thread(lambda: supervisor.pods.sources(features))
    return [pb.PodSource(name=it.name, used=it.used, detail=it.detail) for it in states]
