"""What the parser of http_latency says of an exchange besides its request line and status."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.http_parser import (
    CHUNKED,
    GET,
    GOT_OK,
    OK,
    PATH_BYTES,
    PATH_CUT,
    PATH_QUERIED,
    PIPELINE,
    Answer,
    Exchange,
    Outcome,
    Part,
    Seen,
    Talk,
    Unread,
    answer,
    ask,
    ok,
    post,
)

COMPLETE, UNKNOWN = Outcome.COMPLETE, Outcome.UNKNOWN


def only(parts: Sequence[Part], *, by_server: bool | None = None) -> Exchange:
    talk = Talk()
    for part in parts:
        talk.feed(part)
    if by_server is not None:
        talk.end(by_server=by_server)
    (one,) = talk.answer().exchanges
    return one


def times(one: Exchange) -> tuple[int, int, int, int]:
    return one.began, one.asked, one.first, one.ended


def test_the_times_are_those_of_first_and_last_bytes() -> None:
    asked, answered = post(b"Content-Length: 2", body=b"hi").content, OK
    parts = [ask(b"\r\n"), *(ask(asked[i : i + 1]) for i in range(len(asked)))]
    parts += [answer(answered[i : i + 1]) for i in range(len(answered))]
    begun, whole = 2, 1 + len(asked)
    assert times(only(parts)) == (begun, whole, whole + 1, whole + len(answered))


def test_interim_answers_are_not_the_first_byte() -> None:
    early = answer(b"HTTP/1.1 103 Early Hints\r\n\r\n")
    assert times(only([ask(GET), early, early, answer(OK[:1]), answer(OK[1:])])) == (1, 1, 4, 5)


def test_a_request_that_was_answered_early_has_no_last_byte() -> None:
    parts = [post(b"Content-Length: 2", body=b"h"), answer(OK), ask(b"i")]
    assert times(only(parts)) == (1, 0, 2, 2)
    assert times(only([ask(GET[:-2]), answer(OK), ask(b"\r\n")])) == (1, 0, 2, 2)


def test_an_answer_whose_hook_ran_first_took_no_time() -> None:
    assert times(only([answer(OK), ask(GET[:5]), ask(GET[5:])])) == (2, 3, 2, 3)


def test_an_answer_that_ends_with_the_connection_ended_with_its_last_byte() -> None:
    parts = [ask(GET), answer(b"HTTP/1.0 200 OK\r\n\r\n"), answer(b"ab")]
    assert times(only(parts, by_server=True)) == (1, 1, 2, 3)


def fnv_1a(characters: bytes) -> int:
    value = 0xCBF29CE484222325
    for character in characters:
        value = (value ^ character) * 0x100000001B3 % (1 << 64)
    return value


@pytest.mark.parametrize("length", [1, PATH_BYTES, PATH_BYTES + 1, 5000])
def test_a_path_is_told_apart_by_all_of_it(length: int) -> None:
    path = b"/" + b"x" * (length - 1)
    one = only([ask(b"GET " + path + b"?query HTTP/1.1\r\n\r\n"), answer(OK)])
    assert (one.path, one.path_hash) == (path[:PATH_BYTES], fnv_1a(path))
    assert one.path_flags == PATH_QUERIED | (PATH_CUT if length > PATH_BYTES else 0)


def test_a_path_that_was_answered_before_its_end_is_marked() -> None:
    assert only([ask(b"GET /long"), answer(OK)]).path_flags == PATH_CUT
    assert only([ask(b"GET /long "), answer(OK)]).path_flags == 0
    assert only([ask(b"GET /long?que"), answer(OK)]).path_flags == PATH_QUERIED


@pytest.mark.parametrize("version", [0, 1])
def test_the_version_is_the_requests(version: int) -> None:
    assert only([ask(b"GET / HTTP/1.%d\r\n\r\n" % version), answer(OK)]).version == version


def test_bytes_of_bodies_count_although_nobody_sees_them() -> None:
    talk = Talk()
    talk.feed(post(b"Content-Length: 1000000000000"))
    talk.unseen(1_000_000_000_000, is_request=True)
    talk.feed(ok(CHUNKED, body=b"64\r\nseen"))
    talk.unseen(96, is_request=False)
    talk.feed(answer(b"\r\n0\r\n\r\n"))
    (one,) = talk.answer().exchanges
    assert Seen.of(one) == Seen("POST", b"/p", 200, COMPLETE, 1_000_000_000_000, 100)


@pytest.mark.parametrize(("head", "length"), [(b"GET ", 1), (b"", 1), (GET, 1), (GET, 100)])
def test_bytes_of_heads_that_nobody_sees_lose_track(head: bytes, length: int) -> None:
    talk = Talk()
    talk.feed(ask(head))
    talk.unseen(length, is_request=True)
    talk.feed(answer(OK))
    found = talk.answer()
    assert [(one.status, one.outcome) for one in found.exchanges] == (
        [(0, UNKNOWN)] if head == GET else []
    )
    assert found.unread is Unread.JOINED


def test_what_was_on_trial_is_an_exchange_once_it_is_answered() -> None:
    talk = Talk(on_trial=True)
    talk.feed(ask(GET + GET))
    talk.feed(answer(OK + OK))
    assert [Seen.of(one) for one in talk.answer().exchanges] == [GOT_OK, GOT_OK]


@pytest.mark.parametrize("after", [answer(b"hello\r\n"), ask(b"\0"), answer(b"HTTP/1.1 2x")])
def test_what_was_on_trial_is_none_where_something_else_follows(after: Part) -> None:
    talk = Talk(on_trial=True)
    talk.feed(ask(GET + GET + GET))
    talk.feed(after)
    talk.end(by_server=True)
    assert talk.answer()[:2] == ((), Unread.JOINED)


# Many that wait


def pipelined(count: int) -> list[Part]:
    """COUNT requests in one part, and their responses in another one; every third is HEAD."""
    methods = [b"HEAD" if i % 3 == 0 else b"GET" for i in range(count)]
    return [
        ask(b"".join(b"%b /%d HTTP/1.1\r\n\r\n" % (m, i) for i, m in enumerate(methods))),
        answer(b"".join(OK[:-2] if method == b"HEAD" else OK for method in methods)),
    ]


def talked(parts: Sequence[Part], most_bytes: int) -> Answer:
    talk = Talk()
    talk.feed_all(parts, most_bytes)
    return talk.answer()


@pytest.mark.parametrize("most_bytes", [0, 1, 50, 700])
@pytest.mark.parametrize("count", [3, 100, PIPELINE])
def test_pipelined_requests_keep_their_order_and_their_paths(count: int, most_bytes: int) -> None:
    found = talked([*pipelined(count), ask(GET), answer(OK)], most_bytes)
    assert [Seen.of(one) for one in found.exchanges[:-1]] == [
        Seen("GET" if i % 3 else "HEAD", b"/%d" % i, 200, response_body_bytes=2 if i % 3 else 0)
        for i in range(count)
    ]
    assert found.exchanges[-1][:3] == ("GET", b"/a", 200)
    assert found.unread is Unread.NONE


@pytest.mark.parametrize("most_bytes", [0, 1, 50, 700])
def test_more_requests_than_are_kept_are_unknown_and_nothing_after_them_is_read(
    most_bytes: int,
) -> None:
    found = talked([*pipelined(PIPELINE + 1), ask(GET), answer(OK)], most_bytes)
    assert {(one.status, one.outcome) for one in found.exchanges} == {(0, UNKNOWN)}
    assert [one.path for one in found.exchanges] == [b"/%d" % i for i in range(PIPELINE)]
    assert found.unread is Unread.BEHIND


def test_many_on_trial_are_none_where_something_else_follows() -> None:
    talk = Talk(on_trial=True)
    talk.feed(pipelined(PIPELINE)[0])
    talk.feed(answer(b"hello\r\n"))
    assert talk.answer()[:2] == ((), Unread.JOINED)
