"""What is decided about a caller: by its names, its roles, their constraints, and Kubernetes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from coral.agent.access.access import Access
from coral.agent.access.grants import Grants
from coral.agent.access.rpcs import RPCS, START, About, Role
from coral.agent.access.target import Ownership, Target
from coral.agent.caller import LIBRARY_IDENTITY, Identity, Trust
from coral.agent.config import ByteCount, Config, Policy
from coral.agent.config_access import Auth, RoleQuotas, RoleRule
from coral.agent.errors import LimitError
from coral.agent.serving.caller import NOBODY, identity_of
from coral.agent.serving.health import HEALTH
from coral.agent.serving.listening import Origin
from coral.agent.serving.reflection import REFLECTION
from coral.agent.serving.service import SERVICE
from coral.collectors.contract import ServiceProcesses, Watched
from coral.mesh.v1 import ebpf_pb2 as pb

STATS, TCP = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, pb.EBPF_COLLECTOR_KIND_TCP_METRICS
HOST = Target(STATS, Watched(host=True))
CI = Identity("token", ("token:ci",))
STOP = "coral.mesh.v1.EbpfService.StopCollector"
STREAM = "coral.mesh.v1.EbpfService.StreamEventBatches"
LIST = "coral.mesh.v1.EbpfService.ListCollectors"


def access(*rules: RoleRule, reviewer: Any = None, **config: Any) -> Access:
    return Access(Config(roles=rules, **config), reviewer)


def rule(role: Any, *to: str, **constraints: Any) -> RoleRule:
    return RoleRule(role=role, to=to or ("token:ci",), **constraints)


def service(name: str, *namespaces: str, kind: int = STATS, events: bool = False) -> Target:
    found = ServiceProcesses(name, (2**22,), namespaces=namespaces)
    return Target(kind, Watched(tgids=(2**22,)), found, events, namespaces)


# The table


def test_every_rpc_that_is_served_has_a_row_and_no_other_has() -> None:
    served = {m.full_name for each in (SERVICE, HEALTH, REFLECTION) for m in each.methods}
    assert served == set(RPCS)


def test_an_rpc_without_a_row_needs_the_role_admin() -> None:
    decided = access(rule("operate")).decide(CI, "coral.mesh.v1.EbpfService.Unheard")
    assert not decided.allowed
    assert decided.reason.startswith("Unheard needs the role admin; ")


ROLES = {"none": Role.NONE, "view": Role.VIEW, "operate": Role.OPERATE, "admin": Role.ADMIN}


@pytest.mark.parametrize(("role", "rpc"), [*itertools.product(ROLES, sorted(RPCS))])
def test_each_role_may_call_exactly_what_needs_no_greater_one(role: str, rpc: str) -> None:
    rules = [rule(role)] if role != "none" else []
    decided = access(*rules).decide(CI, rpc)
    assert decided.allowed is (ROLES[role] >= RPCS[rpc].least)
    assert decided.role is ROLES[role]


def test_a_refusal_says_which_role_is_needed_and_by_which_names_the_caller_is_known() -> None:
    decided = access(rule("view")).decide(CI, START)
    assert decided.reason == (
        "StartCollector needs the role operate; you are known as token:ci, and have the role view"
    )
    nobody = access().decide(Identity("unix", ("uid:7", "gid:8")), LIST)
    assert nobody.reason == (
        "ListCollectors needs the role view; you are known as uid:7, gid:8, and have no role"
    )


# Names


@pytest.mark.parametrize(
    ("names", "principal"),
    [
        (("uid:7", "gid:8", "socket:admin"), "uid:7"),
        (("token:ci", "uid:7"), "token:ci"),
        (("kubernetes-group:g", "kubernetes:u"), "kubernetes:u"),
        (("dns:a", "subject:CN=a"), "subject:CN=a"),
        (("dns:a", "subject:CN=a", "spiffe://td/a"), "spiffe://td/a"),
        (("gid:8",), "gid:8"),
        (("anyone", "loopback"), "anyone"),
        ((), "library"),
    ],
)
def test_a_session_belongs_to_the_name_that_tells_its_caller_from_others(
    names: tuple[str, ...], principal: str
) -> None:
    assert Identity("library", names).principal == principal


@pytest.mark.parametrize(
    ("address", "names", "how", "known"),
    [
        ("unix: uid 7, pid 9", ("uid:7", "socket:admin"), "unix", ("uid:7", "socket:admin")),
        ("ipv4:127.0.0.1:9", (), "anyone", ("anyone", "loopback")),
        ("ipv6:[::1]:9", (), "anyone", ("anyone", "loopback")),
        ("ipv4:10.0.0.7:9", (), "anyone", ("anyone",)),
        ("ipv4:10.0.0.7:9", ("dns:a",), "certificate", ("dns:a", "certificate")),
    ],
)
def test_a_connection_proves_what_its_origin_says(
    address: str, names: tuple[str, ...], how: str, known: tuple[str, ...]
) -> None:
    identity = identity_of(Origin(address, "p", Trust.ANYONE, names=names))
    assert (identity.how, identity.names) == (how, known)


@pytest.mark.parametrize(
    ("pattern", "role"),
    [
        ("token:ci", Role.OPERATE),
        ("token:c*", Role.OPERATE),
        ("*", Role.OPERATE),
        ("token:CI", Role.NONE),
        ("ci", Role.NONE),
        ("uid:*", Role.NONE),
    ],
)
def test_a_rule_is_for_names_by_pattern(pattern: str, role: Role) -> None:
    assert access(rule("operate", pattern)).role_of(CI) is role


@pytest.mark.parametrize("pattern", ["*", "any*", "a*e", "loop*"])
def test_no_pattern_means_callers_that_prove_nothing(pattern: str) -> None:
    nobody = Identity("anyone", ("anyone", "loopback"))
    assert access(rule("view", pattern)).role_of(nobody) is Role.NONE
    assert access(rule("view", "anyone")).role_of(nobody) is Role.VIEW


# What holds without rules


@pytest.mark.parametrize(
    ("identity", "config", "role"),
    [
        (Identity("unix", ("uid:0", "socket:admin")), Config(), Role.ADMIN),
        (Identity("unix", ("uid:0", "socket:view")), Config(), Role.VIEW),
        (Identity("unix", ("uid:7", "socket:view")), Config(), Role.VIEW),
        (Identity("unix", ("uid:0", "socket:other")), Config(), Role.NONE),
        (Identity("token", ("token:default",)), Config(), Role.ADMIN),
        (Identity("token", ("token:ci",)), Config(), Role.NONE),
        (Identity("certificate", ("dns:a", "certificate")), Config(), Role.ADMIN),
        (
            Identity("certificate", ("dns:a", "certificate")),
            Config(roles=(rule("view", "dns:b"),)),
            Role.NONE,
        ),
        (Identity("anyone", ("anyone", "loopback")), Config(), Role.NONE),
        (
            Identity("anyone", ("anyone", "loopback")),
            Config(auth=Auth(insecure_loopback=True)),
            Role.ADMIN,
        ),
        (NOBODY, Config(auth=Auth(insecure_loopback=True)), Role.NONE),
        (
            Identity("anyone", ("anyone", "loopback")),
            Config(auth=Auth(insecure_loopback=True, token_file="/t")),
            Role.NONE,
        ),
        (LIBRARY_IDENTITY, Config(), Role.ADMIN),
    ],
)
def test_without_rules_the_roles_are_those_of_before(
    identity: Identity, config: Config, role: Role
) -> None:
    assert Access(config).role_of(identity) is role


@pytest.mark.parametrize("name", ["socket:admin", "socket:view", "token:default"])
def test_a_rule_that_names_what_always_holds_takes_its_place(name: str) -> None:
    of = access(rule("view", name, kinds=("tcp_metrics",))).role_of
    assert of(Identity("unix", (name,))) is Role.VIEW
    assert of(Identity("unix", ("socket:admin",))) is (
        Role.VIEW if name == "socket:admin" else Role.ADMIN
    )


def test_whoever_comes_by_the_viewers_socket_is_a_viewer() -> None:
    identity = Identity("token", ("token:ci", "uid:0", "socket:view"))
    of = access(rule("admin", "token:ci", "uid:0")).role_of
    assert of(identity) is Role.VIEW
    assert of(CI) is Role.ADMIN


# Rules add to each other


def test_a_request_is_allowed_by_the_rule_that_allows_it_whole() -> None:
    decide = access(
        rule("operate", services=("shop-*",), kinds=("syscall_stats",)),
        rule("operate", services=("bank",), kinds=("tcp_metrics",)),
    ).decide
    assert decide(CI, START, service("shop-cart")).allowed
    assert decide(CI, START, service("bank", kind=TCP)).allowed
    refused = decide(CI, START, service("bank"))
    assert not refused.allowed
    assert "roles[0].services (shop-*)" in refused.reason
    assert "roles[1].kinds, tcp_metrics" in refused.reason
    assert refused.reason.endswith("; you are known as token:ci, and have the role operate")


def test_of_the_rules_that_allow_it_the_greatest_role_counts_then_the_first() -> None:
    grants = Grants(
        Config(
            roles=(
                rule("view", redact_addresses=True),
                rule("operate", redact_addresses=True),
                rule("operate"),
            )
        )
    )
    assert [grant.number for grant in grants.of(CI)] == [1, 2, 0]
    verdict = access(rule("view", redact_addresses=True), rule("admin")).decide(CI, LIST)
    assert verdict.allowance.redacted is False


# Constraints of a start


@pytest.mark.parametrize(
    ("constraints", "target", "word"),
    [
        ({"services": ("shop-*",)}, service("bank"), "services"),
        ({"services": ("shop-*",)}, HOST, "host_scope"),
        ({"services": ("shop-*",), "host_scope": True}, HOST, "services"),
        ({"namespaces": ("shop",)}, service("a"), "namespaces"),
        ({"namespaces": ("shop",)}, service("a", "bank"), "namespaces"),
        ({"namespaces": ("shop",)}, service("a", "shop", "bank"), "namespaces"),
        ({"kinds": ("tcp_metrics",)}, service("a"), "kinds"),
        ({"mode": "summaries"}, service("a", events=True), "mode"),
        ({}, HOST, "host_scope"),
    ],
)
def test_a_constraint_that_is_not_met_is_named(
    constraints: dict[str, Any], target: Target, word: str
) -> None:
    verdict = access(rule("operate", **constraints)).decide(CI, START, target)
    assert not verdict.allowed
    assert f"this agent's roles[0].{word}" in verdict.reason


@pytest.mark.parametrize(
    ("constraints", "target"),
    [
        ({"services": ("shop-*",)}, service("shop-cart")),
        ({"namespaces": ("shop", "b*")}, service("a", "shop", "bank")),
        ({"namespaces": ("shop",), "services": ("a",)}, service("a")),
        ({"kinds": ("tcp_metrics",)}, service("a", kind=TCP)),
        ({"mode": "summaries"}, service("a")),
        ({"host_scope": True}, HOST),
    ],
)
def test_a_constraint_that_is_met_allows(constraints: dict[str, Any], target: Target) -> None:
    assert access(rule("operate", **constraints)).decide(CI, START, target).allowed


def test_an_admin_may_watch_the_whole_machine_unless_lists_say_what() -> None:
    assert access(rule("admin")).decide(CI, START, HOST).allowed
    assert not access(rule("admin", services=("a",))).decide(CI, START, HOST).allowed


def test_the_agents_own_policy_comes_before_every_role() -> None:
    of = access(rule("admin"), policy=Policy(host_scope=False))
    for identity in (CI, LIBRARY_IDENTITY):
        verdict = of.decide(identity, START, HOST)
        assert not verdict.allowed
        assert "policy.host_scope" in verdict.reason


# Sessions


OWN = Ownership("token:ci")
OTHERS = Ownership("token:other")
CONTINUOUS = Ownership("", continuous=True)


@pytest.mark.parametrize(
    ("role", "ownership", "seen", "streamed", "stopped"),
    [
        ("view", OWN, True, True, False),
        ("view", OTHERS, False, False, False),
        ("view", CONTINUOUS, True, True, False),
        ("operate", OWN, True, True, True),
        ("operate", OTHERS, False, False, False),
        ("operate", CONTINUOUS, True, True, False),
        ("admin", OWN, True, True, True),
        ("admin", OTHERS, True, True, True),
        ("admin", CONTINUOUS, True, True, True),
    ],
)
def test_callers_see_read_and_stop_what_is_theirs(
    role: str, ownership: Ownership, *, seen: bool, streamed: bool, stopped: bool
) -> None:
    of = access(rule(role))
    stream, stop = of.decide(CI, STREAM, ownership), of.decide(CI, STOP, ownership)
    assert of.sees(CI, ownership) is seen
    assert (stream.allowed, stop.allowed) == (streamed, stopped)
    assert stream.visible is stop.visible is seen


def test_constraints_hold_for_what_others_have_started_and_for_continuous_collectors() -> None:
    of = access(rule("view", services=("shop",)), rule("admin", "token:boss", services=("shop",)))
    boss = Identity("token", ("token:boss",))
    covered = of.covering(service("shop"))
    assert covered == {0, 1}
    assert of.covering(service("bank")) == of.covering(HOST) == frozenset()
    for ownership, by_view, by_admin in (
        (Ownership("", continuous=True, covered_by=covered), True, True),
        (Ownership("", continuous=True), False, False),
        (Ownership("token:other", covered_by=covered), False, True),
        (Ownership("token:other"), False, False),
    ):
        assert of.sees(CI, ownership) is of.decide(CI, STREAM, ownership).allowed is by_view
        assert of.sees(boss, ownership) is of.decide(boss, STOP, ownership).allowed is by_admin


def test_the_rule_that_allows_the_target_counts_for_the_callers_own_session_too() -> None:
    of = access(
        rule("operate", namespaces=("bank",)),
        rule("operate", namespaces=("shop",), redact_addresses=True),
    )
    shop, bank = (
        Ownership("token:ci", covered_by=of.covering(service("a", each)))
        for each in ("shop", "bank")
    )
    assert of.decide(CI, STREAM, shop).allowance.redacted
    assert not of.decide(CI, STREAM, bank).allowance.redacted


def test_what_pods_may_come_to_is_not_seen_by_the_cgroups_that_they_have_now(
    tmp_path: Path,
) -> None:
    of = access(rule("view", cgroups=(str(tmp_path),)))
    pods = Watched(pods="namespace:shop", cgroups=frozenset({tmp_path}))
    assert of.covering(Target(STATS, pods, namespaces=("shop",))) == frozenset()


def test_a_viewer_without_lists_sees_continuous_collectors_of_the_whole_machine() -> None:
    of = access(rule("view"), rule("view", "token:b", kinds=("tcp_metrics",)))
    ownership = Ownership("", continuous=True, covered_by=of.covering(HOST))
    assert of.sees(CI, ownership)
    assert not of.sees(Identity("token", ("token:b",)), ownership)


# Kubernetes


class Cluster:
    """Rights by user, verb and namespace."""

    unanswered = 0

    def __init__(self, *rights: tuple[str, str, str]) -> None:
        self.rights = rights
        self.asked: list[tuple[str, str, str]] = []

    def is_allowed(self, identity: Identity, verb: str, namespace: str) -> bool:
        asked = (identity.principal, verb, namespace)
        self.asked.append(asked)
        return asked in self.rights or (*asked[:2], "") in self.rights


TRACER = Identity("kubernetes", ("kubernetes:system:serviceaccount:shop:tracer",))
NAME = TRACER.principal


def test_a_team_may_trace_its_own_namespace_and_no_other() -> None:
    of = access(reviewer=Cluster((NAME, "create", "shop")))
    assert of.may_block(TRACER)
    assert of.decide(TRACER, START).allowed  # decided once the target is known
    assert of.decide(TRACER, START, service("a", "shop")).allowed
    for target, where in (
        (service("a", "bank"), "in the namespace bank"),
        (service("a", "shop", "bank"), "in the namespace bank"),
        (service("a"), "in every namespace, since the target lies in none that is known"),
        (HOST, "in every namespace, since the target lies in none that is known"),
    ):
        verdict = of.decide(TRACER, START, target)
        assert not verdict.allowed
        assert verdict.reason == (
            f"StartCollector needs the right to create collectors.coral.io {where}, which "
            "Kubernetes does not give system:serviceaccount:shop:tracer"
        )


def test_a_right_in_every_namespace_is_for_the_whole_machine_too() -> None:
    of = access(reviewer=Cluster((NAME, "create", "")))
    for target in (HOST, service("a"), service("a", "shop", "bank")):
        assert of.decide(TRACER, START, target).allowed


def test_what_has_no_target_is_asked_about_in_the_callers_own_namespace() -> None:
    cluster = Cluster((NAME, "list", "shop"))
    assert access(reviewer=cluster).decide(TRACER, LIST).allowed
    assert cluster.asked == [(NAME, "list", "shop")]
    person = Identity("kubernetes", ("kubernetes:jane",))
    assert not access(reviewer=cluster).decide(person, LIST).allowed
    assert cluster.asked[-1] == ("kubernetes:jane", "list", "")


def test_a_right_that_was_taken_away_holds_no_session_either() -> None:
    own = Ownership(NAME, namespaces=("shop",))
    with_right = access(reviewer=Cluster((NAME, "delete", "shop"), (NAME, "get", "shop")))
    assert with_right.decide(TRACER, STOP, own).allowed
    assert with_right.decide(TRACER, STREAM, own).allowed
    without = access(reviewer=Cluster())
    assert not without.decide(TRACER, STOP, own).allowed
    assert not without.decide(TRACER, STREAM, own).allowed
    others = Ownership("kubernetes:other", namespaces=("shop",))
    assert not with_right.decide(TRACER, STREAM, others).visible


def test_kubernetes_makes_no_operator_of_whoever_comes_by_the_viewers_socket() -> None:
    of = access(reviewer=Cluster(*((NAME, verb, "") for verb in ("create", "delete", "list"))))
    by_socket = Identity("kubernetes", (*TRACER.names, "uid:0", "socket:view"))
    for rpc in (START, STOP):
        refused = of.decide(by_socket, rpc)
        assert not refused.allowed
        assert refused.reason.endswith("and have the role view")
        assert of.decide(TRACER, rpc).allowed
    assert not of.decide(by_socket, START, service("a", "shop")).allowed
    assert not of.decide(by_socket, STOP, Ownership(NAME, namespaces=("shop",))).allowed
    assert of.decide(by_socket, LIST).allowed


@pytest.mark.parametrize("constraint", [{}, {"namespaces": ("b*",)}])
def test_the_namespaces_that_a_caller_knows_of_are_those_of_its_roles_and_rights(
    constraint: dict[str, Any],
) -> None:
    of = access(rule("view", **constraint), reviewer=Cluster((NAME, "list", "shop")))
    named = bool(constraint)
    assert of.sees_namespace(CI, "bank")
    assert of.sees_namespace(CI, "shop") is not named
    assert of.sees_namespace(CI, "") is not named
    assert of.sees_namespace(TRACER, "shop")
    assert not of.sees_namespace(TRACER, "bank")
    assert not of.sees_namespace(TRACER, "")
    assert not of.sees_namespace(Identity("unix", ("uid:7",)), "bank")
    assert of.sees_namespace(LIBRARY_IDENTITY, "bank")


def test_a_continuous_collector_is_seen_with_the_right_to_list_in_its_namespaces() -> None:
    of = access(reviewer=Cluster((NAME, "list", "shop"), (NAME, "get", "shop")))
    shop = Ownership("", continuous=True, namespaces=("shop",))
    assert of.sees(TRACER, shop)
    assert of.decide(TRACER, STREAM, shop).allowed
    assert not of.decide(TRACER, STOP, shop).allowed
    assert not of.sees(TRACER, CONTINUOUS)


def test_a_rule_of_the_configuration_is_enough_and_asks_nobody() -> None:
    cluster = Cluster()
    of = access(rule("operate", "kubernetes:*", host_scope=True), reviewer=cluster)
    assert of.decide(TRACER, START, HOST).allowed
    assert cluster.asked == []


def test_more_namespaces_than_can_be_asked_about_need_the_right_in_all() -> None:
    many = [f"n{number}" for number in range(17)]
    cluster = Cluster(*((NAME, "create", each) for each in many))
    assert not access(reviewer=cluster).decide(TRACER, START, service("a", *many)).allowed
    assert access(reviewer=cluster).decide(TRACER, START, service("a", *many[:16])).allowed


# Quotas


def test_quotas_count_each_caller_apart() -> None:
    rules = [rule("operate", "*", quotas=RoleQuotas(sessions=2, streams=1))]
    of = access(*rules)
    allowance = of.decide(CI, LIST).allowance
    quotas = of.quotas
    with quotas.session("a", allowance), quotas.session("a", allowance):
        with quotas.session("b", allowance), quotas.stream("a", allowance):
            pass
        with (
            pytest.raises(LimitError, match=r"roles\[0\].quotas.sessions is 2, and a has 2 coll"),
            quotas.session("a", allowance),
        ):
            raise AssertionError("there are two places")
    with quotas.session("a", allowance):
        pass


def test_all_streams_of_a_caller_take_from_one_rate() -> None:
    of = access(rule("view", "*", quotas=RoleQuotas(bytes_per_second=ByteCount(1000))))
    allowance = of.decide(CI, LIST).allowance
    one, same = (of.quotas.rate("a", allowance) for _ in range(2))
    other = of.quotas.rate("b", allowance)
    assert one is same is not None
    assert other is not one
    assert of.quotas.rate("a", access(rule("view")).decide(CI, LIST).allowance) is None


def test_health_checks_need_no_role_and_no_verb() -> None:
    for name, row in RPCS.items():
        assert (row.least is Role.NONE) is name.startswith("grpc.health.v1.")
        assert bool(row.verb) is (row.least is not Role.NONE)
    assert {name for name, row in RPCS.items() if row.about is About.TARGET} == {START}
