"""What is wanted on an agent against what is there, with a clock of the test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import pytest

from coral.client import CollectorInfo, Kind
from coral.colony.follow.wanted import Renew, Start, Upkeep, Wanted
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.kinds import kind_of

HTTP: Final = Wanted(Kind.of("http_latency"), config={"scope": "host", "interval": "10s"})
PODS: Final = Wanted(Kind.of("tcp_metrics"), "shop", {"namespace": "shop", "interval": "10s"})


def info(
    kind: str = "http_latency",
    config: Mapping[str, str] | None = None,
    service: str = "",
    *,
    collector_id: str = "one",
    continuous: bool = False,
) -> CollectorInfo:
    return CollectorInfo.of(
        pb.CollectorInfo(
            collector_id=collector_id,
            kind=kind_of(kind),  # type: ignore[arg-type]
            config=HTTP.config if config is None else config,
            service_name=service,
            continuous=continuous,
        )
    )


def upkeep(*wanted: Wanted, there: Sequence[CollectorInfo] = (), now_s: float = 0.0) -> Upkeep:
    kept = Upkeep(wanted, jitter=lambda: 1.0)
    kept.begin(there, now_s)
    return kept


@pytest.mark.parametrize(
    ("wanted", "there", "met"),
    [
        (HTTP, info(), True),
        (HTTP, info("tcp_metrics"), False),
        (HTTP, info(config={"scope": "host", "interval": "1s"}), False),
        # The agent's own configuration decides how often it tells.
        (HTTP, info(config={"scope": "host", "interval": "1s"}, continuous=True), True),
        (HTTP, info(config={"scope": "host"}, continuous=True), True),
        (HTTP, info(config={"scope": "host", "mode": "events"}, continuous=True), False),
        (HTTP, info(config={"pid": "7"}, continuous=True), False),
        # Where the configuration names the target, the service is a label.
        (HTTP, info(service="anything"), True),
        (PODS, info("tcp_metrics", PODS.config, "shop"), True),
        (PODS, info("tcp_metrics", PODS.config, "another"), False),
    ],
)
def test_a_collector_is_what_is_wanted_if_it_looks_at_the_same(
    wanted: Wanted, there: CollectorInfo, met: bool
) -> None:
    assert wanted.is_met_by(there) is met


def test_what_is_not_there_is_started_and_its_lease_renewed_thrice_as_often_as_it_ends() -> None:
    kept = upkeep(HTTP)
    (start,) = kept.due(0.0)
    assert start == Start(HTTP)
    assert kept.due(50.0) == []  # until the agent has answered
    assert kept.next_s() == float("inf")
    kept.done(start, "one", 1.0)
    assert kept.missing == {}
    assert kept.next_s() == 101.0
    assert kept.due(100.9) == []
    (renew,) = kept.due(101.0)
    assert renew == Renew(HTTP, "one")
    kept.done(renew, "one", 102.0)
    assert kept.next_s() == 202.0


def test_what_is_there_is_adopted_and_its_lease_renewed_at_once() -> None:
    kept = upkeep(HTTP, PODS, there=[info(), info("syscall_stats", collector_id="two")])
    assert kept.due(0.0) == [Renew(HTTP, "one"), Start(PODS)]
    assert kept.missing == {"tcp_metrics shop": ""}


def test_a_continuous_collector_has_no_lease_to_renew() -> None:
    kept = upkeep(HTTP, there=[info(continuous=True)])
    assert kept.due(1e9) == []
    assert kept.missing == {}


def test_a_report_of_a_start_that_has_not_answered_yet_is_that_start() -> None:
    kept = upkeep(HTTP)
    (start,) = kept.due(0.0)
    kept.appears(info(), 0.5)
    kept.done(start, "one", 1.0)
    assert kept.due(2.0) == []


def test_a_refusal_is_tried_again_after_pauses_that_double_up_to_five_minutes() -> None:
    kept, now_s, pauses = upkeep(HTTP), 0.0, []
    for _ in range(11):
        (start,) = kept.due(now_s)
        kept.refused(start, "no room", now_s)
        assert kept.missing == {"http_latency": "no room"}
        pauses.append(kept.next_s() - now_s)
        now_s = kept.next_s()
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


def test_pauses_have_a_jitter_of_a_half() -> None:
    kept = Upkeep([HTTP], jitter=lambda: 0.0)
    kept.begin([], 0.0)
    (start,) = kept.due(0.0)
    kept.refused(start, "no room", 0.0)
    assert kept.next_s() == 0.5


def test_what_ends_is_started_again_at_once_where_it_was_steady() -> None:
    kept = upkeep(HTTP)
    for _ in range(5):
        (start,) = kept.due(kept.next_s())
        kept.refused(start, "no room", 0.0)
    (start,) = kept.due(kept.next_s())
    kept.done(start, "one", 100.0)
    kept.disappears("one", "it ended: preempted", 170.0)
    assert kept.missing == {"http_latency": "it ended: preempted"}
    assert kept.next_s() == 171.0


def test_what_ends_soon_after_it_began_is_started_again_later_each_time() -> None:
    kept, pauses = upkeep(HTTP), []
    for _ in range(4):
        now_s = kept.next_s()
        (start,) = kept.due(now_s)
        kept.done(start, "one", now_s)
        kept.disappears("one", "it ended: failed", now_s)
        pauses.append(kept.next_s() - now_s)
    assert pauses == [1, 2, 4, 8]


def test_a_new_connection_looks_at_everything_anew() -> None:
    kept = upkeep(HTTP)
    (start,) = kept.due(0.0)
    kept.done(start, "one", 0.0)
    kept.begin([], 5.0)
    assert kept.due(5.0) == [Start(HTTP)]
    kept.begin([info()], 6.0)
    assert kept.due(6.0) == [Renew(HTTP, "one")]
