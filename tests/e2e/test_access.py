"""Roles, through a real agent over real gRPC: what each kind of caller of each role may call, see
and stop; what the audit says of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.message import Message

from coral.agent.access.rpcs import RPCS
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.callers import OK, Who, as_user, directory_for_all
from tests.certificates import Authority, distinguished
from tests.e2e.test_refusals import NO_ONE, has_tried_the_kernel, start_request
from tests.kubernetes_api import AUDIENCE, Cluster, running_cluster
from tests.support import RunningAgent, running_agent, samples, scrape, wait_until

VIEWER_UID, OPERATOR_UID, OTHER_UID = 40_001, 40_002, 40_003
DENIED: Final = grpc.StatusCode.PERMISSION_DENIED
UNKNOWN: Final = grpc.StatusCode.NOT_FOUND
STRANGER: Final = grpc.StatusCode.UNAUTHENTICATED
NO_LEASE: Final = grpc.StatusCode.FAILED_PRECONDITION
ENDPOINTS: Final = pb.EbpfEventStreamRequest


@dataclass
class House:
    """One agent that knows callers of every kind, and these callers by name."""

    agent: RunningAgent
    cluster: Cluster
    audit: Path
    callers: dict[str, Who] = field(default_factory=dict)
    continuous: str = ""
    others: str = ""
    """A session of a caller that is none of these."""

    def lines(self) -> list[dict[str, Any]]:
        """The audit so far."""
        whole, _, _ = self.audit.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


def token_file(directory: Path, name: str) -> str:
    path = directory / f"{name}.token"
    path.write_text(f"the-token-of-{name}")
    path.chmod(0o600)
    return str(path)


def users(cluster: Cluster) -> None:
    for name in ("jane", "ops", "root", "sa-all", "sa-view", "sa-none"):
        user = f"system:serviceaccount:shop:{name}" if name.startswith("sa-") else name
        cluster.users[f"kube-{name}"] = (user, ("system:authenticated",), AUDIENCE)
    full, view = "system:serviceaccount:shop:sa-all", "system:serviceaccount:shop:sa-view"
    cluster.rights |= {(full, verb, "") for verb in ("create", "get", "list", "delete")}
    cluster.rights |= {(view, verb, "") for verb in ("get", "list")}


SPIFFE: Final = "spiffe://example.org/ns/sre/sa/"
ROLES: Final = [
    {"role": "view", "to": ["socket:admin", "token:viewer", "kubernetes:jane", f"{SPIFFE}v*"]},
    {"role": "operate", "to": [f"uid:{OPERATOR_UID}", "token:operator", "kubernetes:ops",
                               f"{SPIFFE}operator"],
     "host_scope": True},
    {"role": "admin", "to": ["uid:0", "token:boss", "kubernetes:root", "subject:CN=boss"]},
    {"role": "operate", "to": ["token:other"]},
]  # fmt: skip

# Of every caller, the role that it has.
CALLERS: Final = {
    "unix root": "admin",
    "unix viewer": "view",
    "unix operator": "operate",
    "unix viewer with the operator's token": "operate",
    "view socket root": "view",
    "view socket viewer": "view",
    "view socket boss's token": "view",
    "view socket Kubernetes' all rights": "view",
    "certificate boss": "admin",
    "certificate view": "view",
    "certificate operator": "operate",
    "certificate stranger": "none",
    "certificate stranger with the operator's token": "operate",
    "token boss": "admin",
    "token viewer": "view",
    "token operator": "operate",
    "kubernetes root": "admin",
    "kubernetes jane": "view",
    "kubernetes ops": "operate",
    "kubernetes all rights": "operate",
    "kubernetes rights to read": "view",
    "kubernetes no rights": "none",
    "a wrong token": "nobody",
    "no token": "nobody",
}


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    with ExitStack() as stack:
        directory = stack.enter_context(directory_for_all())
        cluster = stack.enter_context(running_cluster(directory / "cluster"))
        users(cluster)
        address, audit = f"unix:{directory}/agent.sock", directory / "audit"
        names = ("viewer", "operator", "boss", "other")
        view = f"unix:{directory}/view.sock"
        authority = Authority("the agent and its callers")
        certificate, key = authority.sign("127.0.0.1").write(directory, "server")
        config = {
            "listen": [address, f"{view}?mode=0666", "127.0.0.1:0"],
            "tls": {
                "certificate": str(certificate),
                "key": str(key),
                "client_ca": str(authority.write(directory / "clients.crt")),
                "client_certificates": "request",
            },
            "limits": {"concurrent_collectors": 12},
            "kubernetes": {"cri": "off", "api": "off"},
            "auth": {
                "tokens": [{"name": n, "file": token_file(directory, n)} for n in names],
                "kubernetes": cluster.config(),
            },
            "roles": ROLES,
            "audit": {"file": str(audit)},
            "continuous": [{"kind": "syscall_stats", "config": {"comm": NO_ONE}}],
        }
        agent = stack.enter_context(running_agent(directory, config))
        has_tried_the_kernel(agent)
        (directory / "agent.sock").chmod(0o666)
        tcp = next(a for a in _listening(agent) if not a.startswith("unix:"))
        agent.address = address
        house = House(agent, cluster, audit)
        over = partial(Who, tcp, authority=authority)
        shown = {
            "boss": authority.sign(subject=distinguished(CN="boss")),
            **{
                name: authority.sign(f"{SPIFFE}{name}") for name in ("view", "operator", "stranger")
            },
        }
        viewer = stack.enter_context(as_user(VIEWER_UID, address))
        house.callers = {
            "unix root": Who(address),
            "unix viewer": Who(viewer),
            "unix operator": Who(stack.enter_context(as_user(OPERATOR_UID, address))),
            "unix viewer with the operator's token": Who(viewer, "the-token-of-operator"),
            "view socket root": Who(view),
            "view socket viewer": Who(stack.enter_context(as_user(VIEWER_UID, view))),
            "view socket boss's token": Who(view, "the-token-of-boss"),
            "view socket Kubernetes' all rights": Who(view, "kube-sa-all"),
            **{f"certificate {name}": over(shows=pair) for name, pair in shown.items()},
            "certificate stranger with the operator's token": over(
                "the-token-of-operator", shows=shown["stranger"]
            ),
            **{f"token {n}": over(f"the-token-of-{n}") for n in names},
            "kubernetes root": over("kube-root"),
            "kubernetes jane": over("kube-jane"),
            "kubernetes ops": over("kube-ops"),
            "kubernetes all rights": over("kube-sa-all"),
            "kubernetes rights to read": over("kube-sa-view"),
            "kubernetes no rights": over("kube-sa-none"),
            "a wrong token": over("wrong"),
            "no token": over(),
        }
        house.others = started(house.callers["token other"])
        house.continuous = wait_until(lambda: continuous_of(house))
        yield house


def _listening(agent: RunningAgent) -> list[str]:
    line = next(line for line in agent.log() if line["event"] == "listening")
    addresses: Any = line["grpc"]
    return list(addresses)


def listed(who: Who) -> dict[str, pb.CollectorInfo]:
    answer = who.call("ListCollectors", pb.ListCollectorsRequest(include_ended=True))
    return {each.collector_id: each for each in answer.collectors}


def continuous_of(house: House) -> str:
    found = [each.collector_id for each in listed(house.callers["unix root"]).values()
             if each.continuous]  # fmt: skip
    return found[0] if found else ""


def started(who: Who, **options: object) -> str:
    answer = who.call("StartCollector", start_request({"comm": NO_ONE, **options}, duration_s=200))
    assert answer.supported
    return str(answer.collector_id)


def stopped(house: House, session: str) -> None:
    request = pb.StopEbpfCollectorRequest(collector_id=session)
    house.callers["unix root"].call("StopCollector", request)


# The matrix


def about(session: str) -> Mapping[str, Message]:
    stream = pb.EbpfEventStreamRequest(collector_id=session)
    return {
        "StreamEvents": stream,
        "StreamEventBatches": stream,
        "RenewCollector": pb.RenewCollectorRequest(collector_id=session),
        "StopCollector": pb.StopEbpfCollectorRequest(collector_id=session),
    }


SESSION_RPCS: Final = tuple(about(""))
WITHOUT_TARGET: Final = {
    "ListCollectors": pb.ListCollectorsRequest(),
    "WatchCollectors": pb.WatchCollectorsRequest(),
    "GetCapabilities": pb.GetCapabilitiesRequest(),
    "ListPods": pb.ListPodsRequest(),
}
OTHER_SERVICES: Final = ("Check", "List", "Watch", "ServerReflectionInfo")
READ, WRITE = SESSION_RPCS[:2], SESSION_RPCS[2:]

# By role: a session that the caller has started, one of another, a continuous one.
EXPECTED: Final[Mapping[str, Mapping[str, Mapping[str, grpc.StatusCode]]]] = {
    "admin": {
        "own": dict.fromkeys(SESSION_RPCS, OK),
        "others": dict.fromkeys(SESSION_RPCS, OK),
        "continuous": {**dict.fromkeys(READ, OK), "RenewCollector": NO_LEASE},
    },
    "operate": {
        "own": dict.fromkeys(SESSION_RPCS, OK),
        "others": dict.fromkeys(SESSION_RPCS, UNKNOWN),
        "continuous": {**dict.fromkeys(READ, OK), **dict.fromkeys(WRITE, DENIED)},
    },
    "view": {
        "others": {**dict.fromkeys(READ, UNKNOWN), **dict.fromkeys(WRITE, DENIED)},
        "continuous": {**dict.fromkeys(READ, OK), **dict.fromkeys(WRITE, DENIED)},
    },
    "none": {
        "others": dict.fromkeys(SESSION_RPCS, DENIED),
        "continuous": dict.fromkeys(SESSION_RPCS, DENIED),
    },
    "nobody": {
        "others": dict.fromkeys(SESSION_RPCS, STRANGER),
        "continuous": dict.fromkeys(SESSION_RPCS, STRANGER),
    },
}
REFUSED: Final = {"none": DENIED, "nobody": STRANGER}
# What Kubernetes lets its callers do is asked once the session is known. One that is not theirs is
# answered as one that does not exist, whatever their role is.
REVIEWED: Final = {
    ("view", "others"): dict.fromkeys(SESSION_RPCS, UNKNOWN),
    ("none", "others"): dict.fromkeys(SESSION_RPCS, UNKNOWN),
    ("none", "continuous"): dict.fromkeys(SESSION_RPCS, UNKNOWN),
}


def test_the_matrix_has_every_rpc() -> None:
    names = {name.rpartition(".")[2] for name in RPCS if "EbpfService" in name}
    assert names == {*SESSION_RPCS, *WITHOUT_TARGET, "StartCollector"}
    assert {name.rpartition(".")[2] for name in RPCS} - names == set(OTHER_SERVICES)


@pytest.mark.parametrize("rpc", [*WITHOUT_TARGET, *OTHER_SERVICES])
@pytest.mark.parametrize("caller", CALLERS)
def test_who_may_call_what_has_no_target(caller: str, rpc: str, house: House) -> None:
    who, role = house.callers[caller], CALLERS[caller]
    if rpc in WITHOUT_TARGET:
        code, _ = who.outcome(rpc, WITHOUT_TARGET[rpc])
    else:
        code = who.other(rpc)
    if rpc in ("Check", "List", "Watch"):
        assert code is OK
    else:
        assert code is REFUSED.get(role, OK)


@pytest.mark.parametrize("caller", CALLERS)
def test_who_may_start_a_collector(caller: str, house: House) -> None:
    role, request = CALLERS[caller], start_request({"comm": NO_ONE})
    before = len(listed(house.callers["unix root"]))
    code, text = house.callers[caller].outcome("StartCollector", request)
    if role in ("admin", "operate"):
        assert code is OK
        for session in listed(house.callers["unix root"]):
            if session not in (house.others, house.continuous):
                house.callers["unix root"].outcome("StopCollector", about(session)["StopCollector"])
        return
    assert code is REFUSED.get(role, DENIED)
    assert len(listed(house.callers["unix root"])) <= before
    if caller.endswith("viewer"):
        known = text.partition("; you are known as ")[2]
        assert text.startswith("StartCollector needs the role operate; ")
        assert known.endswith(", and have the role view")
        assert ("token:viewer" if "token" in caller else f"uid:{VIEWER_UID}") in known


@pytest.mark.parametrize("whose", ["own", "others", "continuous"])
@pytest.mark.parametrize("caller", CALLERS)
def test_who_may_do_what_to_a_session(caller: str, whose: str, house: House) -> None:
    who, role = house.callers[caller], CALLERS[caller]
    expected = EXPECTED[role].get(whose)
    if caller.startswith("kubernetes"):
        expected = REVIEWED.get((role, whose), expected)
    if expected is None:
        assert role not in ("admin", "operate")  # it could start none
        return
    if whose == "own":
        session = started(who)
    elif whose == "others":
        session = started(house.callers["token other"])
    else:
        session = house.continuous
    try:
        requests = {rpc: made for rpc, made in about(session).items() if rpc in expected}
        with ThreadPoolExecutor() as pool:
            reads = {rpc: pool.submit(who.outcome, rpc, requests[rpc]) for rpc in READ}
            found = {rpc: read.result() for rpc, read in reads.items()}
        found |= {rpc: who.outcome(rpc, requests[rpc]) for rpc in WRITE if rpc in expected}
        assert {rpc: code for rpc, (code, _) in found.items()} == dict(expected)
        for code, text in found.values():
            if code is UNKNOWN:
                assert text == f"collector_id: this agent knows no collector {session!r}"
    finally:
        if whose != "continuous":
            house.callers["unix root"].outcome("StopCollector", about(session)["StopCollector"])


# What callers see


@pytest.mark.parametrize("caller", [each for each, role in CALLERS.items() if role == "operate"])
def test_a_list_has_what_is_the_callers_and_what_is_continuous(caller: str, house: House) -> None:
    who = house.callers[caller]
    own = started(who)
    try:
        seen = set(listed(who))
        assert {own, house.continuous} <= seen
        assert house.others not in seen
        assert own not in listed(house.callers["token other"])
        assert {own, house.others} <= set(listed(house.callers["token boss"]))
    finally:
        stopped(house, own)
    assert own in listed(who)  # ended
    assert own not in listed(house.callers["token other"])


def test_the_end_of_anothers_session_is_told_to_nobody_else(house: House) -> None:
    operator, other = house.callers["token operator"], house.callers["token other"]
    session = started(operator)
    stopped(house, session)
    for rpc, request in about(session).items():
        if rpc in WRITE:
            assert "has ended: STOPPED" in operator.outcome(rpc, request)[1]
        assert other.outcome(rpc, request) == (
            UNKNOWN,
            f"collector_id: this agent knows no collector {session!r}",
        )


def test_a_watch_has_what_its_caller_may_see_in_order(house: House) -> None:
    operator, other = house.callers["token operator"], house.callers["token other"]
    with operator.streaming("WatchCollectors", pb.WatchCollectorsRequest()) as changes:
        foreign = started(other)
        own = started(operator)
        stopped(house, foreign)
        stopped(house, own)
        seen = []
        for change in changes:
            seen.append((pb.CollectorChange.What.Name(change.what), change.collector.collector_id))
            if seen[-1] == ("WHAT_ENDED", own):
                break
    assert seen[:2] == [("WHAT_PRESENT", house.continuous), ("WHAT_SYNCED", "")]
    assert seen[2:] == [("WHAT_STARTED", own), ("WHAT_ENDED", own)]


def test_only_admins_see_who_else_reads(house: House) -> None:
    request = pb.EbpfEventStreamRequest(collector_id=house.continuous)
    viewer, operator = house.callers["unix viewer"], house.callers["token operator"]
    with (
        viewer.streaming("StreamEventBatches", request),
        operator.streaming("StreamEventBatches", request),
    ):
        seen = {
            name: len(listed(house.callers[name])[house.continuous].subscribers)
            for name in ("token boss", "unix viewer", "token operator", "token viewer")
        }
    assert seen == {"token boss": 2, "unix viewer": 1, "token operator": 1, "token viewer": 0}


def test_an_operator_without_it_may_not_watch_the_whole_machine(house: House) -> None:
    request = start_request({"scope": "host"})
    code, text = house.callers["token other"].outcome("StartCollector", request)
    assert code is DENIED
    assert text == (
        "config[\"scope\"]: 'host' is not allowed by this agent's roles[3].host_scope; you are "
        "known as token:other, and have the role operate"
    )


# Kubernetes


def test_a_server_that_is_down_lets_nobody_new_in(house: House) -> None:
    stranger = house.callers["no token"]
    house.cluster.broken = "500"
    try:
        for token in ("kube-new", "kube-newer"):
            code, text = replace(stranger, token=token).outcome(
                "ListCollectors", pb.ListCollectorsRequest()
            )
            assert code is grpc.StatusCode.UNAVAILABLE
            assert text.startswith("Kubernetes could not be asked at https://127.0.0.1:")
            assert "kube-new" not in text
        # Callers that are known by other means do not depend on it.
        for name in ("unix root", "token viewer"):
            assert (
                house.callers[name].outcome("ListCollectors", pb.ListCollectorsRequest())[0] is OK
            )
        unanswered = samples(scrape(house.agent), "coral_agent_kubernetes_unanswered_total")
        assert sum(unanswered.values()) >= 2
    finally:
        house.cluster.broken = ""
    code, _ = replace(stranger, token="kube-new").outcome(
        "ListCollectors", pb.ListCollectorsRequest()
    )
    assert code is STRANGER


def test_a_refusal_names_the_right_that_kubernetes_does_not_give(house: House) -> None:
    who = house.callers["kubernetes rights to read"]
    code, text = who.outcome("StartCollector", start_request({"comm": NO_ONE}))
    assert code is DENIED
    assert text == (
        "StartCollector needs the right to create collectors.coral.io in every namespace, since "
        "the target lies in none that is known, which Kubernetes does not give "
        "system:serviceaccount:shop:sa-view"
    )


# The audit


def test_every_session_can_be_followed_from_who_started_it_to_how_it_ended(house: House) -> None:
    names = (
        "unix operator", "certificate operator", "token operator", "kubernetes ops",
        "kubernetes all rights",
    )  # fmt: skip
    by = {}
    for name in names:
        who = house.callers[name]
        session = started(who)
        who.call("StopCollector", about(session)["StopCollector"])
        by[session] = name
    wait_until(lambda: by.keys() <= {s["session"] for s in house.lines() if s["event"] == "end"})
    lines = house.lines()
    for session, name in by.items():
        own = [line for line in lines if line.get("session") == session]
        assert [(line["event"], line.get("rpc")) for line in own] == [
            ("decision", "StartCollector"), ("decision", "StopCollector"), ("end", None),
        ]  # fmt: skip
        start, _, end = own
        how = name.partition(" ")[0]
        assert (start["how"], start["verdict"]) == (how, "allowed")
        assert start["who"].startswith(("uid:", "spiffe:", "token:", "kubernetes:"))
        assert start["asked"] == {"kind": "syscall_stats", "config": {"comm": NO_ONE}}
        assert start["resolved"] == {"comm": NO_ONE}
        assert end["end"] == "STOPPED"
    starts = {line["session"] for line in lines if line.get("rpc") == "StartCollector"
              and line["verdict"] == "allowed"}  # fmt: skip
    known = {line.get("session", "") for line in lines if line["event"] == "continuous"}
    assert known == {house.continuous}
    ended = {line["session"] for line in lines if line["event"] == "end"}
    assert ended == starts - {house.others}


def refused_stops(house: House) -> int:
    """How often somebody was not let stop the session of others, by the audit."""
    lines = [line for line in house.lines() if line.get("session") == house.others]
    return sum(line.get("rpc") == "StopCollector" for line in lines)


def test_a_refusal_is_in_the_audit_with_what_was_asked_and_what_that_was(house: House) -> None:
    request = start_request({"scope": "host"})
    before = refused_stops(house)
    house.callers["token other"].outcome("StartCollector", request)
    house.callers["no token"].outcome("StartCollector", request)
    house.callers["token viewer"].outcome("StartCollector", request)
    session = house.others
    house.callers["token operator"].outcome("StopCollector", about(session)["StopCollector"])
    wait_until(lambda: refused_stops(house) > before)
    by_policy, nobody, viewer, stop = house.lines()[-4:]
    assert by_policy["asked"] == {"kind": "syscall_stats", "config": {"scope": "host"}}
    assert by_policy["resolved"] == {"host": True}
    assert (by_policy["who"], by_policy["verdict"]) == ("token:other", "refused")
    assert "roles[3].host_scope" in by_policy["reason"]
    assert (nobody["who"], nobody["how"], nobody["verdict"]) == ("anyone", "anyone", "refused")
    assert (viewer["who"], viewer["role"], viewer["verdict"]) == ("token:viewer", "view", "refused")
    assert (stop["session"], stop["verdict"]) == (session, "refused")
    assert stop["reason"] == "it is another caller's"
    text = house.audit.read_text()
    assert "the-token-of" not in text
    assert "kube-" not in text


def test_decisions_are_counted(house: House) -> None:
    before = samples(scrape(house.agent), "coral_agent_access_decisions_total", verdict="refused")
    house.callers["no token"].outcome("ListCollectors", pb.ListCollectorsRequest())
    after = samples(scrape(house.agent), "coral_agent_access_decisions_total", verdict="refused")
    assert sum(after.values()) == sum(before.values()) + 1
    assert sum(samples(scrape(house.agent), "coral_agent_audit_lines_dropped_total").values()) == 0
