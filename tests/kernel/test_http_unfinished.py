"""Requests that are in progress when a session ends: reported once, with what is known, and with
nothing else."""

from __future__ import annotations

import time

import pytest

from coral import bpf
from coral.collectors.contract import Batch, EventRows, Summaries, Unread
from coral.collectors.http_latency.collector import HttpLatencyCollector
from coral.mesh.v1 import ebpf_pb2 as pb
from tests.http_seen import CLIENT, COMPLETE, SERVER, Request, Seen
from tests.support import Puppet, RunningAgent, at_work, watching

pytestmark = pytest.mark.usefixtures("http_supported", "nothing_left")

IN_PROGRESS = pb.HTTP_OUTCOME_IN_PROGRESS


def create(puppet: Puppet, **config: str) -> HttpLatencyCollector:
    config = {"pid": str(puppet.pid), "tls": "false", "mode": "events", **config}
    return HttpLatencyCollector.create(config, None, bpf.probe())


def ended(collector: HttpLatencyCollector) -> tuple[list[Request], Batch]:
    """The requests of the last batch of a session, which ends now."""
    collector.bpf_object.detach()
    batch = collector.drain()
    seen = Seen(collector)
    seen.add(batch)
    assert not seen.lost
    assert not len(collector.drain().rows)
    return seen.requests, batch


def test_a_request_that_waits_has_a_start_and_no_status_and_no_end(both_ends: Puppet) -> None:
    with at_work(create(both_ends)) as collector:
        before_ns = time.time_ns()
        both_ends.do(r"ask(b'POST /slow HTTP/1.1\r\nContent-Length: 100\r\n\r\n' + bytes(40))")
        after_ns = time.time_ns()
        requests, batch = ended(collector)
    assert {each.role for each in requests} == {CLIENT, SERVER}
    for each in requests:
        assert each.exchange == ("POST", "/slow", 0, 40, 0)
        assert (each.outcome, each.duration_ns) == (IN_PROGRESS, 0)
        assert (each.request_ns, each.first_byte_ns, each.number) == (0, 0, 0)
        assert before_ns - 10**7 <= each.time_ns <= after_ns + 10**7
        assert each.pid == both_ends.pid
    assert batch.unread["in_progress"] == Unread(2, 80)


def test_a_response_that_has_begun_has_its_status_and_its_first_byte(both_ends: Puppet) -> None:
    with at_work(create(both_ends)) as collector:
        both_ends.do(r"ask(b'GET /a HTTP/1.1\r\n\r\n')")
        both_ends.do(r"answer(b'HTTP/1.1 204 No Content\r\n\r\n')")
        both_ends.do(r"ask(b'GET /b HTTP/1.1\r\n\r\n')")
        both_ends.do(r"answer(b'HTTP/1.1 503 Busy\r\nContent-Length: 100\r\n\r\n' + bytes(30))")
        requests, batch = ended(collector)
    for role in (CLIENT, SERVER):
        first, second = (each for each in requests if each.role == role)
        assert (first.exchange, first.outcome) == (("GET", "/a", 204, 0, 0), COMPLETE)
        assert (second.exchange, second.outcome) == (("GET", "/b", 503, 0, 30), IN_PROGRESS)
        assert 0 < second.first_byte_ns < 10**9
        assert (second.duration_ns, second.number) == (0, 1)
    assert batch.unread["in_progress"] == Unread(2, 60)


def test_of_pipelined_requests_each_that_waits_is_told_once(both_ends: Puppet) -> None:
    heads = b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % n for n in range(20))
    with at_work(create(both_ends)) as collector:
        both_ends.do(f"ask({heads!r})")
        both_ends.do(r"answer(b'HTTP/1.1 204 No Content\r\n\r\n' * 5)")
        requests, batch = ended(collector)
    for role in (CLIENT, SERVER):
        own = sorted((each for each in requests if each.role == role), key=lambda it: it.number)
        assert [each.path for each in own] == [f"/{n}" for n in range(20)]
        assert [each.outcome for each in own] == [COMPLETE] * 5 + [IN_PROGRESS] * 15
        assert {each.status for each in own[5:]} == {0}
    assert batch.unread["in_progress"].count == 30


def test_what_is_not_known_to_be_a_request_is_not_told(both_ends: Puppet) -> None:
    both_ends.do(r"ask(b'x')")
    with at_work(create(both_ends)) as collector:
        both_ends.do(r"ask(b'GET /on-trial HTTP/1.1\r\n\r\n')")
        both_ends.do("connect()")
        both_ends.do(r"ask(b'GET /half HTTP/1.1\r\nHost')")
        requests, batch = ended(collector)
    assert not requests
    assert "in_progress" not in batch.unread


def test_only_the_session_that_watched_a_request_tells_it(both_ends: Puppet) -> None:
    with at_work(create(both_ends)) as first:
        both_ends.do(r"ask(b'GET /early HTTP/1.1\r\n\r\n')")
        with at_work(create(both_ends)) as second:
            both_ends.do("connect()")
            both_ends.do(r"ask(b'GET /late HTTP/1.1\r\n\r\n')")
            assert {each.path for each in ended(second)[0]} == {"/late"}
        requests = ended(first)[0]
        assert {(each.path, each.outcome) for each in requests} == {
            ("/early", IN_PROGRESS),
            ("/late", IN_PROGRESS),
        }


