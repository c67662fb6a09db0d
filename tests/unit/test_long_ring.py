"""Long records in a ring's memory, word by word."""

from __future__ import annotations

import numpy as np

from coral.bpf.buffers.long_ring import frames_in

BUSY, DISCARDED = 1 << 31, 1 << 30


def memory(*headers: int) -> memoryview:
    """The frames of HEADERS, one after the other; the content of each is ones."""
    words = list[int]()
    for header in headers:
        length = header & (DISCARDED - 1)
        words += [header, *[1] * ((length + 7) // 8)]
    return np.array(words, np.uint64).data


def test_records_are_found_one_behind_the_other() -> None:
    found = frames_in(memory(16, 20, 8), 9)
    assert found == ([1, 4, 8], 9, 7)


def test_a_record_that_is_still_written_ends_the_search() -> None:
    assert frames_in(memory(16, 16 | BUSY, 16), 9) == ([1], 3, 0)


def test_discarded_records_are_passed_over() -> None:
    assert frames_in(memory(16, 16 | DISCARDED, 16), 9) == ([1, 7], 9, 6)


def test_a_record_that_is_not_wholly_there_is_left_unless_it_is_the_first() -> None:
    assert frames_in(memory(16, 16), 5) == ([1], 3, 0)
    assert frames_in(memory(64), 5) == ([1], 9, 0)


def test_nothing_is_found_where_there_is_nothing() -> None:
    assert frames_in(memory(16), 0) == ([], 0, 0)
