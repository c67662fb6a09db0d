"""Whose a cgroup is, by its path, in every form that runtimes and kubelets give it; and whose a pod
is, by its names and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.agent.machine.pods.api import pod_of
from coral.agent.machine.pods.cgroup_names import Place, place_of
from coral.agent.machine.pods.facts import Container, Pod, attributes_of, common
from coral.agent.machine.pods.workloads import by_labels, by_owner

UID = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
UNDER = UID.replace("-", "_")
KEY = UID.replace("-", "")
STATIC = "d41d8cd98f00b204e9800998ecf8427e"
A, B = "a" * 63 + "1", "b" * 63 + "2"

POD, IN_POD = Place("pod", KEY), Place("container", KEY, A)
ALONE = Place("container", "", A)

SHAPES: dict[str, tuple[str, Place | None]] = {
    "cgroupfs, guaranteed": (f"/kubepods/pod{UID}/{A}", IN_POD),
    "cgroupfs, burstable": (f"/kubepods/burstable/pod{UID}/{A}", IN_POD),
    "cgroupfs, the pod": (f"/kubepods/besteffort/pod{UID}", POD),
    "systemd, containerd": (
        ("/kubepods.slice/kubepods-burstable.slice/"
        f"kubepods-burstable-pod{UNDER}.slice/cri-containerd-{A}.scope"),
        IN_POD,
    ),
    "systemd, guaranteed": (
        f"/kubepods.slice/kubepods-pod{UNDER}.slice/cri-containerd-{A}.scope",
        IN_POD,
    ),
    "systemd, the pod": (
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDER}.slice",
        POD,
    ),
    "systemd, CRI-O": (
        f"/kubepods.slice/kubepods-pod{UNDER}.slice/crio-{A}.scope",
        IN_POD,
    ),
    "CRI-O with crun's own cgroup inside": (
        f"/kubepods.slice/kubepods-pod{UNDER}.slice/crio-{A}.scope/container",
        Place("inside", KEY, A),
    ),
    "CRI-O's monitor": (
        f"/kubepods.slice/kubepods-pod{UNDER}.slice/crio-conmon-{A}.scope",
        Place("inside", KEY),
    ),
    "cgroupfs, CRI-O": (f"/kubepods/burstable/pod{UID}/crio-{A}", IN_POD),
    "systemd, dockershim": (
        f"/kubepods.slice/kubepods-pod{UNDER}.slice/docker-{A}.scope",
        IN_POD,
    ),
    "systemd's notation, taken literally": (
        f"/system.slice/containerd.service/kubepods-burstable-pod{UNDER}.slice:cri-containerd:{A}",
        IN_POD,
    ),
    "static pod": (
        f"/kubepods/burstable/pod{STATIC}/{A}",
        Place("container", STATIC, A),
    ),
    "static pod, systemd": (
        (f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{STATIC}.slice/"
        f"cri-containerd-{A}.scope"),
        Place("container", STATIC, A),
    ),
    "kind, v2": (
        (f"/docker/{B}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDER}.slice/"
        f"cri-containerd-{A}.scope"),
        IN_POD,
    ),
    "kind, v1": (f"/docker/{B}/kubelet/kubepods/burstable/pod{UID}/{A}", IN_POD),
    "the kubelet of kind": (f"/docker/{B}/kubelet", Place("inside", "", B)),
    "docker in a pod": (
        f"/kubepods/burstable/pod{UID}/{A}/docker/{B}",
        Place("container", KEY, A, B),
    ),
    "another pod's name in a pod": (
        f"/kubepods/pod{UID}/{A}/kubepods/pod{STATIC}/{B}",
        Place("container", KEY, A, B),
    ),
    "docker, cgroupfs": (f"/docker/{A}", ALONE),
    "docker, systemd": (f"/system.slice/docker-{A}.scope", ALONE),
    "containerd alone, in a namespace": (f"/default/{A}", ALONE),
    "podman, root": (f"/machine.slice/libpod-{A}.scope", ALONE),
    "podman, a user's": (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{A}.scope/container",
        Place("inside", "", A),
    ),
    "podman's monitor": (f"/machine.slice/libpod-conmon-{A}.scope", None),
    "podman in a pod of its own": (f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope",
                                   ALONE),
    "a service": ("/system.slice/nginx.service", None),
    "all pods": ("/kubepods.slice/kubepods-burstable.slice", None),
    "the root": ("/", None),
    "an id that is too short": (f"/docker/{A[:63]}", None),
    "an id in capitals": (f"/docker/{A.upper()}", None),
    "a UID with something behind": (f"/kubepods/pod{UID}x", None),
    "a name with a line feed": (f"/kubepods/pod{UID}\n", None),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_a_path_tells_pod_and_container(shape: str) -> None:
    path, place = SHAPES[shape]
    assert place_of(path) == place


@given(st.text(alphabet="abcdef0123456789-_.:/pod\x00\n é", max_size=200))
def test_no_path_is_too_odd(path: str) -> None:
    place = place_of(path)
    assert place is None or place.pod or place.container


HASHED = {"pod-template-hash": "5d9c7b6f9c"}


@pytest.mark.parametrize(
    ("name", "labels", "found"),
    [
        ("web-5d9c7b6f9c-x2x4p", HASHED,
         (("replicaset", "web-5d9c7b6f9c"), ("deployment", "web"))),
        ("my-web-2-5d9c7b6f9c-x2x4p", HASHED,
         (("replicaset", "my-web-2-5d9c7b6f9c"), ("deployment", "my-web-2"))),
        ("web-other-x2x4p", HASHED, ()),
        ("db-0", {"statefulset.kubernetes.io/pod-name": "db-0",
                  "controller-revision-hash": "db-6c7"}, (("statefulset", "db"),)),
        ("node-exporter-x2x4p", {"controller-revision-hash": "7b9", "pod-template-generation": "1"},
         (("daemonset", "node-exporter"),)),
        ("import-x2x4p", {"job-name": "import"}, (("job", "import"),)),
        ("backup-28912345-x2x4p", {"batch.kubernetes.io/job-name": "backup-28912345"},
         (("job", "backup-28912345"), ("cronjob", "backup"))),
        ("alone", {}, ()),
        ("", {}, ()),
    ],
)  # fmt: skip
def test_labels_and_names_tell_the_workload(
    name: str, labels: dict[str, str], found: tuple[tuple[str, str], ...]
) -> None:
    assert by_labels(name, labels) == found


def test_the_owner_tells_its_own_owner_by_its_name() -> None:
    assert by_owner("ReplicaSet", "web-5d9c7b6f9c", HASHED) == (
        ("replicaset", "web-5d9c7b6f9c"), ("deployment", "web"),
    )  # fmt: skip
    assert by_owner("ReplicaSet", "web", {}) == (("replicaset", "web"),)
    assert by_owner("Job", "backup-28912345", {}) == (
        ("job", "backup-28912345"), ("cronjob", "backup"),
    )  # fmt: skip
    assert by_owner("Node", "node-1", {}) == ()


def _pod(labels: dict[str, str], annotations: dict[str, str]) -> Pod:
    workloads = (("replicaset", "web-1"), ("deployment", "web"))
    return Pod.of(
        UID, "shop", "web-1-x", labels=labels, annotations=annotations, workloads=workloads
    )


def test_a_service_is_named_in_the_order_of_opentelemetry() -> None:
    annotation = {"resource.opentelemetry.io/service.name": "by-annotation"}
    instance = {"app.kubernetes.io/instance": "by-instance"}
    named = {"app.kubernetes.io/name": "by-name"}

    def name(labels: dict[str, str], annotations: dict[str, str]) -> str:
        return attributes_of(_pod(labels, annotations))["service.name"]

    assert name({**instance, **named}, annotation) == "by-annotation"
    assert name({**instance, **named}, {}) == "by-instance"
    assert name(named, {}) == "by-name"
    assert name({}, {}) == "web"
    alone = Pod.of(UID, "shop", "alone", labels={}, annotations={}, workloads=())
    assert attributes_of(alone)["service.name"] == "alone"


def test_the_attributes_of_a_container() -> None:
    pod = _pod({"app.kubernetes.io/version": "1.2"}, {"resource.opentelemetry.io/team": "red"})
    assert attributes_of(pod, Container(A, KEY, "app")) == {
        "k8s.namespace.name": "shop",
        "k8s.pod.name": "web-1-x",
        "k8s.replicaset.name": "web-1",
        "k8s.deployment.name": "web",
        "k8s.workload.kind": "deployment",
        "k8s.workload.name": "web",
        "k8s.container.name": "app",
        "container.id": A,
        "service.namespace": "shop",
        "service.name": "web",
        "service.version": "1.2",
        "team": "red",
    }
    assert attributes_of(None, None, A) == {"container.id": A}


def annotated(owner: str, **annotations: str) -> Mapping[str, Any]:
    """A pod in the form of the API."""
    told = {f"kubernetes.io/config.{key}": text for key, text in annotations.items()}
    owners = [{"kind": owner, "name": "it", "controller": True}] if owner else []
    return {"metadata": {"uid": UID, "namespace": "kube-system", "name": "etcd-node",
                         "annotations": told, "ownerReferences": owners}}  # fmt: skip


def test_a_mirror_in_the_api_has_the_uid_that_the_cgroup_of_its_static_pod_has() -> None:
    pod, _ = pod_of(annotated("Node", mirror=STATIC), with_mirrors=True)
    assert (pod.uid, pod.mirrors) == (STATIC, True)


@pytest.mark.parametrize(
    ("item", "with_mirrors"),
    [
        (annotated("Node", mirror=STATIC), False),  # a kubelet has the static pod itself
        (annotated("", mirror=STATIC), True),
        (annotated("ReplicaSet", mirror=STATIC), True),
        (annotated("Node", hash=STATIC), True),
    ],
)
def test_annotations_alone_do_not_make_a_pod_another(
    item: Mapping[str, Any], *, with_mirrors: bool
) -> None:
    pod, _ = pod_of(item, with_mirrors=with_mirrors)
    assert (pod.uid, pod.mirrors) == (UID.replace("-", ""), False)


def test_annotations_are_kept_within_bounds() -> None:
    annotations = {f"resource.opentelemetry.io/k{n}": "x" * 5000 for n in range(1000)}
    annotations["resource.opentelemetry.io/service.name"] = "y" * 5000
    pod = Pod.of(UID, "shop", "web", labels={}, annotations=annotations, workloads=())
    assert len(pod.annotations) == 32
    assert attributes_of(pod)["service.name"] == "y" * 256
    assert set(map(len, pod.annotations.values())) == {256}


def test_annotations_say_nothing_of_where_a_pod_runs() -> None:
    keys = ("k8s.container.name", "k8s.workload.kind", "container.id", "k8s.namespace.name", "team")
    annotations = {f"resource.opentelemetry.io/{key}": "forged" for key in keys}
    pod = Pod.of(UID, "shop", "web", labels={}, annotations=annotations, workloads=())
    forged = {key for key, text in attributes_of(pod).items() if text == "forged"}
    assert forged == {"team"}


def test_what_several_have_in_common() -> None:
    assert common([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1"}]) == {"a": "1"}
    assert common([]) == {}
