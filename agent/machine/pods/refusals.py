"""What is told of a selector for which there is nothing, with the names nearest to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet

from coral.agent.errors import NotFoundError
from coral.agent.machine.pods.inventory import Inventory
from coral.collectors.selectors import Selector


def said(selector: Selector, problem: str) -> str:
    """PROBLEM as a refusal of a value of the option: in the contract's terms."""
    return f'config["{selector.kind}"]: {problem}'


def only_container(selector: Selector, ids: Mapping[str, str], sees: Callable[[str], bool]) -> str:
    """Which of IDS, with the namespaces of each, is meant: the only one, or the only one that the
    caller SEES. Raises `NotFoundError`."""
    if not ids:
        raise NotFoundError(
            said(selector, f"no container {selector.container!r} runs on this node")
        )
    seen = sorted(found for found, namespace in ids.items() if len(ids) == 1 or sees(namespace))
    if len(seen) == 1:
        return seen[0]
    why = "more than one container begins like that"
    if seen:
        near = ", ".join(found[:20] for found in seen[:3])
        why = f"{len(seen)} containers begin like that, such as {near}"
    raise NotFoundError(said(selector, f"{why}; give more"))


def why_empty(inventory: Inventory, selector: Selector, seen: AbstractSet[str]) -> str:
    """The note of a selector of pods that nothing matches yet. Raises `NotFoundError`, with the
    nearest names in the namespaces SEEN, unless its own is known and pods are to come."""
    pods = inventory.pods
    namespaces = {pod.namespace for pod in pods}
    if selector.kind == "pods" and selector.namespace in namespaces:
        return f"no pod matches {selector} now; those that come are watched"
    if selector.kind in ("pods", "namespace"):
        what = f"no pod of a namespace {selector.namespace!r} runs on this node"
    elif selector.kind == "workload":
        what = f"no pod of a workload {selector.text!r} runs on this node"
    elif selector.container and (selector.namespace, selector.pod) in {
        (pod.namespace, pod.name) for pod in pods
    }:
        what = f"no container {selector.container!r} of that pod runs now"
    else:
        what = f"no pod {selector.namespace}/{selector.pod} runs on this node"
    near = inventory.near(selector, seen)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    raise NotFoundError(said(selector, what), hint)
