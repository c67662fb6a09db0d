"""The reader's books: exact over any number of calls, and they notice an agent's wrong numbers.
When to try again."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.client import Batch, ContractError, Retry
from coral.client.account import Ledger
from coral.client.backoff import Backoff
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.peer import Session, batch

FATES = st.sampled_from(["", "", "", "filtered", "rate_limit", "subscriber_queue"])


def read(message: pb.EbpfEventBatch) -> Batch:
    return Batch.parse(message.SerializeToString())


@given(
    fates=st.lists(FATES, max_size=60),
    size=st.integers(1, 9),
    start=st.integers(0, 60),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
def test_every_number_is_accounted_for_over_any_number_of_calls(
    fates: list[str], size: int, start: int, cuts: list[int]
) -> None:
    start = min(start, len(fates))
    session = Session(fates, size, lost_in_kernel=5)
    ledger = Ledger(start)
    delivered: list[int] = []
    for cut in [*cuts, None]:
        for message in session.messages(ledger.begin_call())[:cut]:
            got = read(message)
            assert ledger.take(got)
            delivered += got.events["ended_ns"].tolist()
            account = ledger.account
            explained = account.delivered + account.filtered + sum(account.lost.values())
            assert account.last_seq - start == explained
            if got.end:
                break
        if ledger.account.last_seq == len(fates) and cut is None:
            break
    assert delivered == [n for n in range(start + 1, len(fates) + 1) if not fates[n - 1]]
    expected = Counter(fates[start:])
    filtered = expected.pop("filtered", 0)
    del expected[""]
    account = ledger.account
    assert account.produced == len(fates)
    assert (account.delivered, account.filtered) == (len(delivered), filtered)
    assert account.lost == expected
    assert account.lost_in_kernel == {"kernel_buffer": 5}


def test_a_loss_in_the_kernel_that_is_reported_again_is_not_counted_again() -> None:
    ledger = Ledger(0)
    stage = pb.Loss.STAGE_MAP_FULL
    for last, lost in ((3, 10), (6, 25)):
        message = batch(last - 2, last, range(last - 2, last + 1))
        message.lost_in_kernel.add(stage=stage, count=lost)
        ledger.take(read(message))
    ledger.begin_call()
    late = batch(7, 7, [7])
    late.lost_in_kernel.add(stage=stage, count=20)  # as it was when this batch was kept
    ledger.take(read(late))
    assert ledger.account.lost_in_kernel == {"map_full": 25}


def test_numbers_that_do_not_add_up_are_refused_with_the_figures() -> None:
    ledger = Ledger(0)
    ledger.take(read(batch(1, 5, range(1, 6))))
    told = pb.StreamAccount(filtered=1, lost=[pb.Loss(stage=pb.Loss.STAGE_RATE_LIMIT, count=1)])
    with pytest.raises(ContractError) as refused:
        ledger.take(read(batch(6, 10, [6, 7], told)))
    assert str(refused.value) == (
        "of the events 1 to 10, 9 are accounted for: 7 delivered, 1 filtered, lost: "
        "{'rate_limit': 1}"
    )


def test_an_end_before_all_is_accounted_for_is_refused() -> None:
    ledger = Ledger(0)
    end = batch(6, 5, [], pb.StreamAccount(filtered=5))
    end.end.produced = 8
    with pytest.raises(ContractError, match="after 8 events, and those after number 5 are not"):
        ledger.take(read(end))


def test_events_that_came_before_are_not_taken_again() -> None:
    ledger = Ledger(0)
    first = read(batch(1, 5, range(1, 6)))
    assert ledger.take(first)
    ledger.begin_call()
    assert not ledger.take(first)
    assert ledger.account.delivered == 5
    with pytest.raises(ContractError, match="events 4 to 8 came, and those up to number 5 had"):
        ledger.take(read(batch(4, 8, range(4, 9))))


def test_a_batch_that_only_says_where_the_stream_stands_is_taken_each_time() -> None:
    ledger = Ledger(0)
    for _ in range(3):
        assert ledger.take(read(batch(6, 5, [], pb.StreamAccount(filtered=5))))
    assert ledger.account.last_seq == 5


def longest(retry: Retry) -> Backoff:
    return Backoff(retry, jitter=lambda: 1.0)


def test_delays_double_up_to_the_greatest_and_the_jitter_is_full() -> None:
    retry = Retry(patience_s=1000, first_delay_s=0.1, max_delay_s=1.0)
    backoff = longest(retry)
    assert [backoff.delay_s(0) for _ in range(6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    shares = iter([0.0, 0.25, 0.5])
    backoff = Backoff(retry, jitter=lambda: next(shares))
    assert [backoff.delay_s(0) for _ in range(3)] == [0.0, 0.05, 0.2]


def test_patience_and_attempts_are_bounds() -> None:
    backoff = longest(Retry(patience_s=10, first_delay_s=8, max_delay_s=8))
    assert [backoff.delay_s(at) for at in (100, 105, 109, 110)] == [8, 5, 1, None]
    assert backoff.delay_s(500) == 8, "giving up ends one absence"
    backoff = longest(Retry(attempts=2))
    assert [backoff.delay_s(0) is None for _ in range(3)] == [False, False, True]
    assert longest(Retry(patience_s=0)).delay_s(0) is None


def test_an_agent_that_accepts_and_breaks_off_is_not_given_up_and_not_called_in_a_tight_loop() -> (
    None
):
    backoff = longest(Retry(patience_s=1, first_delay_s=0.1, max_delay_s=0.8))
    delays = []
    for at in range(6):
        delays.append(backoff.delay_s(at * 10))
        backoff.stands()
    assert delays == [0.1, 0.2, 0.4, 0.8, 0.8, 0.8]
    backoff.delivers()
    assert backoff.delay_s(100) == 0.1


def test_delays_stay_at_the_cap_however_long_an_agent_is_away() -> None:
    backoff = longest(Retry(patience_s=1e9, first_delay_s=0.1, max_delay_s=5.0))
    assert [backoff.delay_s(0) for _ in range(2_000)][6:] == [5.0] * 1_994
