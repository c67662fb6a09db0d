"""The pods of this node: asked once for a list, or followed as long as sessions watch some.

While there is a target, one thread waits for the kernel's word of new cgroups, asks the sources
whose they are, and tells the target, all before the container's first exec. Without one there is
no thread, no program and no connection.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import structlog

from coral.agent.config_kubernetes import Kubernetes
from coral.agent.errors import FailedPreconditionError
from coral.agent.machine.pods.api import Api, ApiWatch
from coral.agent.machine.pods.cgroups import CgroupChange, CgroupChanges, Tree
from coral.agent.machine.pods.facts import Container, Facts, Pod, attributes_of
from coral.agent.machine.pods.inventory import Cgroups, Inventory
from coral.agent.machine.pods.refusals import only_container, said, why_empty
from coral.agent.machine.pods.source import SourceError, SourceState
from coral.agent.machine.pods.sources import sources_of
from coral.agent.machine.pods.standing import SOURCES, Standings
from coral.agent.machine.pods.target import KnownPod, PodTarget
from coral.agent.machine.pods.waiting import ASK_EVERY_S, Asking, Cpu, Waiting
from coral.bpf import BpfError, Features
from coral.collectors.selectors import Selector

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.pods")

_FRESH_S: Final = 5.0
_SCAN_EVERY_S: Final = 0.5  # where the kernel does not tell


def _sees_all(_namespace: str) -> bool:
    return True


class Pods:
    """What is known of the pods of this node. Safe to use from several threads; most calls
    block."""

    def __init__(self, config: Kubernetes) -> None:
        self._config = config
        self._lock = threading.RLock()  # of all that follows
        self._inventory = Inventory()
        self._tree = Tree({})
        self._targets: set[PodTarget] = set()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._poke = -1
        self._api_watch: ApiWatch | None = None
        self._standings = Standings(config.stale_after)
        self._cpu = Cpu()
        self._sources, self._missing = sources_of(config)
        # Both are taken before the other one, never after it.
        self._asking = threading.Lock()  # held while sources are asked
        self._telling = threading.Lock()  # held while targets are told
        self._failure = ""  # of the programs that tell of new cgroups
        self._looked_at = 0.0

    # Asked once.

    def target(
        self, selector: Selector, features: Features, sees: Callable[[str], bool] = _sees_all
    ) -> PodTarget:
        """What SELECTOR stands for. Raises `NotFoundError`, with the nearest names in namespaces
        that the caller SEES, or `FailedPreconditionError` if nothing here knows the names."""
        self._look()
        with self._lock:
            inventory, kinds = self._inventory, tuple(self._tree.of)
            kind = inventory.kind_for(selector, kinds)
            if kind is None:
                raise FailedPreconditionError(said(selector, _no_cgroups()))
            if selector.kind != "container" and not self._standings.knows_names:
                raise FailedPreconditionError(said(selector, self._why_no_names()))
            found = inventory.select(selector, kind)
            ids = inventory.container_ids(selector.container)
            namespaces = {pod.namespace for pod in inventory.pods}
        if selector.kind == "container":
            # By its whole id from now on: one that comes later may begin like that.
            own = only_container(selector, ids, sees)
            selector = replace(selector, container=own)
        notes = list(self._notes(selector))
        if not found:  # to be asked without the lock, since Kubernetes may have to be
            seen = frozenset(filter(sees, namespaces))
            with self._lock:
                notes.append(why_empty(inventory, selector, seen))
        return PodTarget(selector, kind, tuple(notes), self, features)

    def listing(self) -> list[KnownPod]:
        """The pods of this node that some source names."""
        self._look()
        with self._lock:
            inventory = self._inventory
            return [
                KnownPod(
                    pod,
                    attributes_of(pod),
                    {c.id: c.name for c in inventory.containers_of(pod.uid) if c.name},
                )
                for pod in inventory.pods
            ]

    def sources(self, features: Features) -> list[SourceState]:
        """What tells of pods here, and what could; as it was a few seconds ago at most."""
        if not self._looked_at or time.monotonic() - self._looked_at > _FRESH_S:
            self._look()
        with self._lock:
            kinds = ", ".join(
                f"{kind} at {found.mount_point}" for kind, found in self._tree.of.items()
            )
            paths = SourceState("cgroup paths", bool(kinds), kinds or _no_cgroups())
            return [paths, self._changes(features), *self._standings.states()]

    def _changes(self, features: Features) -> SourceState:
        name, why = "cgroup changes", self._failure
        try:
            rung = CgroupChanges.rung(features)
        except BpfError as error:
            why = str(error)
        if why:
            late = f"new cgroups are looked for every {_SCAN_EVERY_S:g} s"
            return SourceState(name, False, f"{late}: {why}")
        when = "loaded now" if self._thread else "loaded while a session watches pods"
        return SourceState(name, True, f"{rung.hook.taken}/cgroup_mkdir, {when}")

    def cgroups(self, target: PodTarget) -> Cgroups:
        """The cgroups that a target has now."""
        with self._lock:
            return self._inventory.select(target.selector, target.kind)

    def attributes(self, target: PodTarget) -> list[dict[str, str]]:
        """The attributes of each of these. They are worked out when something has changed."""
        with self._lock:
            version, found = target.known
            if version != self._inventory.version:
                found = self._inventory.attributes(target.selector, target.kind)
                target.known = self._inventory.version, found
            return found

    def attributes_in(self, target: PodTarget, cgroups: Cgroups) -> list[dict[str, str]]:
        """The attributes of some cgroups of a target, as far as they are there."""
        with self._lock:
            return self._inventory.attributes_in(cgroups, target.kind)

    def is_pod(self, target: PodTarget, directory: Path) -> bool:
        """Whether a cgroup of a target is that of a pod, and not of a container."""
        with self._lock:
            return self._inventory.is_pod(directory, target.kind)

    def note_groups(self, target: PodTarget) -> None:
        """Lets a target know what the groups of its cgroups are, if something has changed since it
        was last told."""
        with self._lock:
            if target.noted_version != self._inventory.version:
                target.note(self._inventory.by_group(target.selector, target.kind))
                target.noted_version = self._inventory.version

    @property
    def stale_s(self) -> Mapping[str, float]:
        """For how many seconds each source of names that has ever answered has not; 0 for one that
        does. Does not block."""
        return self._standings.stale_s

    @property
    def cpu_s(self) -> float:
        """CPU time that following pods has used so far, in seconds. Does not block."""
        return self._cpu.used_s

    def _why_no_names(self) -> str:
        whys = "; ".join(f"{state.name}: {state.detail}" for state in self._standings.states())
        return f"nothing here knows the names of pods: {whys}; container:ID needs none of these"

    def _notes(self, selector: Selector) -> Iterable[str]:
        if selector.kind != "container":
            yield from self._standings.notes()
        if selector.kind == "workload" and not any(
            self._standings.is_used(name) for name in ("api", "kubelet")
        ):
            yield (
                "workloads are told by the names and labels of pods: neither the API nor the "
                "kubelet is asked for their owners"
            )

    # Followed.

    def follow(self, target: PodTarget, features: Features) -> Cgroups:
        """See `PodTarget.follow`."""
        while True:
            with self._lock:
                ending = self._thread if self._stopping else None
                if not ending:
                    self._begin(features)
                    self._targets.add(target)
                    break
            ending.join()
        self._look()
        with self._lock:
            target.watch = self._inventory.watch(target.selector, target.kind)
            return target.watch.told

    def unfollow(self, target: PodTarget) -> None:
        """See `PodTarget.close`."""
        with self._lock:
            if target.watch:
                self._inventory.unwatch(target.watch)
            self._targets.discard(target)
            if self._targets or not self._thread:
                return
            self._stopping, thread = True, self._thread
            self._wake()
        thread.join()

    def _begin(self, features: Features) -> None:
        if self._thread:
            return
        self._tree = Tree.here()
        changes: CgroupChanges | None = None
        try:
            changes = CgroupChanges(self._tree, features)
        except BpfError as error:
            self._failure = str(error)
            log.warning("new pods are found late", reason=str(error))
        self._poke = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, args=(changes,), name="coral-pods", daemon=True
        )
        self._thread.start()

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_write(self._poke, 1)

    def _run(self, changes: CgroupChanges | None) -> None:
        try:
            self._watch(changes)
        except Exception:
            log.exception("following pods failed unexpectedly")
        finally:
            if changes:
                changes.close()
            self._cpu.charge()
            with self._lock:
                if self._api_watch:
                    self._api_watch.close()
                    self._api_watch = None
                os.close(self._poke)
                self._poke, self._thread, self._stopping = -1, None, False
            with self._asking:
                for source in self._sources.values():
                    source.close()

    def _watch(self, changes: CgroupChanges | None) -> None:
        waiting = Waiting(changes, self._poke)
        asking = Asking()
        while not self._stopping:
            waiting.wait(asking.pause_s(_SCAN_EVERY_S if changes is None else ASK_EVERY_S))
            found, missing = changes.read() if changes else ([], True)
            with self._lock:
                self._apply(found)
                if missing:  # after it, or what is gone by now would come back
                    self._scan()
                unnamed = self._inventory.unnamed()
            if asking.is_due(unnamed):
                self._ask()
            self._settle()
            self._cpu.charge()

    def _apply(self, found: Iterable[CgroupChange]) -> None:
        for change in found:
            if change.made:
                self._inventory.made(change.kind, change.directory, change.place, change.group)
            else:
                self._inventory.removed(change.kind, change.directory)

    def _settle(self) -> None:
        """Tells targets what has changed for them."""
        with self._telling:
            with self._lock:
                changes = self._inventory.settle()
                by_watch = {target.watch: target for target in self._targets}
                for each in self._targets:
                    self.note_groups(each)
            for change in changes:
                target = by_watch.get(change.watch)
                if not target or not target.changed:
                    continue
                try:
                    target.changed(change.added, change.removed)
                except BpfError as error:
                    name, why = str(target.selector), str(error)
                    log.error("a new pod is not watched", target=name, reason=why)

    # Both.

    def _look(self) -> None:
        """Looks at all cgroups, and asks all sources."""
        with self._lock:
            self._tree = Tree.here()
            self._scan()
        self._ask()
        self._settle()
        self._looked_at = time.monotonic()
        with self._asking:
            if not self._thread:
                for source in self._sources.values():
                    source.close()

    def _scan(self) -> None:
        for kind in self._tree.of:
            self._inventory.replace_cgroups(kind, self._tree.scan(kind))

    def _ask(self) -> None:
        """Asks every source that does not tell by itself."""
        with self._asking:
            for name in SOURCES:
                if self._api_watch and name == "api":
                    continue
                source = self._sources.get(name)
                if not source:
                    self._failed(name, self._missing[name])
                    continue
                try:
                    facts = source.fetch()
                except SourceError as error:
                    self._failed(name, str(error))
                    continue
                with self._lock:
                    self._inventory.tell(name, facts)
                    self._standings.answered(name, source.about)
                    if isinstance(source, Api) and self._thread and not self._stopping:
                        self._api_watch = ApiWatch(
                            source, self._replace, self._change, self._api_failed
                        )
        with self._lock:
            self._inventory.prefer(self._standings.order)

    def _failed(self, name: str, why_not: str) -> None:
        with self._lock:
            was_stale = self._standings.stale_s.get(name, 1.0) > 0
            self._standings.failed(name, why_not)
        if not was_stale:
            log.warning("a source of pods does not answer any more", source=name, reason=why_not)

    # Called by the API's own thread.

    def _replace(self, facts: Facts) -> None:
        self._cpu.charge()
        with self._lock:
            self._inventory.tell("api", facts)
            self._standings.answered("api", self._sources["api"].about)
            self._wake_if_running()

    def _change(self, what: str, pod: Pod, containers: list[Container]) -> None:
        self._cpu.charge()
        with self._lock:
            if what == "DELETED":
                self._inventory.forget_one("api", pod)
            else:
                self._inventory.tell_one("api", pod, containers)
            self._standings.answered("api", self._sources["api"].about)
            self._wake_if_running()

    def _api_failed(self, reason: str) -> None:
        with self._lock:
            self._standings.alive("api")  # its connection was, until now
        self._failed("api", reason)

    def _wake_if_running(self) -> None:
        if self._thread and self._poke >= 0:
            self._wake()


def _no_cgroups() -> str:
    return (
        "the agent cannot look at the cgroups of the whole machine: mount the host's "
        "/sys/fs/cgroup into its container, or give it hostPID: true and CAP_SYS_PTRACE"
    )
