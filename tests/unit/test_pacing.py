"""When single events are drained: soon, in time, and seldom."""

from __future__ import annotations

import pytest

from coral.collectors.pacing import (
    EARLY_S,
    LONG_GAP_S,
    MANY,
    POLL_S,
    SHORT_GAP_S,
    SHORTEST_GAP_S,
    EventPace,
)

TICK_S = 1.0


def run(
    arrivals: list[float], until: float, *, polls: bool = False, took_s: float = 0.0
) -> tuple[list[float], int]:
    """Drains events that come at ARRIVALS, with a kernel that wakes a reader at rest, or none; each
    drain has taken TOOK_S. How long each event waited, and how many drains there were."""
    pace, now, drains, delays, left = EventPace(0.0, TICK_S, polls=polls), 0.0, 0, [], [*arrivals]
    while now < until:
        ready = [at for at in left if at <= now]
        if pace.should_drain(now, pending=bool(ready), filling=False):
            delays += [now - at for at in ready]
            left = left[len(ready) :]
            drains += 1
            pace.drained(now - took_s, now, len(ready), more=False)
        due = pace.due(now)
        assert due > now
        wakes = [at for at in left if at > now] if pace.rests(now) and not polls else []
        now = min([due, *wakes])
    return delays, drains


def test_an_idle_session_is_drained_once_a_tick() -> None:
    assert run([], 10.5) == ([], 10)
    assert run([], 10.5, polls=True) == ([], 10)


def test_an_event_after_a_pause_is_drained_at_once() -> None:
    delays, drains = run([0.5 + n for n in range(8)], 8)
    assert max(delays) == 0
    assert drains == 8
    delays, _ = run([0.5 + n for n in range(8)], 8, polls=True)
    assert max(delays) <= POLL_S


@pytest.mark.parametrize("polls", [True, False])
@pytest.mark.parametrize(
    ("took_s", "gap_s"), [(0.0001, SHORTEST_GAP_S), (0.0009, 0.0054), (0.002, SHORT_GAP_S)]
)
def test_few_events_gather_for_longer_the_more_a_drain_costs(
    took_s: float, gap_s: float, *, polls: bool
) -> None:
    few = [n / 1_000 for n in range(2_000)]
    delays, drains = run(few, 2.1, polls=polls, took_s=took_s)
    assert len(delays) == 2_000
    assert sorted(delays)[1_000] <= (gap_s + EARLY_S) / 2
    assert max(delays[1:]) <= SHORT_GAP_S + EARLY_S
    assert max(delays[100:]) <= gap_s + EARLY_S
    assert 2 / (gap_s + EARLY_S) - 10 <= drains <= 2 / gap_s + 10


def test_one_drain_that_is_interrupted_makes_few_wait() -> None:
    pace = EventPace(0.0, TICK_S, polls=False)
    for _ in range(10):
        pace.drained(0.0, 0.0001, 1, more=False)
    pace.drained(0.0, 0.1, 1, more=False)  # by others on this CPU
    pace.drained(0.1, 0.1001, MANY, more=False)  # of another sort
    for _ in range(10):
        pace.drained(0.2, 0.2001, 1, more=False)
    assert pace.due(0.2001) == pytest.approx(0.2001 + SHORTEST_GAP_S)


@pytest.mark.parametrize("polls", [True, False])
def test_many_events_gather_for_the_long_gap(*, polls: bool) -> None:
    many = [n / 60_000 for n in range(120_000)]
    delays, drains = run(many, 2.1, polls=polls)
    assert len(delays) == 120_000
    assert max(delays) <= LONG_GAP_S + EARLY_S
    assert drains <= 2 / LONG_GAP_S + 10


def test_a_buffer_that_fills_up_is_drained_before_the_gap_is_over() -> None:
    pace = EventPace(0.0, TICK_S, polls=False)
    pace.drained(0.0, 0.0, MANY, more=False)
    assert not pace.should_drain(0.001, pending=True, filling=False)
    assert pace.should_drain(0.001, pending=True, filling=True)
    pace.drained(0.001, 0.001, 0, more=True)  # the first record is still being written
    assert not pace.should_drain(0.001, pending=True, filling=True)
    assert pace.due(0.001) > 0.001
    assert pace.should_drain(0.001 + SHORT_GAP_S, pending=True, filling=True)


def test_what_one_drain_may_not_take_is_drained_next() -> None:
    pace = EventPace(0.0, TICK_S, polls=False)
    pace.drained(0.0, 0.0, 10_000, more=True)
    assert pace.should_drain(0.0, pending=True, filling=False)
