"""TokenReview and SubjectAccessReview, asked of a real HTTPS server: what is believed, remembered
and refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from coral.agent.access.kubernetes import MOST_KEPT, NO_S, YES_S, Remembered, Reviews
from coral.agent.access.kubernetes_api import ApiServer
from coral.agent.caller import Identity
from coral.agent.config_access import Kubernetes
from coral.agent.errors import UnavailableError
from tests.kubernetes_api import AUDIENCE, Cluster, authority, running_cluster
from tests.support import wait_until

TRACER = "system:serviceaccount:shop:tracer"
GROUPS = ("system:serviceaccounts", "system:serviceaccounts:shop")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "cluster") as cluster:
        cluster.users["good"] = (TRACER, GROUPS, AUDIENCE)
        cluster.users["elsewhere"] = (TRACER, GROUPS, "https://kubernetes.default.svc")
        yield cluster


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def reviews(cluster: Cluster, clock: Clock | None = None, timeout_s: float = 3.0) -> Reviews:
    config = Kubernetes(
        server=cluster.url, ca_file=str(cluster.ca), token_file=str(cluster.token_file)
    )
    return Reviews(ApiServer(config, timeout_s).post, config.audience, clock or Clock())


def test_a_token_is_whose_kubernetes_says_with_the_groups(cluster: Cluster) -> None:
    identity = reviews(cluster).identity_of("good")
    assert identity == Identity(
        "kubernetes",
        (f"kubernetes:{TRACER}", *(f"kubernetes-group:{group}" for group in GROUPS)),
    )
    assert cluster.asked == [("TokenReview", {"token": "good", "audiences": [AUDIENCE]})]


@pytest.mark.parametrize("token", ["bad", "elsewhere"])
def test_a_token_that_is_not_valid_for_this_audience_is_nobodys(
    token: str, cluster: Cluster
) -> None:
    assert reviews(cluster).identity_of(token) is None


def answered(status: object) -> Reviews:
    """Of a server that answers everything with STATUS."""
    return Reviews(lambda _path, _body: {"status": status}, AUDIENCE)


def test_a_server_that_does_not_know_audiences_is_not_believed() -> None:
    user = {"username": "jane"}
    for status in (
        {"authenticated": True, "user": user},
        {"authenticated": True, "user": user, "audiences": []},
        {"authenticated": True, "user": user, "audiences": ["other"]},
        {"authenticated": "true", "user": user, "audiences": [AUDIENCE]},
        {"authenticated": True, "user": {}, "audiences": [AUDIENCE]},
        {"authenticated": True, "user": {"username": 7}, "audiences": [AUDIENCE]},
        {"authenticated": True, "audiences": [AUDIENCE]},
    ):
        assert answered(status).identity_of("t") is None


def test_verdicts_are_remembered_for_a_time_the_negative_ones_for_a_shorter_one(
    cluster: Cluster,
) -> None:
    clock = Clock()
    asking = reviews(cluster, clock)
    for _ in range(3):
        assert asking.identity_of("good")
        assert asking.identity_of("bad") is None
    assert cluster.questions("TokenReview") == 2
    assert asking.remembers("good")
    clock.now_s += NO_S
    assert asking.remembers("good")
    assert not asking.remembers("bad")
    clock.now_s += YES_S - NO_S
    assert not asking.remembers("good")
    del cluster.users["good"]
    assert asking.identity_of("good") is None
    assert cluster.questions("TokenReview") == 3


def test_no_more_than_so_many_verdicts_are_kept_and_no_token_is() -> None:
    remembered: Remembered[int, bool] = Remembered()
    for key in range(MOST_KEPT + 10):
        remembered.put(key, True, 1e9)
    assert len(remembered) == MOST_KEPT
    assert remembered.get(9) is None
    assert remembered.get(10) == (True,)
    asking = Reviews(lambda _path, _body: {"status": {"authenticated": False}}, AUDIENCE)
    asking.identity_of("a secret of this test")
    assert "secret" not in repr(vars(asking._strangers))


def test_wrong_tokens_do_not_push_out_those_that_are_right(cluster: Cluster) -> None:
    asking = reviews(cluster)
    assert asking.identity_of("good")
    for number in range(MOST_KEPT + 1):
        asking._strangers.put(b"%d" % number, None, NO_S)
    assert asking.remembers("good")


def test_rights_are_asked_for_by_verb_and_namespace_and_remembered(cluster: Cluster) -> None:
    cluster.rights |= {(TRACER, "create", "shop"), (GROUPS[1], "list", "")}
    clock = Clock()
    asking = reviews(cluster, clock)
    identity = asking.identity_of("good")
    assert identity
    for _ in range(2):
        assert asking.is_allowed(identity, "create", "shop")
        assert not asking.is_allowed(identity, "create", "bank")
        assert not asking.is_allowed(identity, "create", "")
        assert asking.is_allowed(identity, "list", "bank")
    assert cluster.questions("SubjectAccessReview") == 4
    assert cluster.asked[1] == (
        "SubjectAccessReview",
        {
            "user": TRACER,
            "groups": list(GROUPS),
            "resourceAttributes": {
                "group": "coral.io", "resource": "collectors", "verb": "create",
                "namespace": "shop",
            },
        },
    )  # fmt: skip
    cluster.rights.clear()
    clock.now_s += YES_S
    assert not asking.is_allowed(identity, "create", "shop")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("500", "it answered 500 Internal Server Error"),
        ("text", "Expecting value"),
        ("empty", "without a status"),
        ("huge", "it answered more than 1048576 bytes"),
        ("deep", "recursion|nested"),
    ],
)
def test_an_answer_that_is_none_lets_nobody_in_and_is_not_remembered(
    broken: str, reason: str, cluster: Cluster
) -> None:
    asking = reviews(cluster)
    cluster.broken = broken
    with pytest.raises(UnavailableError, match=reason):
        asking.identity_of("good")
    with pytest.raises(UnavailableError, match=reason):
        asking.is_allowed(Identity("kubernetes", ("kubernetes:jane",)), "create", "shop")
    assert asking.unanswered == 2
    cluster.broken = ""
    assert asking.identity_of("good")


def test_a_server_that_is_not_there_or_not_the_one_is_not_asked(
    cluster: Cluster, tmp_path: Path
) -> None:
    asking = reviews(cluster)
    trusted = cluster.ca.read_bytes()
    cluster.ca.write_bytes(authority(tmp_path, "other")[0].read_bytes())
    with pytest.raises(UnavailableError, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify"):
        asking.identity_of("good")
    cluster.ca.write_bytes(b"")
    with pytest.raises(UnavailableError, match=r"ca\.crt is empty"):
        asking.identity_of("good")
    assert cluster.asked == []
    cluster.ca.write_bytes(trusted)  # it is read for each question
    assert asking.identity_of("good")
    cluster.url = "https://127.0.0.1:1"
    with pytest.raises(
        UnavailableError, match=r"asked at https://127\.0\.0\.1:1: Connection refused"
    ):
        reviews(cluster).identity_of("good")


def test_the_agents_own_token_may_be_rotated_and_is_in_no_message(cluster: Cluster) -> None:
    asking = reviews(cluster)
    cluster.agents_token = "the-next-one-of-the-agent"
    with pytest.raises(UnavailableError, match="it answered 401 Unauthorized"):
        asking.identity_of("good")
    cluster.token_file.write_text("the-next-one-of-the-agent\n")
    assert asking.identity_of("good")
    for text in ("of two\nlines-secret", "", "not\xa0ascii-secret"):
        cluster.token_file.write_text(text)
        with pytest.raises(UnavailableError) as refused:
            asking.is_allowed(Identity("kubernetes", ("kubernetes:jane",)), "create", "x")
        assert "secret" not in str(refused.value)


def test_a_server_that_says_nothing_is_waited_for_for_a_bounded_time_by_a_few(
    cluster: Cluster,
) -> None:
    asking = reviews(cluster, timeout_s=30)
    cluster.broken = "silent"
    refusals: list[str] = []

    def ask(number: int) -> None:
        try:
            asking.identity_of(f"unknown {number}")
        except UnavailableError as error:
            refusals.append(str(error))

    threads = [Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: cluster.questions("TokenReview") == len(threads))
    ask(9)
    assert refusals == ["Kubernetes: 8 earlier questions are not answered yet: try again"]
    cluster.resumed.set()
    for thread in threads:
        thread.join()
    cluster.broken = ""
    assert asking.identity_of("good")
    impatient = reviews(cluster, timeout_s=0.05)
    cluster.broken, cluster.resumed = "silent", type(cluster.resumed)()
    with pytest.raises(UnavailableError, match="timed out"):
        impatient.identity_of("good")
