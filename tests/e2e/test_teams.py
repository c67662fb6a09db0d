"""Two teams on one node, each with its own namespace, by the roles of tokens or by Kubernetes'
reviews: what each may watch, see and learn of the pods of both, through a real agent."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.callers import OK, Who
from tests.e2e.test_access import token_file
from tests.e2e.test_refusals import start_request
from tests.kubernetes_api import AUDIENCE, running_cluster
from tests.pods import HASH, FakePod, Runtime, kubepods, new_id, runtime
from tests.support import Puppet, coral, running_agent, wait_until

DENIED: Final = grpc.StatusCode.PERMISSION_DENIED
NAMESPACES: Final = ("shop", "bank")
# Of each team by its token, and by its service account.
TEAMS: Final = [(how, namespace) for how in ("token", "kubernetes") for namespace in NAMESPACES]
teams = pytest.mark.parametrize(("how", "namespace"), TEAMS)
FORGED: Final = {"resource.opentelemetry.io/service.name": "shop-web"}


PLACE: Final = "place.slice"


def account(namespace: str) -> str:
    return f"system:serviceaccount:{namespace}:tracer"


@dataclass
class Node:
    """A node with a pod of each team, and an agent that knows both."""

    address: str
    runtime: Runtime
    top: Path
    audit: Path
    pods: Mapping[str, FakePod] = field(default_factory=dict)

    def who(self, how: str, name: str) -> Who:
        token = f"the-token-of-{name}" if how == "token" else f"kube-{name}"
        return Who(self.address, token)

    @contextmanager
    def pod(
        self, namespace: str, name: str, *, below: str = "", **annotations: str
    ) -> Iterator[FakePod]:
        """One more pod, for the duration of the block, with the container `app`, in a cgroup BELOW
        that of all; nothing of it is made."""
        labels = {"app": "web", "pod-template-hash": HASH}
        pod = FakePod(self.top / below, namespace, name, labels, annotations)
        pod.add("app")
        self.runtime.pods.append(pod)
        try:
            yield pod
        finally:
            self.runtime.pods.remove(pod)


def other(namespace: str) -> str:
    return "bank" if namespace == "shop" else "shop"


def selectors(pod: FakePod) -> dict[str, str]:
    """One of each kind that means POD."""
    return {
        "pod": f"{pod.namespace}/{pod.name}",
        "pods": f"{pod.namespace}?app=web",
        "namespace": pod.namespace,
        "workload": f"{pod.namespace}/deploy/web",
        "container": pod.containers["app"],
    }


KINDS: Final = ("pod", "pods", "namespace", "workload", "container")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("teams")
    with ExitStack() as stack:
        top = stack.enter_context(kubepods())
        served = stack.enter_context(runtime(directory))
        cluster = stack.enter_context(running_cluster(directory / "cluster"))
        for namespace in NAMESPACES:
            user = account(namespace)
            cluster.users[f"kube-{namespace}"] = (user, ("system:authenticated",), AUDIENCE)
            verbs = ("create", "get", "list", "delete")
            cluster.rights |= {(user, verb, namespace) for verb in verbs}
        cluster.users["kube-starter"] = (account("starter"), (), AUDIENCE)
        cluster.rights |= {(account("starter"), verb, "shop") for verb in ("create", "delete")}
        audit, place = directory / "audit", top / PLACE
        place.mkdir()
        config = {
            "listen": ["127.0.0.1:0"],
            "kubernetes": {"cri": str(served.socket), "api": "off"},
            "limits": {
                "cpu_percent": 1000,
                "continuous_cpu_percent": 1000,
                "concurrent_collectors": 20,
            },
            "services": {
                f"{namespace}-front": {"workload": f"{namespace}/deploy/web"}
                for namespace in NAMESPACES
            },
            "auth": {
                "tokens": [
                    {"name": name, "file": token_file(directory, name)}
                    for name in (*NAMESPACES, "services", "place", "boss")
                ],
                "kubernetes": cluster.config(),
            },
            "roles": [
                *({"role": "operate", "to": [f"token:{each}"], "namespaces": [each]}
                  for each in NAMESPACES),
                {"role": "operate", "to": ["token:services"], "services": ["shop-*"]},
                {"role": "operate", "to": ["token:place"], "cgroups": [str(place)]},
                {"role": "admin", "to": ["token:boss"]},
            ],
            "audit": {"file": str(audit)},
            "continuous": [
                {"kind": "syscall_stats", "service": f"all-of-{each}",
                 "config": {"namespace": each}}
                for each in NAMESPACES
            ],
        }  # fmt: skip
        found = Node("", served, top, audit)
        found.pods = {
            each: stack.enter_context(found.pod(each, f"web-{HASH}-aaaaa")) for each in NAMESPACES
        }
        for pod in found.pods.values():
            pod.make("app")
        agent = stack.enter_context(running_agent(directory / "agent", config))
        found.address = agent.address
        wait_until(lambda: len(listed(found.who("token", "boss"))) == len(NAMESPACES))
        yield found


def listed(who: Who) -> list[pb.CollectorInfo]:
    request = pb.ListCollectorsRequest(include_ended=True)
    return list(who.call("ListCollectors", request).collectors)


@contextmanager
def started(who: Who, config: Mapping[str, object], service: str = "") -> Iterator[str]:
    """A session, for the duration of the block."""
    request = start_request({"interval": "100ms", **config}, service_name=service, duration_s=300)
    session = str(who.call("StartCollector", request).collector_id)
    try:
        yield session
    finally:
        who.call("StopCollector", pb.StopEbpfCollectorRequest(collector_id=session))


def enter(puppet: Puppet, pod: FakePod) -> None:
    (pod.directory_of("app") / "cgroup.procs").write_text(str(puppet.pid))


def seen_with(puppet: Puppet, who: Who, session: str) -> set[int]:
    """The processes that a session has rows of, from its beginning until it has those of PUPPET,
    which goes on to make calls, of two intervals."""
    seen = list[int]()
    request = pb.EbpfEventStreamRequest(collector_id=session, after_seq=0)
    with who.streaming("StreamEvents", request) as events:
        puppet.getppid(1)
        for event in events:
            if event.HasField("syscall_stats") and event.syscall_stats.syscall_name == "getppid":
                seen.append(event.syscall_stats.pid)
            if seen.count(puppet.pid) > 1:
                return set(seen)
            puppet.getppid(1)
    raise AssertionError("the session ended before")


@teams
@pytest.mark.parametrize("kind", KINDS)
def test_a_team_watches_its_own_pods_and_no_others(
    node: Node, how: str, namespace: str, kind: str
) -> None:
    who, pod = node.who(how, namespace), node.pods[namespace]
    with Puppet() as own, Puppet() as theirs:
        enter(own, pod)
        enter(theirs, node.pods[other(namespace)])
        with started(who, {kind: selectors(pod)[kind]}) as session:
            theirs.getppid(5)
            assert seen_with(own, who, session) == {own.pid}


MISSING: Final = {
    "pod": "{}/web-x",
    "pods": "{}?app=none",
    "namespace": "{}x",
    "workload": "{}/deploy/none",
    "container": "f" * 64,
}


@teams
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [{}, {"interval": "never"}, {"pid": "1"}, {"mode": "events"}])
def test_what_is_anothers_is_refused_as_what_does_not_exist(
    node: Node, how: str, namespace: str, kind: str, more: Mapping[str, str]
) -> None:
    who, theirs = node.who(how, namespace), other(namespace)
    there = selectors(node.pods[theirs])[kind]
    missing = MISSING[kind].format(theirs)
    code, text = who.outcome("StartCollector", start_request({kind: there, **more}))
    assert code is DENIED
    again, nothing = who.outcome("StartCollector", start_request({kind: missing, **more}))
    assert again is DENIED
    if kind == "namespace":
        missing, there, text = (
            f"'{missing}'",
            f"'{there}'",
            text.replace(f"namespace {theirs},", f"namespace {theirs}x,"),
        )
    assert text.replace(there, missing) == nothing
    assert "web-" not in text.replace(there, "")


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_to_create_is_enough_to_start_and_tells_nothing(node: Node, kind: str) -> None:
    who = node.who("kubernetes", "starter")
    with started(who, {kind: selectors(node.pods["shop"])[kind]}):
        pass
    assert who.outcome("ListPods", pb.ListPodsRequest())[0] is DENIED
    there, missing = selectors(node.pods["bank"])[kind], MISSING[kind].format("shop")
    code, text = who.outcome("StartCollector", start_request({kind: there}))
    assert code is DENIED
    where = "every namespace" if kind == "container" else "the namespace bank"
    assert f"needs the right to create collectors.coral.io in {where}" in text
    if kind not in ("container", "pods", "namespace"):
        code, text = who.outcome("StartCollector", start_request({kind: missing}))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "nearest" not in text


@teams
def test_a_misspelt_name_is_told_those_of_the_teams_own_namespace(
    node: Node, how: str, namespace: str
) -> None:
    who = node.who(how, namespace)
    code, text = who.outcome("StartCollector", start_request({"pod": f"{namespace}/web"}))
    assert code is grpc.StatusCode.NOT_FOUND
    assert f"the nearest names are {namespace}/{node.pods[namespace].name}" in text
    assert other(namespace) not in text


@teams
def test_a_service_of_pods_is_for_those_whose_namespace_it_is_in(
    node: Node, how: str, namespace: str
) -> None:
    who = node.who(how, namespace)
    with started(who, {}, service=f"{namespace}-front") as session:
        (info,) = (each for each in listed(who) if each.collector_id == session)
        assert info.attributes["k8s.namespace.name"] == namespace
    code, text = who.outcome(
        "StartCollector", start_request({}, service_name=f"{other(namespace)}-front")
    )
    assert code is DENIED
    assert "web-" not in text


@teams
def test_services_that_a_team_may_not_watch_are_neither_found_nor_hinted_at(
    node: Node, how: str, namespace: str
) -> None:
    who = node.who(how, namespace)
    answers = {
        who.outcome("StartCollector", start_request(more, service_name=name))
        for name in (node.pods[other(namespace)].containers["app"][:12], "no-such-service")
        for more in ({}, {"interval": "never"})
    }
    assert {code for code, _ in answers} == {DENIED}
    assert not any("nearest" in text for _, text in answers)
    code, text = node.who("token", "services").outcome(
        "StartCollector", start_request({}, service_name="shop-frond")
    )
    assert code is grpc.StatusCode.NOT_FOUND
    assert "nearest" not in text


def test_a_name_that_a_pod_gives_itself_is_no_service_of_the_rules(node: Node) -> None:
    named = node.who("token", "services")
    with started(named, {}, service="shop-front"):
        pass
    with node.pod("bank", "ledger", **FORGED) as pod:
        pod.make("app")
        for config in ({"pod": "bank/ledger"}, {"container": pod.containers["app"]}):
            for service in ("", "shop-web", "shop-front"):
                code, text = named.outcome(
                    "StartCollector", start_request(config, service_name=service)
                )
                assert code is DENIED, text
        boss = node.who("token", "boss")
        with started(boss, {"pod": "bank/ledger"}) as session:
            (info,) = (each for each in listed(boss) if each.collector_id == session)
            assert info.service_name == "shop-web"


@pytest.mark.parametrize("key", ["mirror", "hash"])
def test_a_pod_takes_no_others_place_by_an_annotation(node: Node, key: str) -> None:
    bank = node.pods["bank"]
    forged = {f"kubernetes.io/config.{key}": bank.uid}
    with node.pod("shop", "mine", **forged) as pod, Puppet() as own, Puppet() as theirs:
        pod.make("app")
        enter(own, pod)
        enter(theirs, bank)
        who = node.who("token", "shop")
        with started(who, {"pod": "shop/mine"}) as session:
            theirs.getppid(5)
            assert seen_with(own, who, session) == {own.pid}
        listing = node.who("token", "bank").call("ListPods", pb.ListPodsRequest()).pods
        assert [each.name for each in listing] == [bank.name]


@teams
def test_pods_that_come_later_are_watched_in_the_teams_namespace_and_nowhere_else(
    node: Node, how: str, namespace: str
) -> None:
    who, admin = node.who(how, namespace), node.who("token", "boss")
    theirs = other(namespace)
    with (
        started(who, {"namespace": namespace}) as session,
        started(admin, {"namespace": theirs}) as control,
        node.pod(namespace, "later") as own_pod,
        node.pod(theirs, "later") as their_pod,
        Puppet() as own,
        Puppet() as foreign,
    ):
        their_pod.make("app")
        own_pod.make("app")
        enter(foreign, their_pod)
        enter(own, own_pod)
        # The agent knows both pods once each has a session that sees it.
        assert foreign.pid in seen_with(foreign, admin, control)
        seen = seen_with(own, who, session)
        assert foreign.pid not in seen


def test_pods_that_come_later_are_watched_only_below_the_cgroups_of_the_role(node: Node) -> None:
    who, admin = node.who("token", "place"), node.who("token", "boss")
    with (
        node.pod("yard", "first", below=PLACE) as first,
        node.pod("yard", "inside", below=PLACE) as inside,
        node.pod("yard", "outside") as outside,
        Puppet() as own,
        Puppet() as foreign,
    ):
        first.make("app")
        config = {"namespace": "yard"}
        with started(who, config) as session, started(admin, config) as control:
            for pod, puppet in ((outside, foreign), (inside, own)):
                pod.make("app")
                enter(puppet, pod)
            assert foreign.pid in seen_with(foreign, admin, control)
            assert foreign.pid not in seen_with(own, who, session)
        code, text = who.outcome("StartCollector", start_request(config))
        assert code is DENIED  # one of them is elsewhere now
        assert "roles[3].cgroups" in text
        for missing in ({"pod": "yard/none"}, {"namespace": "none"}):
            code, text = who.outcome("StartCollector", start_request(missing))
            assert code is grpc.StatusCode.NOT_FOUND
            assert "nearest" not in text
    assert not who.call("ListPods", pb.ListPodsRequest()).pods


def test_a_container_that_begins_like_the_one_that_is_watched_is_another(node: Node) -> None:
    who, admin, own_id = node.who("token", "shop"), node.who("token", "boss"), new_id()
    with (
        node.pod("shop", "mine") as mine,
        node.pod("bank", "later") as later,
        Puppet() as own,
        Puppet() as foreign,
    ):
        mine.containers["app"], later.containers["app"] = own_id, own_id[:8] + new_id()[8:]
        mine.make("app")
        enter(own, mine)
        with (
            started(who, {"container": own_id[:8]}) as session,
            started(admin, {"namespace": "bank"}) as control,
        ):
            later.make("app")
            enter(foreign, later)
            assert foreign.pid in seen_with(foreign, admin, control)
            assert foreign.pid not in seen_with(own, who, session)
        # Both begin like that now: the team means its own, and is not told of the other.
        with started(who, {"container": own_id[:8]}) as session:
            foreign.getppid(3)
            assert foreign.pid not in seen_with(own, who, session)
        code, text = admin.outcome("StartCollector", start_request({"container": own_id[:8]}))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "2 containers begin like that" in text


# What each sees


@teams
def test_a_team_is_listed_its_own_pods_and_collectors(node: Node, how: str, namespace: str) -> None:
    who = node.who(how, namespace)
    pods = who.call("ListPods", pb.ListPodsRequest()).pods
    assert {(each.namespace, each.name) for each in pods} == {
        (namespace, node.pods[namespace].name)
    }
    theirs = pb.ListPodsRequest(namespace=other(namespace))
    assert not who.call("ListPods", theirs).pods
    with (
        started(node.who("token", "boss"), {"namespace": namespace}) as admins,
        started(node.who(how, other(namespace)), {"namespace": other(namespace)}) as foreign,
        started(who, {"namespace": namespace}) as own,
    ):
        found = {each.collector_id: each for each in listed(who) if not each.HasField("end")}
        assert own in found
        assert not {admins, foreign} & found.keys()
        assert {each.service_name for each in found.values() if each.continuous} == {
            f"all-of-{namespace}"
        }
        assert other(namespace) not in str(list(found.values()))
        watched = set()
        with who.streaming("WatchCollectors", pb.WatchCollectorsRequest()) as changes:
            for change in changes:
                if change.what == pb.CollectorChange.WHAT_SYNCED:
                    break
                watched.add(change.collector.collector_id)
        assert watched == found.keys()
        hidden = [each.collector_id for each in listed(node.who("token", "boss"))]
        for session in {*hidden} - {each.collector_id for each in listed(who)}:
            for rpc in ("StreamEvents", "StreamEventBatches"):
                request = pb.EbpfEventStreamRequest(collector_id=session)
                code, text = who.outcome(rpc, request)
                assert code is grpc.StatusCode.NOT_FOUND
                assert text == f"collector_id: this agent knows no collector {session!r}"


@teams
def test_the_command_line_shows_a_team_its_own(node: Node, how: str, namespace: str) -> None:
    who = node.who(how, namespace)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            coral(*arguments, "--agent", node.address), capture_output=True, text=True, check=True,
            env={**os.environ, "CORAL_TOKEN": who.token}, timeout=60,
        )  # fmt: skip
        return done.stdout

    pods, collectors = run("pods"), run("collectors")
    assert node.pods[namespace].name in pods
    assert f"all-of-{namespace}" in collectors
    for text in (pods, collectors):
        assert other(namespace) not in text


def test_the_audit_has_pods_as_asked_and_as_resolved(node: Node) -> None:
    shop, bank = node.pods["shop"], node.pods["bank"]
    who = node.who("token", "shop")
    with started(who, {"workload": "shop/deploy/web"}) as session:
        pass
    asked = {"pod": f"bank/{bank.name}"}
    assert who.outcome("StartCollector", start_request(asked))[0] is DENIED

    def of(verdict: str) -> list[dict[str, Any]]:
        whole = node.audit.read_text().rpartition("\n")[0].splitlines()
        lines = [it for line in whole if (it := json.loads(line)).get("rpc") == "StartCollector"]
        own = [it for it in lines if (it["who"], it["verdict"]) == ("token:shop", verdict)]
        return [
            it for it in own if session == it.get("session") or it["asked"].get("config") == asked
        ]

    (allowed,) = wait_until(lambda: of("allowed"))
    assert allowed["asked"]["config"]["workload"] == "shop/deploy/web"
    assert allowed["resolved"] == {
        "selector": "workload:shop/deploy/web", "pods": [f"shop/{shop.name}"], "cgroups": 1,
        "namespaces": ["shop"],
    }  # fmt: skip
    refused = wait_until(lambda: of("refused"))[-1]
    assert refused["resolved"]["selector"] == f"pod:bank/{bank.name}"
    assert refused["resolved"]["namespaces"] == ["bank"]
    assert "roles[0].namespaces (shop)" in refused["reason"]


def test_who_may_not_start_anything_learns_nothing(node: Node) -> None:
    nobody = Who(node.address)
    assert nobody.outcome("ListPods", pb.ListPodsRequest())[0] is grpc.StatusCode.UNAUTHENTICATED
    assert node.who("token", "boss").outcome("ListPods", pb.ListPodsRequest())[0] is OK
