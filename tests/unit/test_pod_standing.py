"""How long what a source of pods' names has said counts once it does not answer any more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coral import bpf
from coral.agent.config_kubernetes import Kubernetes
from coral.agent.config_units import Duration
from coral.agent.errors import FailedPreconditionError
from coral.agent.machine.pods.node import Pods
from coral.agent.machine.pods.standing import Standings
from coral.collectors import selectors
from tests.pods import ApiServer, FakePod, as_api, runtime
from tests.support import wait_until

SELECTOR = selectors.parse("pods", "shop?app=web")


def words(standings: Standings) -> dict[str, tuple[bool, str]]:
    return {state.name: (state.used, state.detail) for state in standings.states()}


def test_facts_count_for_a_while_after_the_last_answer() -> None:
    now = [100.0]
    standings = Standings(60, lambda: now[0])
    assert not standings.knows_names
    standings.failed("cri", "there is no socket")
    assert words(standings)["cri"] == (False, "there is no socket")
    assert standings.stale_s == {}
    standings.answered("api", "at https://api")
    assert words(standings)["api"] == (True, "at https://api")
    now[0] += 1_000  # nothing has changed in the cluster
    assert standings.knows_names
    standings.alive("api")
    standings.failed("api", "connection refused")
    now[0] += 60
    assert standings.stale_s == {"api": 60}
    assert words(standings)["api"] == (
        True, "at https://api, stale: what it said 60 s ago counts; connection refused"
    )  # fmt: skip
    (note,) = standings.notes()
    assert note == (
        "the source api has not answered for 60 s: pods are those that it knew then; connection "
        "refused"
    )
    standings.alive("api")  # is not an answer while it fails
    now[0] += 1
    assert not standings.knows_names
    assert words(standings)["api"] == (
        False, "at https://api, stale: what it said 61 s ago no longer counts; connection refused"
    )  # fmt: skip
    assert list(standings.notes()) == []
    standings.answered("api", "at https://api")
    assert standings.knows_names
    assert standings.stale_s == {"api": 0}


def test_a_selector_is_told_of_a_source_that_is_gone_and_later_refused(tmp_path: Path) -> None:
    pod = FakePod(tmp_path, "shop", "web-1", {"app": "web"})
    with ApiServer() as server:
        server.items = [as_api(pod)]
        given = {"cri": "off", "api": server.url, "node": "node-1"}
        patient, strict = (
            Pods(Kubernetes(**given, stale_after=Duration(seconds)))  # type: ignore[arg-type]
            for seconds in (300, 0.001)
        )
        for pods in (patient, strict):
            assert len(pods.target(SELECTOR, bpf.probe()).notes) == 1  # no pod of it runs here
    told = patient.target(SELECTOR, bpf.probe()).notes[0]
    assert told.startswith("the source api has not answered for 0 s: pods are those that it knew")
    assert dict(patient.stale_s).keys() == {"api"}
    with pytest.raises(FailedPreconditionError, match=r"api: .* stale: .* no longer counts; http"):
        strict.target(SELECTOR, bpf.probe())


def labels(pods: Pods) -> list[dict[str, str]]:
    return [dict(it.pod.labels) for it in pods.listing()]


def test_what_a_silent_source_said_does_not_stand_against_one_that_answers(tmp_path: Path) -> None:
    before = FakePod(tmp_path, "shop", "web-1", {"app": "web"})
    now = replace(before, labels={"app": "db"})
    with runtime(tmp_path) as cri:
        cri.pods = [now]
        with ApiServer() as server:
            server.items = [as_api(before)]
            given = {"cri": str(cri.socket), "api": server.url, "node": "node-1"}
            patient, strict = (
                Pods(Kubernetes(**given, stale_after=Duration(seconds)))  # type: ignore[arg-type]
                for seconds in (300, 0.001)
            )
            assert labels(patient) == labels(strict) == [{"app": "web"}]  # the API knows most
        assert labels(patient) == [{"app": "web"}]
        wait_until(lambda: labels(strict) == [{"app": "db"}])
