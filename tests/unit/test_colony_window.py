"""Which rows an answer is made from: the coarsest that are exact."""

from __future__ import annotations

import pytest

from coral.colony.answers.window import (
    HOUR_NS,
    MINUTE_NS,
    RAW,
    SECOND_NS,
    Kept,
    Piece,
    Window,
    planned,
)

FOREVER = 1 << 62
DAY = 24 * HOUR_NS
NOW = 100 * DAY + 12 * HOUR_NS + 34 * MINUTE_NS + 56 * SECOND_NS
KEPT = {
    RAW: Kept(NOW - 6 * HOUR_NS, FOREVER),
    "1m": Kept(NOW - 7 * DAY, NOW - 90 * SECOND_NS - NOW % MINUTE_NS + 30 * SECOND_NS),
    "1h": Kept(NOW - 90 * DAY, NOW - NOW % HOUR_NS),
}


def at(hours: int, minutes: int = 0, seconds: int = 0) -> int:
    return 100 * DAY + hours * HOUR_NS + minutes * MINUTE_NS + seconds * SECOND_NS


def parts(wanted: Window) -> list[tuple[str, int, int]]:
    return [(it.tier, it.window.from_ns, it.window.to_ns) for it in planned(wanted, KEPT).pieces]


def test_a_few_seconds_are_read_from_raw_rows() -> None:
    assert parts(Window(at(12, 30, 5), at(12, 30, 25))) == [(RAW, at(12, 30, 5), at(12, 30, 25))]


def test_whole_minutes_come_from_minutes_and_the_ends_from_raw_rows() -> None:
    assert parts(Window(at(12, 19, 56), NOW)) == [
        (RAW, at(12, 19, 56), at(12, 20)),
        ("1m", at(12, 20), at(12, 33)),
        (RAW, at(12, 33), NOW),
    ]


def test_hours_are_read_whole_with_minutes_and_raw_rows_around_them() -> None:
    assert parts(Window(at(9, 58, 30), NOW)) == [
        (RAW, at(9, 58, 30), at(9, 59)),
        ("1m", at(9, 59), at(10)),
        ("1h", at(10), at(12)),
        ("1m", at(12), at(12, 33)),
        (RAW, at(12, 33), NOW),
    ]


def test_where_raw_rows_are_gone_the_window_grows_to_whole_minutes_and_says_so() -> None:
    plan = planned(Window(at(3, 0, 30), at(3, 4, 10)), KEPT)
    assert plan.window == Window(at(3), at(3, 5))
    assert plan.pieces == (Piece("1m", Window(at(3), at(3, 5))),)
    assert plan.notes == ("the window is in whole minutes: no finer rows of that time are kept",)


def test_where_minutes_are_gone_too_the_window_grows_to_whole_hours() -> None:
    plan = planned(Window(at(3) - 30 * DAY + 1, at(4) - 30 * DAY + 1), KEPT)
    assert plan.window == Window(at(3) - 30 * DAY, at(5) - 30 * DAY)
    assert [piece.tier for piece in plan.pieces] == ["1h"]
    assert plan.notes == ("the window is in whole hours: no finer rows of that time are kept",)


def test_a_young_colony_does_not_grow_the_window() -> None:
    kept = {RAW: Kept(at(12, 30, 10), FOREVER), "1m": Kept(at(12, 30), at(12, 34))}
    plan = planned(Window(at(12, 15, 3), NOW), kept)
    assert plan.window == Window(at(12, 15, 3), NOW)
    assert plan.notes == ()
    assert plan.pieces == (
        Piece(RAW, Window(at(12, 15, 3), at(12, 30))),
        Piece("1m", Window(at(12, 30), at(12, 34))),
        Piece(RAW, Window(at(12, 34), NOW)),
    )


@pytest.mark.parametrize("length", [SECOND_NS, 7 * MINUTE_NS, 3 * HOUR_NS + 17, 10 * DAY + 5])
def test_pieces_have_neither_gaps_nor_overlaps(length: int) -> None:
    plan = planned(Window(NOW - length, NOW), KEPT)
    assert plan.pieces[0].window.from_ns == plan.window.from_ns
    assert plan.pieces[-1].window.to_ns == NOW
    for one, other in zip(plan.pieces, plan.pieces[1:], strict=False):
        assert one.window.to_ns == other.window.from_ns
