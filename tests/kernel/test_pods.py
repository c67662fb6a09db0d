"""Pods by name on the real kernel: cgroups as a kubelet and a runtime make them, a runtime that
answers over its socket, and what a session sees of the processes inside, from their exec on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from coral import bpf
from coral.agent.access import policy as rules
from coral.agent.config import Policy
from coral.agent.errors import DeniedError, NotFoundError
from coral.agent.machine.pods.node import Pods
from coral.collectors import selectors
from coral.collectors.contract import ServiceProcesses, Watched
from coral.collectors.syscall_stats.collector import SyscallStatsCollector
from tests.collecting import Collected, both_modes, collected_of
from tests.pods import HASH, FakePod, Node, move
from tests.support import RUNGS, Puppet, loaded, wait_until

pytestmark = pytest.mark.usefixtures("nothing_left")


class Known(Protocol):
    """Whatever has pods."""

    @property
    def pods(self) -> Pods: ...


@contextmanager
def watching(
    node: Known, target: str, without: tuple[str, ...] = (), **config: str
) -> Iterator[Collected]:
    """A session of syscall_stats on TARGET, such as `namespace:shop`, where the kernel lacks
    WITHOUT."""
    kind, _, text = target.partition(":")
    features = bpf.probe().without(*without)
    found = node.pods.target(selectors.parse(kind, text), features)
    service = ServiceProcesses(found.label, (), found)
    collector = SyscallStatsCollector.create({kind: text, **config}, service, features)
    with collected_of(collector) as collected:
        yield collected


def watched(counted: Collected, puppet: Puppet) -> Callable[[], bool]:
    """Whether what PUPPET does is counted: it makes a call of getuid each time."""

    def is_counted() -> bool:
        puppet.do("os.getuid()")
        counted.drain()
        return puppet.pid in counted.by_pid("getuid")

    return is_counted


@both_modes
def test_a_pod_is_all_of_its_containers_and_no_other_pod(node: Node, mode: str) -> None:
    shop = node.pod("shop", "web-1", "app", "proxy")
    other = node.pod("shop", "web-2", "app")
    with Puppet() as app, Puppet() as proxy, Puppet() as stranger:
        move(app, shop.directory_of("app"))
        move(proxy, shop.directory_of("proxy"))
        move(stranger, other.directory_of("app"))
        with watching(node, "pod:shop/web-1", mode=mode) as counted:
            for puppet, times in ((app, 3), (proxy, 5), (stranger, 7)):
                puppet.getppid(times)
    assert counted.by_pid("getppid") == {app.pid: 3, proxy.pid: 5}


def test_one_container_of_a_pod_is_watched_alone(node: Node) -> None:
    shop = node.pod("shop", "web-1", "app", "proxy")
    with Puppet() as app, Puppet() as proxy:
        move(app, shop.directory_of("app"))
        move(proxy, shop.directory_of("proxy"))
        by_id = f"container:{shop.containers['proxy'][:12]}"
        with (
            watching(node, "pod:shop/web-1/app") as by_name,
            watching(node, by_id) as with_id,
        ):
            app.getppid(3)
            proxy.getppid(5)
    assert by_name.by_pid("getppid") == {app.pid: 3}
    assert with_id.by_pid("getppid") == {proxy.pid: 5}


@both_modes
@pytest.mark.parametrize(
    "target", ["namespace:shop", "pods:shop?app=web,!canary", "workload:shop/deploy/web"]
)
def test_every_call_of_a_pod_that_comes_later_is_seen_from_its_exec_on(
    node: Node, target: str, mode: str, programs: Path
) -> None:
    labels = {"app": "web", "pod-template-hash": HASH}
    node.pod("shop", f"web-{HASH}-aaaaa", "app", **labels)
    with Puppet() as runc, watching(node, target, mode=mode, include="getppid,getuid") as counted:
        # As a kubelet and a runtime do it: the pod's cgroup, then its name, then each container's
        # cgroup, into which the runtime's own process goes before it execs.
        new = FakePod(node.top, "shop", f"web-{HASH}-bbbbb", labels)
        new.make()
        node.runtime.pods.append(new)
        new.add("app")
        directory = new.make("app")
        move(runc, directory)
        wait_until(watched(counted, runc))
        command = [str(programs / "calls"), "getppid", "1000"]
        runc.begin(f"os.execv({command[0]!r}, {command!r})")
        wait_until(lambda: not directory.joinpath("cgroup.procs").read_text())
    assert counted.by_comm("getppid") == {"calls": 1000}
    assert not counted.losses


def test_a_pod_is_found_whose_cgroup_the_kernel_had_no_room_to_tell_of(node: Node) -> None:
    """While the thread of pods is held up, the ring fills with what others do (it has room for 248
    changes; some may be read before it is held up)."""
    node.pod("shop", "web-1", "app")
    with Puppet() as app, watching(node, "namespace:shop") as counted:
        with node.pods._lock:
            for number in range(400):
                other = FakePod(node.top, "other", f"o-{number}", {})
                other.make()
                other.directory.rmdir()
            late = node.pod("shop", "web-2", "app")
        move(app, late.directory_of("app"))
        wait_until(watched(counted, app))


def test_a_pod_is_found_that_its_runtime_names_late(node: Node) -> None:
    node.pod("shop", "web-1", "app")
    late = FakePod(node.top, "shop", "web-2")
    late.add("app")
    with Puppet() as puppet, watching(node, "namespace:shop") as counted:
        move(puppet, late.make("app"))
        asked = node.runtime.calls
        wait_until(lambda: node.runtime.calls > asked + 1)
        assert not watched(counted, puppet)()
        node.runtime.pods.append(late)
        wait_until(watched(counted, puppet))
        puppet.getppid(11)
    assert counted.by_pid("getppid") == {puppet.pid: 11}


def test_without_ring_buffers_new_pods_are_found_by_looking(node: Node) -> None:
    node.pod("shop", "web-1", "app")
    oldest = RUNGS["oldest"]
    with Puppet() as puppet, watching(node, "namespace:shop", oldest) as counted:
        states = {state.name: state for state in node.pods.sources(bpf.probe().without(*oldest))}
        assert "are looked for every 0.5 s" in states["cgroup changes"].detail
        move(puppet, node.pod("shop", "web-2", "app").directory_of("app"))
        wait_until(watched(counted, puppet))
        puppet.getppid(11)
    assert counted.by_pid("getppid") == {puppet.pid: 11}


def test_pods_of_other_namespaces_that_come_later_are_not_watched(node: Node) -> None:
    node.pod("shop", "web-1", "app")
    with Puppet() as ours, Puppet() as theirs, watching(node, "namespace:shop") as counted:
        move(theirs, node.pod("bank", "web-1", "app").directory_of("app"))
        move(ours, node.pod("shop", "web-2", "app").directory_of("app"))
        wait_until(watched(counted, ours))
        theirs.getppid(5)
        ours.getppid(3)
    assert counted.by_pid("getppid") == {ours.pid: 3}


def test_what_follows_pods_is_loaded_while_a_session_watches_some_and_no_longer(
    node: Node,
) -> None:
    node.pod("shop", "web-1", "app")
    before = loaded()
    with watching(node, "namespace:shop"), watching(node, "pod:shop/web-1"):
        states = {state.name: state for state in node.pods.sources(bpf.probe())}
        changes = states["cgroup changes"]
        if not changes.used:  # without BTF or ring buffers
            assert changes.detail.startswith("new cgroups are looked for every 0.5 s: ")
            return
        assert changes.detail.endswith("cgroup_mkdir, loaded now")
        assert states["cri"].detail.startswith("test-runtime 1.2.3 at ")
        assert not states["api"].used
        assert len(loaded()["prog"] - before["prog"]) >= 2
    states = {state.name: state for state in node.pods.sources(bpf.probe())}
    assert states["cgroup changes"].detail.endswith("loaded while a session watches pods")


def test_a_session_has_the_attributes_that_its_pods_share(node: Node) -> None:
    labels = {"app": "web", "pod-template-hash": HASH}
    node.pod("shop", f"web-{HASH}-aaaaa", "app", **labels)
    with watching(node, "workload:shop/deploy/web") as counted:
        alone = dict(counted.collector.attributes)
        assert alone["k8s.pod.name"] == f"web-{HASH}-aaaaa"
        assert counted.collector.label == "web"
        node.pod("shop", f"web-{HASH}-bbbbb", "app", **labels)
        wait_until(lambda: "k8s.pod.name" not in counted.collector.attributes)
        assert counted.collector.attributes == {
            "k8s.namespace.name": "shop",
            "k8s.replicaset.name": f"web-{HASH}",
            "k8s.deployment.name": "web",
            "k8s.workload.kind": "deployment",
            "k8s.workload.name": "web",
            "service.namespace": "shop",
            "service.name": "web",
        }


def test_what_was_watched_keeps_its_attributes_when_it_has_gone(node: Node) -> None:
    pod = node.pod("shop", "web-1", "app")
    with watching(node, "pod:shop/web-1/app") as counted:
        before = dict(counted.collector.attributes)
        assert before["container.id"] == pod.containers["app"]
        pod.directory_of("app").rmdir()
        wait_until(lambda: not counted.collector.watched.cgroups)
        assert counted.collector.attributes == before


def test_a_name_that_does_not_exist_is_refused_with_the_nearest(node: Node) -> None:
    node.pod("shop", "checkout-1", "app")
    for text, near in (
        ("namespace:shpo", "shop"),
        ("pods:shpo?app=web", "shop"),
        ("pod:shop/chekout-1", "shop/checkout-1"),
        ("pod:shop/checkout-1/ap", "shop/checkout-1/app"),
    ):
        kind, _, value = text.partition(":")
        with pytest.raises(NotFoundError) as refused:
            node.pods.target(selectors.parse(kind, value), bpf.probe())
        assert str(refused.value).startswith(f'config["{kind}"]: no ')
        assert f"the nearest names are {near}" in str(refused.value)


def test_a_policy_of_cgroups_covers_pods_by_what_they_resolve_to(node: Node) -> None:
    ours = node.pod("shop", "web-1", "app")
    theirs = node.pod("bank", "web-1", "app")
    both = Policy(cgroups=(str(ours.directory), str(theirs.directory)))
    only_ours = Policy(cgroups=(str(ours.directory),))
    none = Policy(cgroups=(str(ours.directory_of("app")),))
    for namespace in ("shop", "bank"):
        target = node.pods.target(selectors.parse("namespace", namespace), bpf.probe())
        watched = Watched(pods=f"namespace:{namespace}", cgroups=target.now)
        rules.check(watched, None, both)
        rules.check(watched, None, Policy(host_scope=False))
        with pytest.raises(DeniedError, match=rf'config\["namespace"\]: .{namespace}. is not allo'):
            rules.check(watched, None, none)
        if namespace == "shop":
            rules.check(watched, None, only_ours)
        else:
            with pytest.raises(DeniedError, match=r"policy\.cgroups"):
                rules.check(watched, None, only_ours)


def test_pods_that_come_where_the_policy_does_not_reach_are_left_out(node: Node) -> None:
    first = node.pod("shop", "web-1", "app")
    target = node.pods.target(selectors.parse("namespace", "shop"), bpf.probe())
    scope = rules.Scope.of_policy(Policy(cgroups=(str(first.directory),)))
    target.within = rules.within((scope,), None, ())
    told: set[Path] = set()
    audited: list[tuple[list[str], list[str]]] = []
    target.joined = lambda joined, left_out: audited.append((joined, left_out))
    assert target.pods == ("shop/web-1",)  # as of the decision
    known = target.follow(lambda added, _: told.update(added or {Path("/told")}))
    try:
        assert known == {first.directory}
        second = node.pod("shop", "web-2", "app")
        wait_until(lambda: told)
        assert second.directory in target.now
        assert second.directory not in told
        wait_until(lambda: audited)
        assert audited == [([], ["shop/web-2"])]
        assert target.attributes["k8s.pod.name"] == "web-1"
        (first.directory / first.directory_of("app").name).rmdir()
        first.directory.rmdir()
        wait_until(lambda: first.directory not in target.now)
        assert target.attributes["k8s.pod.name"] == "web-1"
    finally:
        target.close()
