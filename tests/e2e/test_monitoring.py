"""The dashboards and rules for Prometheus, on a real Prometheus that scrapes a real agent."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from coral.collectors.registry import COLLECTORS
from coral.wire.kinds import kind_name
from tests.prometheus import program, prometheus
from tests.shop import port_of, shop, visitor
from tests.support import ROOT, Puppet, running_agent, wait_until

RULES: Final = ROOT / "deploy/monitoring/rules/coral.rules.yml"
NAMES: Final = {"agents", *map(kind_name, COLLECTORS)}
# Grafana puts values in the place of these.
VARIABLES: Final = {"$__rate_interval": "5s", "$instance": ".*", "$service": ".*"}
# All that dashboards have a panel for: requests of either role and of several statuses, connections
# that fail, calls that fail, time on the CPU.
KEEP_BUSY: Final = """
import socket
while True:
    visit({port}, ("GET", "/a", 0), ("POST", "/b", 9), ("GET", "/missing", 0), ("GET", "/bad", 0))
    socket.socket().connect_ex(("127.0.0.1", 1))
    sum(range(100_000))
"""


@pytest.fixture(scope="module")
def dashboards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every dashboard, by what it is of."""
    directory = tmp_path_factory.mktemp("dashboards")
    command = [
        sys.executable,
        "-W",
        "error",
        "-P",
        "deploy/monitoring/dashboards.py",
        str(directory),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return {
        path.stem.removeprefix("coral-").replace("-", "_"): json.loads(path.read_text())
        for path in directory.glob("*.json")
    }


def expressions(dashboard: dict[str, Any]) -> dict[tuple[str, str], str]:
    """What a dashboard asks, by panel and query."""
    return {
        (panel["title"], target["refId"]): target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }


def filled_in(expression: str) -> str:
    """A query as Grafana would send it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


@pytest.fixture
def busy() -> Iterator[tuple[Puppet, Puppet]]:
    """A server, and a client that keeps it busy."""
    with shop() as server, visitor() as client:
        client.begin(f"exec({KEEP_BUSY.format(port=port_of(server))!r})")
        yield server, client


@pytest.mark.usefixtures("nothing_left")
def test_every_panel_has_data_of_a_real_agent(
    dashboards: dict[str, dict[str, Any]], busy: tuple[Puppet, Puppet], tmp_path: Path
) -> None:
    pids = ",".join(str(each.pid) for each in busy)
    rules = [
        {"kind": kind_name(kind), "service": "shop", "config": {"pid": pids, "interval": "100ms"}}
        for kind in COLLECTORS
    ]
    asked = {
        (name, *of): filled_in(expression)
        for name, dashboard in dashboards.items()
        for of, expression in expressions(dashboard).items()
    }
    limits = {"continuous_cpu_percent": 400, "cpu_percent": 400}
    with (
        running_agent(tmp_path / "agent", {"continuous": rules, "limits": limits}) as agent,
        prometheus(tmp_path / "prometheus", agent) as query,
    ):
        empty = set(asked)

        def answered() -> bool:
            empty.difference_update([of for of in sorted(empty) if query(asked[of])])
            return not empty

        try:
            wait_until(answered, timeout_s=60)
        except AssertionError:
            pytest.fail(f"no data: {sorted(empty)}")
        services = query('count by (service) ({service!=""})')
    assert {one["metric"]["service"] for one in services} == {"shop"}


def test_there_is_a_dashboard_for_each_kind_and_one_for_agents(
    dashboards: dict[str, dict[str, Any]],
) -> None:
    assert dashboards.keys() == NAMES
    uids = [dashboard["uid"] for dashboard in dashboards.values()]
    assert len(set(uids)) == len(uids)
    for dashboard in dashboards.values():
        titles = [panel["title"] for panel in dashboard["panels"]]
        assert len(set(titles)) == len(titles) >= 5
        for panel in dashboard["panels"]:
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24


def test_panels_do_not_overlap(dashboards: dict[str, dict[str, Any]]) -> None:
    for dashboard in dashboards.values():
        cells = [
            (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
            for panel in dashboard["panels"]
            for x in range(panel["gridPos"]["w"])
            for y in range(panel["gridPos"]["h"])
        ]
        assert len(set(cells)) == len(cells)


def test_rules_fire_on_what_they_are_for() -> None:
    tests = RULES.with_name("coral.tests.yml")
    for command in (("check", "rules", RULES), ("test", "rules", tests)):
        ran = subprocess.run(
            [program("promtool"), *command], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
    rules = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    text = tests.read_text()
    for rule in rules:
        name = rule.get("alert") or rule["record"]
        assert re.search(rf"\b{re.escape(name)}\b", text), f"{name} has no test"


def test_every_alert_is_explained() -> None:
    rules = [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]
    alerts = [rule["alert"] for rule in rules if "alert" in rule]
    page = (ROOT / "docs/alerts.md").read_text()
    assert re.findall(r"^## (Coral\w+)$", page, re.MULTILINE) == alerts
