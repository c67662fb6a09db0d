"""On which side of its bound a histogram counts a value."""

from __future__ import annotations

import numpy as np
import pytest

from coral.collectors.tcp_metrics import measures


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
