"""The store's books as answers."""

from __future__ import annotations

import pytest

from coral.colony.answers.listings import ACCOUNTS, AGENTS, SESSIONS, AskedListing, listed
from coral.colony.answers.refusals import RefusedError
from coral.colony.answers.window import MINUTE_NS, SECOND_NS, Window
from coral.colony.delivery import Away
from tests.colony_tables import PlainReads

NOW = 1_700_000_000 * SECOND_NS
WINDOW = Window(NOW - 10 * MINUTE_NS, NOW)


@pytest.fixture
def reads() -> PlainReads:
    reads = PlainReads(NOW)
    session = {"kind": "http_latency", "service": "checkout", "config": "{}"}
    reads.add(
        "ledger",
        {
            **session,
            "agent": "n1",
            "session": "s1",
            "started_ns": NOW - MINUTE_NS,
            "updated_ns": NOW,
            "last_seq": 100,
            "produced": 105,
            "stored": 90,
            "lost": 10,
            "lost_by_stage": '{"subscriber_queue":10}',
            "lost_in_kernel": '{"map_full":3}',
        },
        {
            **session,
            "agent": "n2",
            "session": "s2",
            "started_ns": NOW - 60 * MINUTE_NS,
            "lost": 0,
            "last_seq": 7,
            "produced": 7,
            "stored": 7,
            "ended_ns": NOW - 50 * MINUTE_NS,
            "ended": "expired",
            "updated_ns": NOW - 50 * MINUTE_NS,
        },
    )
    agent = {"version": "0.1.0", "kernel": "6.18", "first_seen_ns": 1, "last_seen_ns": NOW}
    reads.add(
        "agents",
        {**agent, "agent": "n1", "address": "10.0.0.1:9001", "connected": True, "detail": ""},
        {**agent, "agent": "n2", "address": "10.0.0.2:9001", "connected": False, "detail": "away"},
    )
    gap = {"agent": "n2", "why": "away"}
    reads.add(
        "gaps",
        {**gap, "time_from_ns": NOW - 20 * MINUTE_NS, "time_to_ns": NOW - 9 * MINUTE_NS},
        {**gap, "time_from_ns": NOW - MINUTE_NS, "time_to_ns": None},
    )
    return reads


def test_sessions_of_a_window(reads: PlainReads) -> None:
    table, coverage = listed(reads.con.cursor(), reads.sources(), AskedListing(SESSIONS, WINDOW))
    assert table.column("session").to_pylist() == ["s1"]
    assert coverage.rows == 1
    longer = Window(NOW - 55 * MINUTE_NS, NOW)
    table, _ = listed(reads.con.cursor(), reads.sources(), AskedListing(SESSIONS, longer))
    assert table.column("ended").to_pylist() == ["", "expired"]


def test_accounts_add_up(reads: PlainReads) -> None:
    table, _ = listed(reads.con.cursor(), reads.sources(), AskedListing(ACCOUNTS, WINDOW))
    (row,) = table.to_pylist()
    assert row["produced"] == row["stored"] + row["lost"] + row["not_arrived"]
    assert (row["not_arrived"], row["unexplained"]) == (5, 0)


def test_agents_with_their_gaps_in_the_window(reads: PlainReads) -> None:
    table, coverage = listed(reads.con.cursor(), reads.sources(), AskedListing(AGENTS, WINDOW))
    away, there = table.to_pylist()
    assert (away["agent"], away["connected"], away["gaps"]) == ("n2", False, 2)
    assert away["away_ns"] == 2 * MINUTE_NS
    assert (there["agent"], there["sessions"], there["stored"], there["lost"]) == ("n1", 1, 90, 10)
    assert len(coverage.gaps) == 2
    asked = AskedListing(AGENTS, WINDOW, where={"agent": "n1"})
    table, coverage = listed(reads.con.cursor(), reads.sources(), asked)
    assert (table.num_rows, len(coverage.gaps)) == (1, 0)


def test_agents_that_were_never_reached_are_listed(reads: PlainReads) -> None:
    away = (
        Away("", "10.0.0.9:9001", NOW, "it's {refused}"),
        Away("n2", "10.0.0.2:9001", NOW, "no such host"),
    )
    asked = AskedListing(AGENTS, WINDOW)
    table, _ = listed(reads.con.cursor(), reads.sources(), asked, away)
    columns = ("agent", "address", "connected", "detail")
    assert [tuple(row[name] for name in columns) for row in table.to_pylist()] == [
        ("", "10.0.0.9:9001", False, "it's {refused}"),
        ("n2", "10.0.0.2:9001", False, "no such host"),
        ("n1", "10.0.0.1:9001", True, ""),
    ]


def test_listings_refuse_what_they_have_not() -> None:
    for asked, why in (
        (AskedListing(AGENTS, WINDOW, by=("agent",)), "by: agents are listed one by one"),
        (AskedListing(SESSIONS, WINDOW, against_ns=1), "against: sessions are not compared"),
        (AskedListing(AGENTS, WINDOW, services=("x",)), "services: agents are of no service"),
        (AskedListing(SESSIONS, WINDOW, where={"kin": "x"}), "did you mean kind?"),
    ):
        with pytest.raises(RefusedError, match=why):
            asked.checked()
