"""The pods and containers of this node, and the cgroups of those that somebody watches.

A core without files, sockets or threads: sources feed it, `select` answers, and `settle` says which
cgroups the selectors in use have gained and lost. Where a source that knows more disagrees with
another one, it counts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from coral.agent.machine.pods.cgroup_names import Place
from coral.agent.machine.pods.facts import Container, Facts, Pod, attributes_of
from coral.agent.machine.pods.groups import Groups
from coral.agent.machine.pods.standing import SOURCES
from coral.collectors.hierarchies import Kind
from coral.collectors.selectors import Selector

MOST_PODS: Final = 4096  # of one source; a kubelet runs 110 by default
MOST_CGROUPS: Final = 65_536
_NEAR: Final = 3
_LIKENESS: Final = 0.4

Cgroups = frozenset[Path]


class Change(NamedTuple):
    """The cgroups that one user of a selector has gained and lost."""

    watch: Watch
    added: Cgroups
    removed: Cgroups


@dataclass(eq=False)
class Watch:
    """A selector in use, in the hierarchy `kind`, and the cgroups that it was told of."""

    selector: Selector
    kind: Kind
    told: Cgroups = frozenset()


@dataclass
class Inventory:
    """All that is known of this node. `refused` counts what there was no room for."""

    refused: int = 0
    version: int = 0  # grows with each change
    order: Sequence[str] = SOURCES  # of two that know a pod, the first counts
    _cgroups: dict[Kind, dict[Path, Place]] = field(
        default_factory=lambda: {"v2": {}, "memory": {}}
    )
    _pods: dict[str, dict[str, Pod]] = field(default_factory=lambda: {s: {} for s in SOURCES})
    _containers: dict[str, dict[str, Container]] = field(
        default_factory=lambda: {s: {} for s in SOURCES}
    )
    _groups: dict[Kind, Groups] = field(
        default_factory=lambda: {"v2": Groups(MOST_CGROUPS), "memory": Groups(MOST_CGROUPS)}
    )
    _watches: list[Watch] = field(default_factory=list)

    # What sources tell.

    def made(self, kind: Kind, directory: Path, place: Place, group: int = 0) -> None:
        """A cgroup is there; GROUP is what its id makes (`coral.collectors.cgroups.Below`), 0 where
        that is not known. Those inside of a container are not kept: they come with it."""
        if place.level == "inside" and place.container:
            return
        self._groups[kind].made(directory, place, group)
        if place.level == "inside":
            return
        self.version += 1
        known = self._cgroups[kind]
        if directory not in known and len(known) >= MOST_CGROUPS:
            self.refused += 1
            return
        known[directory] = place

    def removed(self, kind: Kind, directory: Path) -> None:
        """A cgroup is gone."""
        self.version += 1
        self._cgroups[kind].pop(directory, None)
        self._groups[kind].removed(directory)

    def replace_cgroups(self, kind: Kind, found: Mapping[Path, tuple[Place, int]]) -> None:
        """These are all cgroups of a hierarchy, with their groups."""
        self.version += 1
        self._cgroups[kind] = {}
        self._groups[kind].keep(found)
        for directory, (place, group) in found.items():
            self.made(kind, directory, place, group)

    def tell(self, source: str, facts: Facts) -> None:
        """These are all pods and containers that a source knows."""
        self.version += 1
        self.refused += max(0, len(facts.pods) - MOST_PODS)
        self._pods[source] = _by_uid(facts.pods[:MOST_PODS])
        most = MOST_PODS * 8
        self.refused += max(0, len(facts.containers) - most)
        self._containers[source] = {each.id: each for each in facts.containers[:most]}

    def tell_one(self, source: str, pod: Pod, containers: Iterable[Container]) -> None:
        """A source has seen a pod begin or change."""
        self.version += 1
        known = self._pods[source]
        if pod.uid not in known and len(known) >= MOST_PODS:
            self.refused += 1
            return
        if pod.mirrors and (other := known.get(pod.uid)) and not other.is_named_like(pod):
            return
        known[pod.uid] = pod
        self._containers[source].update((each.id, each) for each in containers)

    def forget_one(self, source: str, pod: Pod) -> None:
        """A source has seen a pod go."""
        known = self._pods[source].get(pod.uid)
        if not known or not known.is_named_like(pod):
            return
        self.version += 1
        del self._pods[source][pod.uid]
        of_source = self._containers[source]
        self._containers[source] = {k: it for k, it in of_source.items() if it.pod != pod.uid}

    def prefer(self, order: Sequence[str]) -> None:
        """From now on the sources count in this ORDER."""
        if list(order) != list(self.order):
            self.version += 1
            self.order = order

    # What callers ask.

    def pod(self, uid: str) -> Pod | None:
        """A pod by its key. One that mirrors another gives way to any whose own key it is: anybody
        who may make pods may write what makes it a mirror."""
        found = (of[uid] for s in self.order if uid in (of := self._pods[s]))
        return min(found, key=lambda pod: pod.mirrors, default=None)

    def container(self, container_id: str) -> Container | None:
        """A container by its whole id."""
        found = (
            of[container_id] for s in self.order if container_id in (of := self._containers[s])
        )
        return next(found, None)

    @property
    def pods(self) -> list[Pod]:
        """All pods, by namespace and name."""
        uids = {uid for of in self._pods.values() for uid in of}
        found = [pod for uid in uids if (pod := self.pod(uid))]
        return sorted(found, key=lambda pod: (pod.namespace, pod.name, pod.uid))

    def containers_of(self, uid: str) -> list[Container]:
        """The containers of a pod that have a cgroup, by name."""
        with_cgroup = {
            place.container
            for of in self._cgroups.values()
            for place in of.values()
            if place.pod == uid and place.container
        }
        found = [each for each in map(self.container, with_cgroup) if each]
        return sorted(found, key=lambda each: (each.name, each.id))

    def select(self, selector: Selector, kind: Kind) -> Cgroups:
        """The cgroups of a selector in one hierarchy, without those that are below another."""
        found = {
            directory
            for directory, place in self._cgroups[kind].items()
            if self._belongs(place, selector)
        }
        return frozenset(path for path in found if found.isdisjoint(path.parents))

    def _belongs(self, place: Place, selector: Selector) -> bool:
        if selector.kind == "container":
            own = place.innermost or place.container
            return place.level == "container" and own.startswith(selector.container)
        pod = self.pod(place.pod) if place.pod else None
        if not pod or not selector.accepts(pod.namespace, pod.name, pod.labels, pod.workloads):
            return False
        if not selector.container:
            return True
        container = self.container(place.container) if place.container else None
        return container is not None and container.name == selector.container

    def container_ids(self, prefix: str) -> dict[str, str]:
        """The ids of containers that begin with PREFIX, with the namespaces of their pods."""
        return {
            own: pod.namespace if (pod := self.pod(place.pod)) else ""
            for of in self._cgroups.values()
            for place in of.values()
            if place.level == "container"
            and (own := place.innermost or place.container).startswith(prefix)
        }

    def unnamed(self) -> set[str]:
        """The keys of pods and the ids of their containers that have a cgroup and no name yet."""
        found = set()
        for place in (place for of in self._cgroups.values() for place in of.values()):
            if place.pod and not self.pod(place.pod):
                found.add(place.pod)
            elif place.pod and place.container and not self.container(place.container):
                found.add(place.container)
        return found

    def attributes(self, selector: Selector, kind: Kind) -> list[dict[str, str]]:
        """The attributes of each cgroup of a selector, in the order of their paths."""
        places = self._cgroups[kind]
        return [self.attributes_at(places[path]) for path in sorted(self.select(selector, kind))]

    def attributes_in(self, cgroups: Iterable[Path], kind: Kind) -> list[dict[str, str]]:
        """The attributes of each of these cgroups that is known."""
        places = self._cgroups[kind]
        return [self.attributes_at(places[path]) for path in sorted(cgroups) if path in places]

    def is_pod(self, directory: Path, kind: Kind) -> bool:
        """Whether a cgroup's DIRECTORY is that of a pod, and not of a container."""
        place = self._cgroups[kind].get(directory)
        return place is not None and place.level == "pod"

    def by_group(self, selector: Selector, kind: Kind) -> dict[int, dict[str, str]]:
        """The attributes of all that belongs to a selector, by groups; also of what has gone a
        short time ago."""
        return {
            group: self.attributes_at(place)
            for group, place in self._groups[kind].places.items()
            if self._belongs(place, selector)
        }

    def attributes_at(self, place: Place) -> dict[str, str]:
        """The attributes of what runs at a place."""
        pod = self.pod(place.pod) if place.pod else None
        own = place.container or place.innermost
        return attributes_of(pod, self.container(own) if own else None, own)

    def near(self, selector: Selector, namespaces: AbstractSet[str]) -> list[str]:
        """The names in NAMESPACES most like that of a selector for which there is nothing, as users
        write them after its kind."""
        pods = [pod for pod in self.pods if pod.namespace in namespaces]
        if selector.kind in ("namespace", "pods"):
            wanted, known = selector.namespace, {pod.namespace for pod in pods}
        elif selector.workload:
            kind, name = selector.workload
            wanted = f"{selector.namespace}/{kind}/{name}"
            known = {f"{p.namespace}/{kind}/{name}" for p in pods for kind, name in p.workloads}
        elif selector.container and selector.pod:
            wanted = f"{selector.namespace}/{selector.pod}/{selector.container}"
            known = {f"{pod.namespace}/{pod.name}" for pod in pods}
            known |= {f"{p.namespace}/{p.name}/{c.name}" for p in pods for c in self._named(p)}
        else:
            wanted = f"{selector.namespace}/{selector.pod}"
            known = {f"{pod.namespace}/{pod.name}" for pod in pods}
        return difflib.get_close_matches(wanted, sorted(known), _NEAR, _LIKENESS)

    def _named(self, pod: Pod) -> Iterator[Container]:
        return (c for of in self._containers.values() for c in of.values() if c.pod == pod.uid)

    def kind_for(self, selector: Selector, available: Iterable[Kind]) -> Kind | None:
        """The hierarchy in which to watch a selector: the one where its cgroups are now, or else
        those of any pod. Of two, that of the memory controller, because where it is one of v1,
        runtimes put every process there."""
        kinds = sorted(available)  # memory, v2
        for has in (lambda kind: self.select(selector, kind), lambda kind: self._cgroups[kind]):
            for kind in kinds:
                if has(kind):
                    return kind
        return kinds[0] if kinds else None

    # Those who watch.

    def watch(self, selector: Selector, kind: Kind) -> Watch:
        """Begins to follow a selector. What it has now is in `told`."""
        watch = Watch(selector, kind, self.select(selector, kind))
        self._watches.append(watch)
        return watch

    def unwatch(self, watch: Watch) -> None:
        """Ends it."""
        if watch in self._watches:
            self._watches.remove(watch)

    def settle(self) -> list[Change]:
        """What has changed for those who watch since they were last told."""
        changes = []
        for watch in self._watches:
            now = self.select(watch.selector, watch.kind)
            if now != watch.told:
                changes.append(Change(watch, now - watch.told, watch.told - now))
                watch.told = now
        return changes


def _by_uid(pods: Iterable[Pod]) -> dict[str, Pod]:
    """PODS by their keys. Mirrors of one pod that do not agree on its name leave it without."""
    found: dict[str, Pod] = {}
    disputed = set()
    for pod in pods:
        other = found.setdefault(pod.uid, pod)
        if other.mirrors and not pod.mirrors:
            found[pod.uid] = pod
        elif other.mirrors and not other.is_named_like(pod):
            disputed.add(pod.uid)
    return {uid: pod for uid, pod in found.items() if not (pod.mirrors and uid in disputed)}
