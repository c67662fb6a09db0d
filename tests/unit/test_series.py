"""Label sets of the metrics: bounded, and the idle ones give way before `other` takes new ones."""

from __future__ import annotations

import numpy as np
import pytest

from coral.wire.series import IDLE_S, SeriesTable, le


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def one(count: int = 1) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array([count], np.uint64)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> SeriesTable[str]:
    """A table with room for `a` and `b`, which are in it."""
    table = SeriesTable(2, "other", clock)
    table.add("a", one())
    table.add("b", one())
    return table


def values(table: SeriesTable[str]) -> dict[str, int]:
    return {key: int(counters[0]) for key, counters in table.copy().items()}


def test_while_none_is_idle_new_ones_are_other(table: SeriesTable[str], clock: Clock) -> None:
    clock.now = IDLE_S - 1
    table.add("c", one(5))
    table.add("c", one(6))
    table.add("a", one())
    assert values(table) == {"a": 2, "b": 1, "other": 11}


def test_the_one_idle_longest_gives_way_and_other_does_not_jump(
    table: SeriesTable[str], clock: Clock
) -> None:
    clock.now = 1
    table.add("a", one(10))
    table.add("c", one())  # there is no room yet
    clock.now = IDLE_S + 1
    table.add("c", one(3))
    table.add("d", one(4))
    assert values(table) == {"c": 3, "d": 4, "other": 1}
    table.add("b", one(2))
    assert values(table)["other"] == 3


def test_one_that_comes_back_begins_at_zero(table: SeriesTable[str], clock: Clock) -> None:
    clock.now = IDLE_S
    table.add("c", one())
    clock.now = 2 * IDLE_S
    table.add("a", one(7))
    assert values(table)["a"] == 7


def test_rows_of_zeros_keep_nothing_alive(table: SeriesTable[str], clock: Clock) -> None:
    clock.now = IDLE_S - 1
    table.add("a", one(0))
    table.add("b", one(1))
    clock.now = IDLE_S
    table.add("c", one())
    assert values(table) == {"b": 2, "c": 1}


def test_a_copy_stays_as_it_is(table: SeriesTable[str]) -> None:
    table.add("c", one())
    copy = table.copy()
    table.add("a", one())
    table.add("c", one())
    assert {key: int(counters[0]) for key, counters in copy.items()} == {"a": 1, "b": 1, "other": 1}


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        (0.001, "0.001"),
        (1, "1.0"),
        (3600, "3600.0"),
        (2**8 / 1e9, "2.56e-07"),
        (2**16 / 1e9, "6.5536e-05"),
        (2**34 / 1e9, "17.179869184"),
        (float("inf"), "+Inf"),
    ],
)
def test_upper_bounds_are_canonical(bound: float, text: str) -> None:
    assert le(bound) == text
