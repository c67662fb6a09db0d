"""Which requests a session's connections still wait for, from the programs' state by array."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from coral.collectors.contract import Unread
from coral.collectors.http_latency.details import Wants
from coral.collectors.http_latency.unfinished import Unfinished, is_waiting, waiting_numbers
from tests.summaries import DETAILED, EXCHANGE, exchanges

STATE = np.dtype(
    [
        ("watching", "u8"), ("generation", "u4"), ("made", "u4"), ("answered", "u4"),
        ("on_trial", "u1"),
    ]
)  # fmt: skip


def state(**fields: Any) -> NDArray[Any]:
    made = np.zeros(len(next(iter(fields.values()))), STATE)
    for name, values in fields.items():
        made[name] = values
    return made


def test_numbers_of_requests_wrap_around() -> None:
    connections = state(answered=[0, 2**32 - 2, 7], made=[2, 1, 7])
    of, numbers = waiting_numbers(connections)
    assert of.tolist() == [0, 0, 1, 1, 1]
    assert numbers.tolist() == [0, 1, 2**32 - 2, 2**32 - 1, 0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"watching": [8]}, False),
        ({"watching": [12]}, True),
        ({"made": [0]}, False),
        ({"on_trial": [1]}, False),
        ({"generation": [9]}, False),  # another session's, which had the slot before
        ({"generation": [10 + 2**31 - 1]}, True),
    ],
)
def test_only_known_requests_of_the_session_wait(fields: dict[str, Any], expected: bool) -> None:
    whole = {"watching": [4], "generation": [10], "made": [1]} | fields
    assert is_waiting(state(**whole), 4, 10).tolist() == [expected]


def test_generations_wrap_around() -> None:
    connections = state(watching=[4, 4], generation=[1, 2**32 - 2], made=[1, 1])
    assert is_waiting(connections, 4, 2**32 - 1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [EXCHANGE, DETAILED], ids=["plain", "detailed"])
def test_those_that_have_ended_after_all_are_forgotten(dtype: np.dtype[Any]) -> None:
    records = np.zeros(4, dtype)
    plain = records["exchange"] if dtype is DETAILED else records
    plain[:] = exchanges([b"/"] * 4)
    plain["connection"], plain["number"] = [5, 5, 6, 7], [0, 1, 0, 0]
    plain["request_body_bytes"] = [1, 2, 4, 8]
    unfinished = Unfinished(dtype, Wants(0))
    unfinished.records = records
    unfinished.forget(records[[1, 3]])
    unfinished.forget(records[:0])
    left, counted = unfinished.take()
    assert left.tobytes() == records[[0, 2]].tobytes()
    assert counted == Unread(2, 5)
    assert unfinished.take()[1] == Unread(0, 0)
