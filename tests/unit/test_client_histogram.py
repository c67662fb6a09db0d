"""Histograms of summaries, whether they came as messages or as columns."""

from __future__ import annotations

import numpy as np
import pytest

from coral.client import Histogram
from coral.mesh.v1 import ebpf_pb2 as pb


def test_rows_and_columns_of_the_same_counts_give_the_same_histogram() -> None:
    by_rows, by_columns = Histogram(), Histogram()
    columns = np.array([[0, 4, 0, 1], [2, 0, 3, 0]], np.uint64)
    for counts, max_ns in zip(columns, (15_000, 9_000), strict=True):
        sent = np.trim_zeros(counts, "b").tolist()
        by_rows.add(pb.Log2Histogram(first_exponent=10, slots=4, counts=sent), max_ns)
    by_columns.add_counts(10, columns.sum(axis=0, dtype=np.uint64), 15_000)
    assert by_rows.counts.tolist() == by_columns.counts.tolist() == [2, 4, 3, 1]
    assert by_rows.count == 10
    assert by_rows.max_ns == by_columns.max_ns == 15_000
    for q in (0.0, 0.2, 0.5, 0.9, 1.0):
        assert by_rows.quantile_ns(q) == by_columns.quantile_ns(q)


def test_a_quantile_lies_in_the_slot_of_its_value() -> None:
    histogram = Histogram()
    histogram.add_counts(10, np.array([0, 0, 10, 0, 10], np.uint64), 20_000)
    assert [histogram.quantile_ns(q) for q in (0.0, 0.25, 0.5, 1.0)] == [4096, 6144, 8192, 20_000]
    assert Histogram().quantile_ns(0.5) == 0


def test_an_empty_row_changes_nothing_and_other_slots_are_refused() -> None:
    histogram = Histogram()
    histogram.add_counts(10, np.array([1, 2], np.uint64), 3_000)
    histogram.add(pb.Log2Histogram(), 0)
    assert (histogram.first_exponent, histogram.counts.tolist()) == (10, [1, 2])
    with pytest.raises(ValueError, match="cannot be added up"):
        histogram.add_counts(9, np.array([1], np.uint64), 600)
