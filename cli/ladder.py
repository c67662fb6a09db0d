"""What a collector stands on, in words: the ways that are taken, and why no better ones are."""

from __future__ import annotations

from collections.abc import Iterator

from coral.mesh.v1 import ebpf_pb2 as pb


def taken(collector: pb.CollectorCapability) -> str:
    """The ways that are taken: `core, tp_btf, ...`."""
    return ", ".join(step.taken for step in collector.steps if step.taken)


def refusals(collector: pb.CollectorCapability) -> Iterator[tuple[str, str]]:
    """Of each step that is not the best and each option that cannot be had: its name, and what
    there is in place of what, and why."""
    for step in collector.steps:
        if step.refused:
            yield step.what, _refusal(step)
    for option in collector.options:
        if option.refused:
            yield option.name, f"give {option.refused}"


def _refusal(step: pb.CollectorStep) -> str:
    reasons = [f"{refused.name}: {refused.reason}" for refused in step.refused]
    if not step.taken:
        return f"none: {'; '.join(reasons)}"
    return f"{step.taken} in place of {'; of '.join(reasons)}"
