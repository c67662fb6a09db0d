"""The inventory of pods, fed step by step: what selectors select, who is told, and which source
counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coral.agent.config_kubernetes import Kubernetes
from coral.agent.machine.pods import inventory as module
from coral.agent.machine.pods.cgroup_names import Place, place_of
from coral.agent.machine.pods.facts import Container, Facts, Pod
from coral.agent.machine.pods.groups import Groups
from coral.agent.machine.pods.inventory import Inventory
from coral.agent.machine.pods.node import Pods
from coral.agent.machine.pods.target import PodTarget
from coral.collectors.hierarchies import Kind
from coral.collectors.selectors import Selector, parse

TOP = Path("/sys/fs/cgroup")


def uid(number: int) -> str:
    return f"{number:032x}"


def container_id(number: int) -> str:
    return f"{number:064x}"


def pod(number: int, namespace: str = "shop", **labels: str) -> Pod:
    workloads = (("deployment", labels["app"]),) if "app" in labels else ()
    return Pod(uid(number), namespace, f"web-{number}", labels, {}, workloads)


def made(inventory: Inventory, path: str, kind: Kind = "v2") -> Path:
    place = place_of(path)
    assert place
    directory = TOP / path.lstrip("/")
    inventory.made(kind, directory, place)
    return directory


def selector(text: str) -> Selector:
    kind, _, value = text.partition(":")
    return parse(kind, value)


def test_a_pod_is_its_own_cgroup_and_a_container_its_own() -> None:
    inventory = Inventory()
    whole = made(inventory, f"/kubepods/pod{uid(1)}")
    app = made(inventory, f"/kubepods/pod{uid(1)}/{container_id(1)}")
    made(inventory, f"/kubepods/pod{uid(1)}/{container_id(2)}")
    inventory.tell("cri", Facts((pod(1),), (Container(container_id(1), uid(1), "app"),)))
    assert inventory.select(selector("pod:shop/web-1"), "v2") == {whole}
    assert inventory.select(selector("pod:shop/web-1/app"), "v2") == {app}
    assert inventory.select(selector("pod:shop/web-1/other"), "v2") == set()
    assert inventory.select(selector(f"container:{container_id(1)}"), "v2") == {app}
    assert inventory.select(selector("pod:shop/web-1"), "memory") == set()
    assert inventory.container_ids("0000") == {container_id(1): "shop", container_id(2): "shop"}


def test_a_container_without_a_cgroup_of_its_pod_stands_for_itself() -> None:
    inventory = Inventory()
    path = f"/system.slice/kubepods-pod{uid(1)}.slice:cri-containerd:{container_id(1)}"
    alone = made(inventory, path)
    inventory.tell("cri", Facts((pod(1),)))
    assert inventory.select(selector("namespace:shop"), "v2") == {alone}


def test_those_who_watch_are_told_of_what_comes_and_goes_once() -> None:
    inventory = Inventory()
    first = made(inventory, f"/kubepods/pod{uid(1)}")
    inventory.tell("cri", Facts((pod(1),)))
    watch = inventory.watch(selector("namespace:shop"), "v2")
    assert watch.told == {first}
    assert inventory.settle() == []
    second = made(inventory, f"/kubepods/pod{uid(2)}")
    assert inventory.settle() == []  # nobody knows its name
    assert inventory.unnamed() == {uid(2)}
    inventory.tell("cri", Facts((pod(1), pod(2), pod(3))))
    (change,) = inventory.settle()
    assert change.added == {second}
    assert not change.removed
    assert inventory.settle() == []
    inventory.removed("v2", first)
    (change,) = inventory.settle()
    assert change.removed == {first}
    assert not change.added
    inventory.unwatch(watch)
    inventory.removed("v2", second)
    assert inventory.settle() == []


def test_a_pod_whose_labels_change_comes_or_goes() -> None:
    inventory = Inventory()
    only = made(inventory, f"/kubepods/pod{uid(1)}")
    inventory.tell("cri", Facts((pod(1, app="web"),)))
    inventory.watch(selector("pods:shop?app=web"), "v2")
    inventory.tell_one("api", pod(1, app="old"), ())
    assert [change.removed for change in inventory.settle()] == [{only}]
    inventory.tell_one("api", pod(1, app="web"), ())
    assert [change.added for change in inventory.settle()] == [{only}]
    inventory.forget_one("api", pod(1))
    assert inventory.settle() == []  # the runtime still knows it, by its old labels


def test_the_source_that_knows_more_counts() -> None:
    inventory = Inventory()
    inventory.tell("cri", Facts((Pod(uid(1), "shop", "web-1", {}, {}, ()),)))
    inventory.tell("api", Facts((pod(1, app="web"),)))
    found = inventory.pod(uid(1))
    assert found
    assert found.workload == ("deployment", "web")


def test_the_hierarchy_is_that_which_has_the_pods() -> None:
    inventory = Inventory()
    inventory.tell("cri", Facts((pod(1), pod(2, "bank"))))
    shop = selector("namespace:shop")
    assert inventory.kind_for(shop, ("v2", "memory")) == "memory"
    assert inventory.kind_for(shop, ("v2",)) == "v2"
    assert inventory.kind_for(shop, ()) is None
    made(inventory, f"/kubepods/pod{uid(2)}")
    assert inventory.kind_for(shop, ("v2", "memory")) == "v2"
    made(inventory, f"/kubepods/pod{uid(2)}", "memory")
    made(inventory, f"/kubepods/pod{uid(1)}")
    assert inventory.kind_for(shop, ("v2", "memory")) == "v2"
    made(inventory, f"/kubepods/pod{uid(1)}", "memory")
    assert inventory.kind_for(shop, ("v2", "memory")) == "memory"


def test_the_nearest_names_are_those_of_the_same_sort() -> None:
    inventory = Inventory()
    inventory.tell("cri", Facts((pod(1, app="checkout"), pod(2, "bank")),
                                (Container(container_id(1), uid(1), "app"),)))  # fmt: skip

    def near(text: str, *namespaces: str) -> list[str]:
        return inventory.near(selector(text), set(namespaces or ("shop", "bank")))

    assert near("namespace:shpo") == ["shop"]
    assert near("pod:shop/web-3")[0] == "shop/web-1"
    assert near("pod:shop/web-1/ap")[0] == "shop/web-1/app"
    assert near("workload:shop/deploy/chekout") == ["shop/deployment/checkout"]
    assert near("namespace:zzzzzzzzzzzz") == []
    for text in ("namespace:shpo", "pod:shop/web-1/ap", "workload:shop/deploy/chekout"):
        assert not any("shop" in each for each in near(text, "bank"))


STATIC = "abcdef0123456789" * 2


def mirror(of: str, namespace: str, name: str) -> Pod:
    return Pod(of, namespace, name, {}, {}, (), mirrors=True)


def test_a_mirror_gives_its_name_to_a_static_pod_and_to_no_other() -> None:
    inventory = Inventory()
    static = made(inventory, f"/kubepods/pod{STATIC}")
    bank = made(inventory, f"/kubepods/pod{uid(1)}")
    own = pod(1, "bank")
    claim = mirror(uid(1), "shop", "mine")
    inventory.tell("api", Facts((mirror(STATIC, "kube-system", "etcd"), own, claim)))
    assert inventory.select(selector("namespace:kube-system"), "v2") == {static}
    assert inventory.select(selector("namespace:bank"), "v2") == {bank}
    assert inventory.select(selector("namespace:shop"), "v2") == set()
    inventory.tell_one("api", claim, ())
    inventory.forget_one("api", claim)
    assert inventory.select(selector("namespace:bank"), "v2") == {bank}
    # Nor where only another source knows whose it is.
    inventory.tell("api", Facts((claim,)))
    inventory.tell("cri", Facts((own,)))
    assert inventory.select(selector("namespace:bank"), "v2") == {bank}
    assert inventory.select(selector("namespace:shop"), "v2") == set()


def test_mirrors_that_do_not_agree_name_nothing() -> None:
    inventory = Inventory()
    made(inventory, f"/kubepods/pod{STATIC}")
    etcd, claim = mirror(STATIC, "kube-system", "etcd"), mirror(STATIC, "shop", "mine")
    inventory.tell("api", Facts((claim, etcd)))
    assert inventory.pod(STATIC) is None
    inventory.tell("api", Facts((etcd,)))
    inventory.tell_one("api", claim, ())
    assert inventory.pod(STATIC) == etcd
    inventory.forget_one("api", claim)
    assert inventory.pod(STATIC) == etcd


def test_what_has_no_room_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PODS", 3)
    monkeypatch.setattr(module, "MOST_CGROUPS", 2)
    inventory = Inventory()
    inventory.tell("cri", Facts(tuple(map(pod, range(5)))))
    assert (len(inventory.pods), inventory.refused) == (3, 2)
    inventory.tell_one("cri", pod(9), ())
    assert (len(inventory.pods), inventory.refused) == (3, 3)
    for number in range(3):
        made(inventory, f"/kubepods/pod{uid(number)}")
    assert inventory.refused == 4


def test_cgroups_inside_of_containers_are_not_kept() -> None:
    inventory = Inventory()
    made(inventory, f"/kubepods/pod{uid(1)}/{container_id(1)}/init.scope")
    assert inventory.unnamed() == set()


def test_a_cgroup_that_is_there_again_is_known_however_many_go_after_it() -> None:
    def place(number: int) -> Place:
        found = place_of(f"/kubepods/pod{uid(number)}")
        assert found
        return found

    groups, back = Groups(10), TOP / "back"
    for _ in range(2):
        groups.made(back, place(1), 1)
        groups.removed(back)
    groups.made(back, place(1), 1)
    for number in range(2, 5000):
        groups.made(TOP / "other", place(number), number)
        groups.removed(TOP / "other")
    assert groups.places[1] == place(1)
    assert len(groups.places) == 1 + 4096


def test_what_is_kept_of_pods_that_have_gone_is_bounded_in_bytes() -> None:
    """Each has as many annotations as are kept of one, of as many characters."""
    features: Any = None
    target = PodTarget(selector("namespace:shop"), "v2", (), Pods(Kubernetes()), features)
    long = {f"annotation.{n}": "x" * 256 for n in range(32)}
    most = 0
    for first in range(1, 4001, 100):
        target.note(dict.fromkeys(range(first, first + 100), long))
        most = max(most, target.noted_bytes)
    assert 15 << 20 < most <= 16 << 20
    assert target.attributes_of(4000) == long
    assert target.attributes_of(1) == {}
    target.note({group: {"k8s.pod.name": "web"} for group in range(10_000, 30_000)})
    assert target.attributes_of(30_000 - 16_384) == {"k8s.pod.name": "web"}
    assert target.attributes_of(30_000 - 16_385) == {}
    assert target.noted_bytes == 16_384 * (512 + 100 + len("k8s.pod.nameweb"))
