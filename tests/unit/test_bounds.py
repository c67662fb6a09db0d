"""Bounds that are seldom reached: the longest pause between attempts, what an idle reader saves up,
and on which side of its bound a histogram counts a value."""

from __future__ import annotations

import numpy as np
import pytest

from coral.agent.sessions import continuous
from coral.client import Retry
from coral.client.backoff import Backoff
from coral.collectors.tcp_metrics import measures


def test_pauses_of_a_continuous_collector_double_up_to_a_minute() -> None:
    backoff = continuous.Backoff()
    pauses_s = [backoff.pause_s() for _ in range(12)]
    for pause_s, nominal_s in zip(pauses_s, [1, 2, 4, 8, 16, 32, *[60] * 6], strict=True):
        assert 0.75 * nominal_s <= pause_s <= 1.25 * nominal_s
    backoff.succeeded()
    assert backoff.pause_s() <= 1.25


def test_delays_of_a_client_double_up_to_the_longest() -> None:
    retry = Retry(patience_s=1_000, first_delay_s=0.5, max_delay_s=3)
    backoff = Backoff(retry, jitter=lambda: 1)
    assert [backoff.delay_s(0) for _ in range(6)] == [0.5, 1, 2, 3, 3, 3]


def test_a_delay_of_a_client_ends_with_its_patience() -> None:
    backoff = Backoff(Retry(patience_s=10, first_delay_s=8, max_delay_s=60), jitter=lambda: 1)
    assert backoff.delay_s(0) == 8
    assert backoff.delay_s(8) == 2
    assert backoff.delay_s(10) is None


@pytest.mark.parametrize(
    ("value_us", "bucket"), [(9.999, 0), (10, 0), (10.001, 1), (20, 1), (20.001, 2)]
)
def test_a_value_on_a_bound_of_a_histogram_is_within_it(value_us: float, bucket: int) -> None:
    """`le` of Prometheus: less than or equal."""
    histogram = np.zeros((1, 4), np.uint64)
    value_ns = np.array([round(value_us * 1e3)], np.uint64)
    measures._observe(histogram, np.zeros(1, np.intp), value_ns, (10.0, 20.0))
    assert histogram[0, :3].tolist() == [number == bucket for number in range(3)]
    assert histogram[0, 3] == value_ns[0]
