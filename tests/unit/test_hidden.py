"""What fails while no program could see something is told apart from what fails at any time."""

from __future__ import annotations

from itertools import count

import pytest

from tests.hidden import HiddenError, failing_if_hidden


def test_a_failure_while_something_was_hidden_is_one_of_its_own() -> None:
    counts = count()
    with (
        pytest.raises(HiddenError, match="1 events") as raised,
        failing_if_hidden(lambda: next(counts)),
    ):
        raise AssertionError
    assert isinstance(raised.value.__cause__, AssertionError)


def test_a_failure_while_nothing_was_hidden_stays_what_it_is() -> None:
    with pytest.raises(AssertionError), failing_if_hidden(lambda: 5):
        raise AssertionError
