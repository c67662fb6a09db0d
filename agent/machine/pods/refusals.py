"""What is told of a selector for which there is nothing, with the names nearest to it."""

from __future__ import annotations

from coral.agent.errors import NotFoundError
from coral.agent.machine.pods.inventory import Inventory
from coral.collectors.selectors import Selector


def said(selector: Selector, problem: str) -> str:
    """PROBLEM as a refusal of a value of the option: in the contract's terms."""
    return f'config["{selector.kind}"]: {problem}'


def check_container(inventory: Inventory, selector: Selector) -> None:
    """Raises `NotFoundError` unless exactly one container has an id that begins like that."""
    ids = inventory.container_ids(selector.container)
    if not ids:
        raise NotFoundError(
            said(selector, f"no container {selector.container!r} runs on this node")
        )
    if len(ids) > 1:
        near = ", ".join(sorted(found[:20] for found in ids)[:3])
        raise NotFoundError(
            said(selector, f"{len(ids)} containers begin like that, such as {near}; give more")
        )


def why_empty(inventory: Inventory, selector: Selector) -> str:
    """The note of a selector of pods that nothing matches yet. Raises `NotFoundError`, unless its
    namespace is known and pods are to come."""
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
    near = inventory.near(selector)
    hint = f"; the nearest names are {', '.join(near)}" if near else ""
    raise NotFoundError(said(selector, f"{what}{hint}"))
