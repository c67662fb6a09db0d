"""Figures as people read them: three digits and the right unit, at every magnitude."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.views.text import (
    clauses,
    format_age,
    format_amount,
    format_ns,
    format_rate,
    format_share,
    wrapped,
)

NS = {
    "ns": 1.0, "µs": 1e3, "ms": 1e6, "s": 1e9,
    "min": 60e9, "h": 3600e9, "d": 86_400e9, "y": 31_557_600e9,
}  # fmt: skip
AMOUNTS = {unit: 1000.0**power for power, unit in enumerate(["", *"kMGTPEZY"])}
# Every magnitude alike: a power of ten, times up to ten.
MAGNITUDES = st.builds(lambda e, f: f * 10.0**e, st.integers(-1, 18), st.floats(1, 10))
BOUNDARIES = st.builds(
    lambda size, share: size * share,
    st.sampled_from([*NS.values(), *AMOUNTS.values()]),
    st.floats(0.9, 1.1) | st.floats(995, 1005) | st.floats(9.9, 10.1) | st.floats(99, 101),
).filter(lambda value: value < 2.0**64)
VALUES = MAGNITUDES | BOUNDARIES


def read(text: str, units: dict[str, float]) -> float:
    """The value that a reader takes from TEXT, which must have at most three digits."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(\D*)", text)
    assert match, text
    digits = match[1].replace(".", "")
    assert len(digits) <= 3, text
    if match[2] != next(iter(units)):
        assert len(digits) == 3, text
    return float(match[1]) * units[match[2]]


@given(VALUES, VALUES)
def test_a_time_has_three_digits_is_close_and_never_turns_around(one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    assert read(format_ns(smaller), NS) <= read(format_ns(larger), NS)
    assert read(format_ns(one), NS) == pytest.approx(one, rel=0.0051, abs=0.5)


@given(VALUES, VALUES)
def test_an_amount_has_three_digits_is_close_and_never_turns_around(
    one: float, other: float
) -> None:
    smaller, larger = sorted((one, other))
    assert read(format_amount(smaller), AMOUNTS) <= read(format_amount(larger), AMOUNTS)
    assert read(format_amount(one), AMOUNTS) == pytest.approx(one, rel=0.0051, abs=0.5)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        *((999.4, "999ns"), (999.7, "1.00µs"), (9_994, "9.99µs"), (9_996, "10.0µs")),
        *((99_960, "100µs"), (999_499, "999µs"), (999_600, "1.00ms"), (999.6e6, "1.00s")),
        *((999.4e9, "999s"), (1000e9, "16.7min"), (1000 * 60e9, "16.7h"), (1000 * 3600e9, "41.7d")),
        *((2.0**63, "292y"), (0.4, "0ns")),
    ],
)
def test_what_rounds_to_four_digits_takes_the_next_unit(ns: float, text: str) -> None:
    assert format_ns(ns) == text


@given(st.integers(0, 10**20), st.integers(0, 10**12))
def test_an_age_is_never_rounded_up(ns: int, more_ns: int) -> None:
    sizes = {"d": 86_400, "h": 3600, "m": 60, "s": 1, "ms": 1e-3}

    def seconds(text: str) -> float:
        parts = re.findall(r"(\d+)(ms|[dhms])", text)
        assert len(parts) <= 2
        return sum(int(number) * sizes[unit] for number, unit in parts)

    if ns >= 1_000_000:
        assert seconds(format_age(ns)) <= ns / 1e9 + 1e-9
        assert "1000ms" not in format_age(ns)
        assert seconds(format_age(ns)) <= seconds(format_age(ns + more_ns))


@pytest.mark.parametrize(
    ("count", "seconds", "text"),
    [
        *((0, 10, "0"), (1, 100, "<0.1"), (100, 12, "8.3")),
        *((99, 10, "9.9"), (996, 100, "10"), (12_345, 1, "12,345")),
    ],
)
def test_a_rate_that_is_not_zero_is_not_shown_as_zero(
    count: int, seconds: float, text: str
) -> None:
    assert format_rate(count, seconds) == text


@given(st.floats(0, 1))
def test_a_share_is_zero_only_where_it_is(share: float) -> None:
    assert (format_share(share) in ("0%", "0.0%")) == (share == 0)


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=12), max_size=20), st.integers(12, 60))
def test_lines_are_broken_between_words(words: list[str], width: int) -> None:
    lines = list(wrapped(words, width))
    assert all(len(line) <= width for line in lines)
    assert [word for line in lines for word in line.split()] == words


def test_a_word_that_is_longer_than_a_line_is_broken() -> None:
    assert list(wrapped(["see", "/sys/kernel/tracing", "here"], 8)) == [
        *("see", "/sys/ker", "nel/trac", "ing here"),
    ]
    assert list(wrapped(["日本語のサービス"], 6)) == ["日本語", "のサー", "ビス"]


def test_sentences_are_broken_after_commas_and_semicolons() -> None:
    text = "0 open, 2 opened, 0 failed; 352kB out, 352kB in"
    assert list(clauses(text, 28)) == ["0 open, 2 opened, 0 failed;", "352kB out, 352kB in"]
    assert list(clauses(text, 80)) == [text]


def test_a_clause_that_is_longer_than_a_line_is_broken_between_words() -> None:
    text = "it is in a namespace of its own: run it in the host's, or outside"
    assert list(clauses(text, 24)) == [
        *("it is in a namespace of", "its own: run it in the", "host's, or outside"),
    ]
