"""What a selector stands for on this node: a pod as it is listed, and a target that is followed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coral.agent.machine.pods.facts import Pod, common
from coral.agent.machine.pods.inventory import Cgroups, Watch
from coral.bpf import Features
from coral.collectors.contract import NO_ATTRIBUTES, CgroupsChanged
from coral.collectors.hierarchies import Kind
from coral.collectors.selectors import Selector

if TYPE_CHECKING:
    from coral.agent.machine.pods.node import Pods

_MOST_LABEL: Final = 128  # an annotation may name the service
_NAMES: Final = ("k8s.pod.name", "k8s.container.name")
_MOST_NOTED: Final = 16_384  # containers of one target, those that have gone among them
# And in all, about, as each may have 32 annotations of 256 characters.
_MOST_NOTED_BYTES: Final = 16 << 20
_ENTRY_BYTES: Final = 512  # of a container without its texts, as the next
_TEXT_BYTES: Final = 100  # of a name and its text without their characters


@dataclass(frozen=True)
class KnownPod:
    """A pod of this node, with its attributes and its containers' names by id."""

    pod: Pod
    attributes: Mapping[str, str]
    containers: Mapping[str, str]


@dataclass(eq=False)
class PodTarget:
    """What a selector stands for: the cgroups that it has now, and later. It is a `LiveCgroups` of
    the collectors' contract."""

    selector: Selector
    kind: Kind
    notes: tuple[str, ...]
    _pods: Pods
    _features: Features
    watch: Watch | None = field(default=None, init=False)  # while it is followed
    changed: CgroupsChanged | None = field(default=None, init=False)
    known: tuple[int, list[dict[str, str]]] = field(default_factory=lambda: (-1, []), init=False)
    _last: Mapping[str, str] = field(default_factory=lambda: NO_ATTRIBUTES, init=False)
    noted_version: int = field(default=-1, init=False)  # of the inventory
    _noted: dict[int, Mapping[str, str]] = field(default_factory=dict, init=False)  # by group
    _noted_bytes: int = field(default=0, init=False)
    # Pods that come later and for whose cgroups this is false are left out.
    within: Callable[[Path], bool] | None = field(default=None, init=False)
    # Takes the names of pods that have come later, and of those that were left out.
    joined: Callable[[list[str], list[str]], object] | None = field(default=None, init=False)
    _decided: frozenset[str] = field(default=frozenset(), init=False)
    _kept: Cgroups = field(default=frozenset(), init=False)  # while it is followed
    _keeping: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def label(self) -> str:
        """The service's name where all of it has one, else the selector."""
        names = {found.get("service.name") for found in self._pods.attributes(self)}
        only = names.pop() if len(names) == 1 else None
        return (only or str(self.selector))[:_MOST_LABEL]

    @property
    def pods(self) -> tuple[str, ...]:
        """The pods that it has now, `NAMESPACE/POD`; of containers outside of pods their ids."""
        found = tuple(sorted({_name(found) for found in self._pods.attributes(self)}))
        self._decided = frozenset(found)
        return found

    @property
    def namespaces(self) -> tuple[str, ...]:
        """The namespaces that all of it is in, now and later; empty where that is not known."""
        if self.selector.namespace:
            return (self.selector.namespace,)
        known = self.attributes.get("k8s.namespace.name")  # a container's
        return (known,) if known else ()

    @property
    def key(self) -> tuple[str, ...]:
        """The same for equal selectors."""
        return (self.selector.kind, self.selector.text)

    @property
    def now(self) -> Cgroups:
        """The cgroups that it has now."""
        return self._pods.cgroups(self)

    @property
    def attributes(self) -> Mapping[str, str]:
        """The attributes that all of it has in common; once it has gone, those that it had. Pods
        that were left out are no part of it."""
        if self.within and self.watch:
            each = self._pods.attributes_in(self, self._kept)
        else:
            each = self._pods.attributes(self)
        self._last = common(each) or self._last
        return self._last

    def is_pod(self, directory: Path) -> bool:
        """Whether a cgroup is that of a pod, and those directly below it its containers'."""
        return self._pods.is_pod(self, directory)

    def attributes_of(self, group: int) -> Mapping[str, str]:
        """The attributes of the container whose cgroup makes a GROUP, as they were last known."""
        self._pods.note_groups(self)
        return self._noted.get(group, NO_ATTRIBUTES)

    def note(self, by_group: Mapping[int, Mapping[str, str]]) -> None:
        """These are the attributes by group. What was known of others stays so for some time, and
        so does what was known of a container that no source knows any more."""
        for group, attributes in by_group.items():
            before = self._forget(group)  # the newest are the last
            is_lost = any(name in before and name not in attributes for name in _NAMES)
            kept = before if is_lost else attributes
            self._noted[group] = kept
            self._noted_bytes += _size_bytes(kept)
        while len(self._noted) > _MOST_NOTED or self._noted_bytes > _MOST_NOTED_BYTES:
            self._forget(next(iter(self._noted)))

    @property
    def noted_bytes(self) -> int:
        """About how much memory the attributes by group take."""
        return self._noted_bytes

    def _forget(self, group: int) -> Mapping[str, str]:
        before = self._noted.pop(group, None)
        if before is None:
            return NO_ATTRIBUTES
        self._noted_bytes -= _size_bytes(before)
        return before

    def follow(self, changed: CgroupsChanged) -> Cgroups:
        """Returns the cgroups that it has, and calls CHANGED, from a thread, for those that it
        gains and loses from then on."""

        def allowed(added: Cgroups, removed: Cgroups) -> None:
            kept = self._allowed(added)
            self._keep(kept, removed)
            changed(kept, removed)
            self._tell_joined(kept, added - kept, frozenset())

        self.changed = allowed
        found = self._pods.follow(self, self._features)
        kept = self._allowed(found)
        self._keep(kept, frozenset())
        self._tell_joined(kept, found - kept, self._decided)
        return kept

    def _keep(self, added: Cgroups, removed: Cgroups) -> None:
        """From the thread of pods, too."""
        with self._keeping:
            self._kept = (self._kept | added) - removed

    def _allowed(self, cgroups: Cgroups) -> Cgroups:
        return frozenset(filter(self.within, cgroups)) if self.within else cgroups

    def _tell_joined(self, joined: Cgroups, left_out: Cgroups, known: frozenset[str]) -> None:
        """Tells which pods these cgroups are of, but for those that are KNOWN."""
        if not self.joined:
            return
        names = (
            sorted({_name(each) for each in self._pods.attributes_in(self, some)} - known)
            for some in (joined, left_out)
        )
        come, kept_out = names
        if come or kept_out:
            self.joined(come, kept_out)

    def close(self) -> None:
        """Ends that. CHANGED may still be under way."""
        self._pods.unfollow(self)


def _size_bytes(attributes: Mapping[str, str]) -> int:
    """About the memory that ATTRIBUTES take."""
    texts = sum(len(name) + len(text) + _TEXT_BYTES for name, text in attributes.items())
    return _ENTRY_BYTES + texts


def _name(attributes: Mapping[str, str]) -> str:
    names = (attributes.get("k8s.namespace.name", ""), attributes.get("k8s.pod.name", ""))
    return "/".join(names) if all(names) else attributes.get("container.id", "")
