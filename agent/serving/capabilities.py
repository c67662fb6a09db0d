"""The agent's capabilities on this machine, as the contract describes them."""

from __future__ import annotations

from collections.abc import Iterable

from coral.agent.access import exposure
from coral.agent.serving.pods import pod_sources
from coral.agent.sessions.supervisor import Supervisor
from coral.bpf import Feature
from coral.collectors.contract import Collector, Support
from coral.collectors.registry import COLLECTORS
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_name


async def capabilities_of(supervisor: Supervisor) -> pb.EbpfCapabilities:
    """Everything that was tried, and every collector: whether it can run, how, or why not."""
    from importlib.metadata import version  # noqa: PLC0415  megabytes, and seldom asked for

    features = await supervisor.features()
    answer = pb.EbpfCapabilities(
        kernel_version=features.kernel_release,
        btf_available=features["btf"].available,
        cap_bpf=features.cap_bpf,
        agent_id=supervisor.config.name,
        agent_version=version("coral-ebpf-agent"),
        libbpf_version=features.libbpf_version,
        features=_features(features.features),
    )
    answer.pod_sources.extend(await pod_sources(supervisor))
    answer.warnings.extend(exposure.warnings(supervisor.config, supervisor.access))
    supports = await supervisor.capabilities()
    for kind, collector in COLLECTORS.items():
        support = supports[kind_name(kind)]
        answer.collectors.append(_capability(collector, support))
        if support.supported:
            answer.available_collectors.append(kind)  # type: ignore[arg-type]
    answer.supported = bool(answer.available_collectors)
    if not answer.supported:
        answer.unsupported_reason = features.obstacle or "no collector can run on this kernel"
    return answer


def _capability(collector: type[Collector], support: Support) -> pb.CollectorCapability:
    return pb.CollectorCapability(
        kind=collector.kind,
        supported=support.supported,
        hook=support.hook,
        reason=support.reason,
        options=[
            pb.CollectorOption(
                name=option.name,
                accepts=option.accepts,
                default_value=option.default,
                description=option.description,
                refused=support.refused_options.get(option.name),
            )
            for option in collector.options()
        ],
        steps=[
            pb.CollectorStep(what=step.what, taken=step.taken, refused=_features(step.refused))
            for step in support.steps
        ],
    )


def _features(features: Iterable[Feature]) -> list[pb.KernelFeature]:
    return [pb.KernelFeature(name=f.name, available=f.available, reason=f.reason) for f in features]
