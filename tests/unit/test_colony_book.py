"""How batches become deliveries: every event is in exactly one of them, over cut streams, restarted
colonies and agents that die."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.client import Batch, CollectorInfo, ContractError
from coral.client.account import Ledger
from coral.colony.delivery import AGENT_LOST, Delivery, Standing
from coral.colony.follow.book import Book, session_of
from coral.colony.follow.books import Books
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.colony import Shelf
from tests.peer import Session, batch

STATS: Final = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
SECOND_NS: Final = 1_000_000_000
DAY_NS: Final = 86_400 * SECOND_NS
YEAR_NS: Final = 365 * DAY_NS


def info(collector_id: str = "one", produced: int = 0, *, ended: bool = False) -> CollectorInfo:
    message = pb.CollectorInfo(collector_id=collector_id, kind=STATS, produced=produced)
    if ended:
        message.end.reason = pb.SessionEnd.REASON_STOPPED
        message.end.produced = produced
    return CollectorInfo.of(message)


def lost(filtered: int = 0, /, **counts: int) -> pb.StreamAccount:
    account = pb.StreamAccount(filtered=filtered)
    for stage, count in counts.items():
        account.lost.add(stage=pb.Loss.Stage.Value(f"STAGE_{stage.upper()}"), count=count)
    return account


def read(book: Book, messages: list[pb.EbpfEventBatch], now_ns: int = 1) -> list[Delivery]:
    """What BOOK makes of a stream that begins where it is."""
    ledger = Ledger(book.begin_stream())
    deliveries = []
    for message in messages:
        wire = message.SerializeToString()
        parsed = Batch.parse(wire)
        if ledger.take(parsed) and (
            delivery := book.take(parsed, ledger.account, len(wire), now_ns)
        ):
            deliveries.append(delivery)
    return deliveries


@given(
    fates=st.lists(st.sampled_from(["", "", "subscriber_queue", "replay_evicted", "rate_limit"])),
    cuts=st.lists(st.integers(0, 5), max_size=6),
    restarts=st.sets(st.integers(0, 5)),
)
def test_every_event_is_in_one_delivery_however_streams_are_cut_and_colonies_restarted(
    fates: list[str], cuts: list[int], restarts: set[int]
) -> None:
    session, shelf = Session(fates, batch=3, lost_in_kernel=4), Shelf()
    book = Book(session_of("agent", info()))
    for number, length in enumerate([*cuts, 1_000]):
        for delivery in read(book, session.messages(book.last_seq)[:length]):
            shelf.put(delivery)
        if number in restarts:
            standing = shelf.of("one")
            book = Book(standing.session if standing else session_of("agent", info()), standing)
        if book.ended:
            break
    standing = shelf.of("one")
    assert standing
    assert standing.ended
    assert standing.ended.reason == "expired"
    assert standing.produced == len(fates) == standing.last_seq
    assert standing.stored == sum(not fate for fate in fates)
    assert standing.lost == {fate: fates.count(fate) for fate in set(fates) if fate}
    assert standing.lost_in_kernel == {"kernel_buffer": 4}


def test_a_batch_without_news_is_told_every_ten_seconds() -> None:
    book = Book(session_of("agent", info()))
    (first,) = read(book, [batch(1, 3, (1, 2, 3))], SECOND_NS)
    assert (first.after_seq, first.last_seq, first.rows) == (0, 3, 3)
    idle = batch(4, 3, ())
    assert read(book, [idle], 5 * SECOND_NS) == []
    (told,) = read(book, [idle], 11 * SECOND_NS)
    assert (told.after_seq, told.last_seq, told.rows, told.batch) == (3, 3, 0, None)
    assert read(book, [idle], 12 * SECOND_NS) == []


def test_what_is_lost_without_a_row_is_told_at_once() -> None:
    book = Book(session_of("agent", info()))
    (told,) = read(book, [batch(1, 9, (), lost(subscriber_queue=9))])
    assert (told.rows, told.lost) == (0, {"subscriber_queue": 9})


def test_the_pods_of_a_session_are_those_that_its_batches_name_last() -> None:
    book = Book(session_of("agent", info()))
    message = batch(1, 1, (1,))
    message.attributes["k8s.pod.name"] = "checkout-1"
    (delivery,) = read(book, [message])
    assert delivery.session.attributes == {"k8s.pod.name": "checkout-1"}


def test_events_that_an_agent_had_numbered_when_it_died_are_lost_with_it() -> None:
    books = Books("agent", lambda *_: None)
    book = books.open(info())
    assert book
    read(book, [batch(1, 5, range(1, 6))])
    assert books.open(info(produced=12)) is book
    assert books.lost({"one"}) == []
    assert books.lost({"another"}) == [book]
    last = book.close_as_lost("it died", 7)
    assert (last.after_seq, last.last_seq, last.produced) == (5, 12, 12)
    assert last.lost == {AGENT_LOST: 7}
    assert last.ended
    assert (last.ended.reason, last.ended.detail, last.ended.at_ns) == (AGENT_LOST, "it died", 7)


def test_nothing_is_lost_with_an_agent_that_had_delivered_all() -> None:
    book = Book(session_of("agent", info()))
    read(book, [batch(1, 5, range(1, 6))])
    last = book.close_as_lost("it died", 7)
    assert (last.after_seq, last.last_seq, last.lost) == (5, 5, {})


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (batch(4, 4, (), lost(1, subscriber_queue=1)), "1 events were filtered"),
        (batch(4, 1 << 63, (), lost(subscriber_queue=(1 << 63) - 2)), "cannot have"),
        (batch(4, 4, (), lost(rate_limit=2)), "fewer events are lost than before"),
    ],
)
def test_figures_that_cannot_be_leave_the_book_as_it_was(
    wrong: pb.EbpfEventBatch, problem: str
) -> None:
    book = Book(session_of("agent", info()))
    right = batch(1, 3, (1, 2), lost(subscriber_queue=1))
    with pytest.raises(ContractError, match=problem):
        read(book, [right, wrong])
    assert book.last_seq == 3
    (delivery,) = read(book, [batch(4, 6, (4, 5, 6))])
    assert (delivery.after_seq, delivery.last_seq, delivery.rows) == (3, 6, 3)


def test_what_an_agent_tells_of_its_events_is_believed_within_reason() -> None:
    book = Book(session_of("agent", info()))
    book.is_told((1 << 64) - 1)
    assert book.close_as_lost("it died", 1).last_seq == (1 << 62) - 1


def test_what_an_agent_says_of_a_session_is_kept_within_bounds() -> None:
    message = pb.CollectorInfo(collector_id="one", kind=STATS, service_name="s" * 5000)
    message.started_at.seconds = 250_000_000_000  # no int64 has so many nanoseconds
    message.config["o"] = "v" * 5000
    attributes = {f"k{number}": "v" * 5000 for number in range(1000)}
    message.attributes.update(attributes)
    book = Book(session_of("agent", CollectorInfo.of(message)))
    session = book.session
    assert (len(session.service), session.started_ns, len(session.config["o"])) == (1024, 0, 1024)
    assert (len(session.attributes), len(max(session.attributes.values()))) == (64, 1024)
    last = batch(1, 3, (1,))
    last.attributes.update({**attributes, "new": ""})
    last.account.lost.add(stage=pb.Loss.STAGE_RATE_LIMIT, count=1)
    last.account.lost.add(stage=-7, count=1)
    last.lost_in_kernel.extend(pb.Loss(stage=n, count=2) for n in (700, 701))  # type: ignore[arg-type]
    last.end.produced, last.end.detail = 3, "d" * 5000
    (delivery,) = read(book, [last])
    assert len(delivery.session.attributes) == 64
    assert delivery.lost == {"rate_limit": 1, "other": 1}
    assert delivery.lost_in_kernel == {"other": 4}
    assert delivery.ended
    assert len(delivery.ended.detail) == 1024


@pytest.mark.parametrize("off_ns", [-(1 << 63), -2 * YEAR_NS, 2 * DAY_NS, YEAR_NS])
def test_a_clock_that_cannot_be_right_does_not_say_when_a_delivery_is_from(off_ns: int) -> None:
    book, now_ns = Book(session_of("agent", info())), 60 * YEAR_NS
    wrong, right = batch(1, 1, (1,)), batch(2, 2, (2,))
    wrong.interval_end_ns = max(now_ns + off_ns, -(1 << 63))
    right.interval_end_ns = now_ns - DAY_NS
    deliveries = read(book, [wrong, right], now_ns)
    assert [it.time_ns for it in deliveries] == [now_ns, now_ns - DAY_NS]


def test_a_session_goes_on_after_what_is_durable_of_it() -> None:
    session = session_of("agent", info())
    standing = Standing(session, last_seq=40, produced=44, stored=40, updated_ns=1)
    books = Books("agent", lambda *_: None, [standing])
    book = books.open(info(produced=50))
    assert book
    assert book.begin_stream() == 40
    (delivery,) = read(book, [batch(41, 43, (41, 42, 43))])
    assert (delivery.after_seq, delivery.last_seq, delivery.produced) == (40, 43, 50)


def test_a_session_whose_end_is_known_is_not_read_again() -> None:
    shelf = Shelf()
    books = Books("agent", shelf.standing)
    book = books.open(info())
    assert book
    for delivery in read(book, Session(["", ""]).messages(0)):
        shelf.put(delivery)
    books.close(book)
    assert books.open(info(produced=2, ended=True)) is None
    assert Books("agent", shelf.standing).open(info(produced=2, ended=True)) is None


def test_a_session_that_was_given_up_and_is_at_work_goes_on() -> None:
    shelf = Shelf()
    books = Books("agent", shelf.standing)
    book = books.open(info())
    assert book
    for delivery in read(book, [batch(1, 5, range(1, 6))]):
        shelf.put(delivery)
    shelf.put(book.close_as_lost("it does not answer", 7))
    books.close(book)
    for again in (books, Books("agent", shelf.standing)):
        found = again.open(info(produced=9))
        assert found
        assert (found.last_seq, found.ended) == (5, None)
