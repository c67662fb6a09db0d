"""The ladder of a collector in words: the rungs that it stands on, and why no better ones."""

from __future__ import annotations

from collections.abc import Iterator

from coral.client import CollectorCapability, CollectorStep


def taken(collector: CollectorCapability) -> str:
    """The rungs that it stands on: `core, tp_btf, ...`."""
    return ", ".join(step.taken for step in collector.steps if step.taken)


def refusals(collector: CollectorCapability) -> Iterator[tuple[str, str]]:
    """The steps on which a better rung was refused, and the options that this machine does not
    support: the name of each, and what there is in its place and why."""
    for step in collector.steps:
        if step.refused:
            yield step.what, _refusal(step)
    for option in collector.options:
        if option.refused:
            yield option.name, f"give {option.refused}"


def _refusal(step: CollectorStep) -> str:
    reasons = [f"{refused.name}: {refused.reason}" for refused in step.refused]
    if not step.taken:
        return f"none: {'; '.join(reasons)}"
    return f"{step.taken} in place of {'; of '.join(reasons)}"