def test_filters_know_how_long_it_took_so_far(both_ends: Puppet) -> None:
    with (
        at_work(create(both_ends, min_duration="1s")) as slow,
        at_work(create(both_ends, errors_only="true")) as failed,
    ):
        both_ends.do(r"ask(b'GET /old HTTP/1.1\r\n\r\n')")
        both_ends.do("import time; time.sleep(1); connect()")
        both_ends.do(r"ask(b'GET /new HTTP/1.1\r\n\r\n')")
        requests, batch = ended(slow)
        assert {each.path for each in requests} == {"/old"}
        assert batch.unread["in_progress"].count == 4
        assert not ended(failed)[0]


def test_details_are_told_where_they_are_wanted(both_ends: Puppet) -> None:
    head = b"GET /a?b=c HTTP/1.1\r\nHost: h\r\ntraceparent: 00-%032x-%016x-01\r\n\r\n" % (5, 6)
    options = {"include_query": "true", "include_host": "true", "traceparent": "true"}
    with at_work(create(both_ends, **options)) as all_of_it, at_work(create(both_ends)) as plain:
        both_ends.do(f"ask({head!r})")
        for each in ended(all_of_it)[0]:
            assert (each.path, each.query, each.host) == ("/a", "b=c", "h")
            assert (each.trace_id, each.parent_span_id) == (f"{5:032x}", f"{6:016x}")
        assert {(each.path, each.query, each.host) for each in ended(plain)[0]} == {("/a", "", "")}


def test_summaries_count_what_is_in_progress_and_add_it_to_no_time(both_ends: Puppet) -> None:
    with at_work(create(both_ends, mode="summaries")) as collector:
        both_ends.do(r"ask(b'GET /a HTTP/1.1\r\n\r\n')")
        both_ends.do(r"answer(b'HTTP/1.1 204 No Content\r\n\r\n')")
        both_ends.do(r"ask(b'GET /b HTTP/1.1\r\n\r\n')")
        collector.bpf_object.detach()
        batch = collector.drain()
        assert isinstance(batch.rows, Summaries)
        assert {row.route for row in batch.rows.as_messages()} == {"/a"}  # type: ignore[attr-defined]
        assert batch.unread["in_progress"] == Unread(2, 0)
        assert "in_progress" not in collector.drain().unread


def test_many_drains_at_the_end_tell_each_request_once(both_ends: Puppet) -> None:
    count = 6000
    with at_work(create(both_ends, ring="16MiB")) as collector:
        code = (
            rf"for n in range({count}):"
            r" ask(b'GET /%d HTTP/1.1\r\n\r\n' % n); answer(b'HTTP/1.1 204 No Content\r\n\r\n')"
        )
        both_ends.do(f"exec({code!r})")
        both_ends.do(r"ask(b'GET /last HTTP/1.1\r\n\r\n')")
        collector.bpf_object.detach()
        outcomes: list[int] = []
        told = 0
        while (collector.records and collector.records.pending_bytes) or not outcomes:
            batch = collector.drain()
            assert isinstance(batch.rows, EventRows)
            outcomes += batch.rows.records["outcome"].tolist()
            told += batch.unread.get("in_progress", Unread(0, 0)).count
        assert outcomes.count(COMPLETE) == 2 * count
        assert (outcomes.count(IN_PROGRESS), told) == (2, 2)


@pytest.mark.parametrize("mode", ["events", "summaries"])
def test_the_last_batches_of_a_stream_tell_what_is_in_progress(
    agent: RunningAgent, both_ends: Puppet, mode: str
) -> None:
    config = {"pid": str(both_ends.pid), "tls": "false", "mode": mode}
    with watching(agent, 60.0, "shop", pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY, **config) as watch:
        both_ends.do(r"ask(b'GET /quick HTTP/1.1\r\n\r\n')")
        both_ends.do(r"answer(b'HTTP/1.1 204 No Content\r\n\r\n')")
        both_ends.do(r"ask(b'GET /slow HTTP/1.1\r\n\r\n')")
        watch.stop()
    ends = [
        (batch.strings[row.path], row.outcome, row.status, row.duration_ns > 0)
        for batch in watch.batches
        for row in batch.http_requests
    ]
    known = [("/quick", COMPLETE, 204, True), ("/slow", IN_PROGRESS, 0, False)]
    assert sorted(ends) == [each for each in known for _ in range(2 * (mode == "events"))]
    unread = {each.what: each.count for each in watch.batches[-1].unread}
    assert unread == {"in_progress": 2}
    assert watch.end
    assert watch.end.produced == watch.batches[-1].last_seq
    if mode == "summaries":
        rows = [row for batch in watch.batches for row in batch.http_latency]
        assert {row.route for row in rows} == {"/quick"}
        assert sum(row.count for row in rows) == 2
