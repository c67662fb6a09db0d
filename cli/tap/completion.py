"""What a shell offers for TARGET: the kinds of targets, and the pods that the agent knows.

In bash: eval "$(_CORAL_COMPLETE=bash_source coral)"; zsh and fish alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

import click
from click.shell_completion import CompletionItem

from coral.client import AgentClient, AgentError, PodInfo, default_address

_ANSWER_S: Final = 2.0  # somebody waits for the shell
_KINDS: Final = {
    "pid:": "a process",
    "comm:": "a command name",
    "cgroup:": "a cgroup",
    "pod:": "a pod",
    "pods:": "pods by label",
    "namespace:": "the pods of a namespace",
    "workload:": "the pods of a workload",
    "container:": "a container by its id",
}
_OF_PODS: Final = ("pod:", "pods:", "namespace:", "workload:", "container:")
_SHORT_ID: Final = 12


def complete_target(
    ctx: click.Context,
    _parameter: click.Parameter,
    incomplete: str,
) -> list[CompletionItem]:
    """The targets that begin with INCOMPLETE. Silent where no agent answers."""
    kind, colon, _ = incomplete.partition(":")
    if not colon:
        return [
            CompletionItem(each, help=about)
            for each, about in _KINDS.items()
            if each.startswith(kind)
        ]
    if f"{kind}:" not in _OF_PODS:
        return []
    with suppress(AgentError, TimeoutError, OSError):
        pods = asyncio.run(_pods(ctx.params.get("address") or default_address()))
        names = sorted({f"{kind}:{name}" for name in candidates(kind, pods)})
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return []


def candidates(kind: str, pods: Iterable[PodInfo]) -> Iterator[str]:
    """The values that a target of KIND can have, among these PODS."""
    for pod in pods:
        workload = pod.attributes.get("k8s.workload.name")
        if kind == "namespace":
            yield pod.namespace
        elif kind == "pods":
            yield from (f"{pod.namespace}?{key}={text}" for key, text in pod.labels.items())
        elif kind == "workload" and workload:
            yield f"{pod.namespace}/{pod.attributes['k8s.workload.kind']}/{workload}"
        elif kind == "container":
            yield from (container_id[:_SHORT_ID] for container_id in pod.containers)
        elif kind == "pod":
            whole = f"{pod.namespace}/{pod.name}"
            yield from (whole, *(f"{whole}/{name}" for name in pod.containers.values()))


async def _pods(address: str) -> tuple[PodInfo, ...]:
    async with AgentClient(address, timeout_s=_ANSWER_S) as agent:
        return (await agent.pods()).pods
