"""What the agent knows of pods, as the contract describes it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from coral.agent.sessions.supervisor import Supervisor
from coral.collectors.runner import in_thread
from coral.mesh.v1 import ebpf_pb2 as pb


async def listed_pods(
    supervisor: Supervisor, sees: Callable[[str], Awaitable[bool]], namespace: str = ""
) -> pb.ListPodsResponse:
    """The pods of this node in namespaces that the caller SEES, of one NAMESPACE unless it is
    empty."""
    answer = pb.ListPodsResponse()
    listing = await in_thread(supervisor.pods.listing)
    asked = {known.pod.namespace for known in listing if namespace in ("", known.pod.namespace)}
    seen = {each for each in sorted(asked) if await sees(each)}
    for known in listing:
        pod = known.pod
        if pod.namespace in seen:
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
