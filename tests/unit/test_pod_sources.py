"""The sources of pods' names, over real sockets: a runtime's CRI, the kubelet, the API server."""

from __future__ import annotations

import threading
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from coral import bpf
from coral.agent.config_kubernetes import Kubernetes
from coral.agent.machine.pods.api import Api, ApiWatch, Kubelet, node_name, server_in_cluster
from coral.agent.machine.pods.cgroup_names import uid_key
from coral.agent.machine.pods.cri import Cri
from coral.agent.machine.pods.facts import Facts
from coral.agent.machine.pods.http_json import Server
from coral.agent.machine.pods.node import Pods
from coral.agent.machine.pods.source import SourceError
from tests.kubernetes_api import authority
from tests.pods import HASH, ApiServer, FakePod, as_api, runtime
from tests.support import wait_until

NOWHERE = Path("/nowhere")


def web(number: int = 1) -> FakePod:
    labels = {"app": "web", "pod-template-hash": HASH}
    pod = FakePod(NOWHERE, "shop", f"web-{HASH}-aaaa{number}", labels)
    pod.add("app")
    return pod


@pytest.mark.parametrize("package", ["runtime.v1", "runtime.v1alpha2"])
def test_a_runtime_tells_names_labels_and_containers(tmp_path: Path, package: str) -> None:
    pod = web()
    pod.annotations["resource.opentelemetry.io/service.name"] = "front"
    with runtime(tmp_path, package) as served:
        served.pods.append(pod)
        source = Cri(str(served.socket))
        facts = source.fetch()
        assert source.about == f"test-runtime 1.2.3 at {served.socket}, {package}"
        source.close()
        assert source.fetch() == facts
        source.close()
    (found,) = facts.pods
    assert (found.namespace, found.name, found.labels["app"]) == ("shop", pod.name, "web")
    assert found.uid == uid_key(pod.uid)
    assert found.workload == ("deployment", "web")
    assert found.annotations == pod.annotations
    names = {each.id: each.name for each in facts.containers}
    assert names == {pod.containers["app"]: "app", pod.sandbox: ""}


def test_a_pod_that_was_started_again_is_its_newest_sandbox(tmp_path: Path) -> None:
    old, new = web(), web()
    new.uid, new.labels = old.uid, {"app": "new"}
    with runtime(tmp_path) as served:
        served.pods += [old, new]
        source = Cri(str(served.socket))
        (found,) = source.fetch().pods
        source.close()
    assert found.labels == {"app": "new"}


def test_a_runtime_that_is_not_there_says_how_to_have_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no socket at .*/cri.sock: mount .* kubernetes.cri"):
        Cri(str(tmp_path / "cri.sock")).fetch()
    with runtime(tmp_path, "other.v1") as served:
        source = Cri(str(served.socket))
        with pytest.raises(SourceError, match=r"neither runtime\.v1 nor runtime\.v1alpha2"):
            source.fetch()


def test_a_runtime_that_goes_away_and_comes_back_is_asked_again(tmp_path: Path) -> None:
    source = Cri(str(tmp_path / "cri.sock"))
    for _ in range(2):
        with runtime(tmp_path) as served:
            served.pods.append(web())
            assert len(source.fetch().pods) == 1
        with pytest.raises(SourceError):
            source.fetch()
    source.close()


def test_the_api_is_asked_for_the_pods_of_this_node_alone(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    certificate, key = authority(tmp_path)
    with ApiServer((certificate, key)) as server:
        server.items = [as_api(web(), ("ReplicaSet", f"web-{HASH}"))]
        source = Api(Server(server.url, str(token), str(certificate)), "node-1")
        facts = source.fetch()
    (request,) = server.requests
    assert parse_qs(urlsplit(request).query) == {
        "fieldSelector": ["spec.nodeName=node-1"], "limit": ["500"],
    }  # fmt: skip
    assert server.tokens == ["Bearer secret"]
    assert source.version == "7"
    (pod,), (container,) = facts.pods, facts.containers
    assert pod.workloads == (("replicaset", f"web-{HASH}"), ("deployment", "web"))
    assert (container.name, container.pod) == ("app", pod.uid)


def test_no_token_goes_to_whoever_has_taken_a_port_without_tls(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    with ApiServer() as server:
        server.items = [as_api(web())]
        assert len(Kubelet(Server(server.url, str(token))).fetch().pods) == 1
    assert server.tokens == [""]


def test_a_watch_tells_what_changes_and_begins_again_when_it_is_forgotten() -> None:
    first, second = web(1), web(2)
    told: list[tuple[str, str]] = []
    whole: list[Facts] = []
    failed: list[str] = []
    with ApiServer() as server:
        server.items = [as_api(first)]
        watch = ApiWatch(
            Api(Server(server.url), "node-1"),
            whole.append,
            lambda what, pod, _: told.append((what, pod.name)),
            failed.append,
        )
        server.events.append({"type": "ADDED", "object": as_api(second, version=9)})
        server.events.append(
            {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "12"}}}
        )
        server.events.append({"type": "DELETED", "object": as_api(first, version=13)})
        wait_until(lambda: len(told) == 2)
        assert told == [("ADDED", second.name), ("DELETED", first.name)]
        server.items = [as_api(second)]
        gone = {"code": 410, "message": "too old resource version"}
        server.events.append({"type": "ERROR", "object": gone})
        wait_until(lambda: len(whole) == 2)
        assert [pod.name for pod in whole[1].pods] == [second.name]
        watching = [each for each in server.requests if "watch=1" in each]
        assert "resourceVersion=7" in watching[0]
        assert all("fieldSelector=spec.nodeName%3Dnode-1" in each for each in server.requests)
        watch.close()
        wait_until(lambda: "coral-api" not in {each.name for each in threading.enumerate()})
    assert failed == []


def test_the_kubelet_tells_its_pods_with_their_owners() -> None:
    with ApiServer() as server:
        server.items = [as_api(web(), ("ReplicaSet", f"web-{HASH}")), {"metadata": {}}]
        facts = Kubelet(Server(server.url)).fetch()
        assert server.requests == ["/pods"]
    assert facts.pods[0].workload == ("deployment", "web")
    assert facts.pods[1].name == ""


def test_a_server_that_is_not_there_is_an_error_with_its_address() -> None:
    with ApiServer() as server:
        url = server.url
    with pytest.raises(SourceError, match=url):
        Kubelet(Server(url)).fetch()
    with pytest.raises(SourceError, match="the node's name is not known"):
        node_name("", {})
    with pytest.raises(SourceError, match="does not run in a pod"):
        server_in_cluster({})


def test_every_source_says_whether_it_is_used_and_what_would_help(tmp_path: Path) -> None:
    with ApiServer() as server:
        config = Kubernetes(
            cri=str(tmp_path / "none.sock"), kubelet=server.url, api=server.url, node="node-1"
        )
        server.items = [as_api(web())]
        pods = Pods(config)
        states = {state.name: state for state in pods.sources(bpf.probe())}
        assert [known.pod.name for known in pods.listing()] == [web().name]
    assert set(states) == {"cgroup paths", "cgroup changes", "api", "kubelet", "cri"}
    assert states["kubelet"].used
    assert states["api"].detail == f"at {server.url}, pods of node node-1"
    assert "mount the runtime's socket" in states["cri"].detail
    off = {
        state.name: state for state in Pods(Kubernetes(cri="off", api="off")).sources(bpf.probe())
    }
    assert off["cri"].detail == "kubernetes.cri is off"
    assert "kubernetes.kubelet is not set" in off["kubelet"].detail
