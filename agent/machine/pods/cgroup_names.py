"""Whose a cgroup is, by its path: the pod's UID and the container's id, as runtimes write them.

Kubelets make a cgroup for each pod, and runtimes one for each container below it, with cgroupfs
names or as units of systemd:

    /kubepods/burstable/pod0a1b...-...-.../3f2a...
    /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0a1b..._....slice/
        cri-containerd-3f2a....scope

Static pods have a UID of 32 digits without dashes. A kubelet inside a container (kind) puts
`kubelet` before these names, and its node's own container before the path. A runtime that takes
systemd's notation literally leaves `kubepods-pod0a1b....slice:cri-containerd:3f2a...`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

_UID: Final = (
    r"[0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32}"
)
_POD: Final = re.compile(rf"(?:[a-z0-9]+-)*pod({_UID})(?:\.slice)?")
# `conmon` monitors a container: its process is no part of it.
_CONTAINER: Final = re.compile(
    r"(?:(?:docker|cri-containerd|crio|libpod|nerdctl)-)?([0-9a-f]{64})(?:\.scope)?"
)
_SEPARATORS: Final = str.maketrans("", "", "-_")


@dataclass(frozen=True, slots=True)
class Place:
    """What a cgroup is: a pod's own, a container's own, or something inside of one.

    `pod` is the UID, of 32 digits, or empty. `container` is the container that the pod's kubelet
    knows, or outside of pods the innermost one; `innermost` is another one that runs inside it.
    """

    level: Literal["pod", "container", "inside"]
    pod: str = ""
    container: str = ""
    innermost: str = ""


def place_of(path: str) -> Place | None:
    """What the cgroup at PATH is, from the root of its hierarchy; None for one that belongs to
    neither a pod nor a container."""
    pod, containers, level = "", list[str](), "inside"
    for component in filter(None, path.split("/")):
        level = "inside"
        for part in component.split(":"):
            # Inside of a pod, whoever may make cgroups there could take another pod's name.
            if not pod and (match := _POD.fullmatch(part)):
                pod, containers, level = uid_key(match[1]), [], "pod"
            elif match := _CONTAINER.fullmatch(part):
                containers.append(match[1])
                level = "container"
    if not pod and not containers:
        return None
    first = (containers[0] if pod else containers[-1]) if containers else ""
    innermost = containers[-1] if containers and containers[-1] != first else ""
    return Place(level, pod, first, innermost)  # type: ignore[arg-type]


def uid_key(uid: str) -> str:
    """A pod's UID as all sources' can be compared: of cgroups driven by systemd it has underscores,
    and of static pods no dashes."""
    return uid.translate(_SEPARATORS).lower()
