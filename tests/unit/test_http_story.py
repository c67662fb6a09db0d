"""What a tap of `http_latency` shows: routes, roles, both times, the slowest, and nothing that it
does not know."""

from __future__ import annotations

import re
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from coral.client import Batch, Buckets
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.http_latency import VIEW
from coral.views.http_latency.events import event_lines, records
from coral.views.http_latency.story import HttpStory
from coral.views.http_latency.words import outcome_of, request
from coral.views.pictures import filled, slot_edges, strip
from coral.views.text import times
from coral.wire.http import BOUNDS_NS
from coral.wire.text import is_printable
from tests.drawing import drawn, drawn_lines, table
from tests.requests import CLIENT, GET, POST, SERVER, START_NS, figures, requests, row, unread

ABORTED = "ABORTED by client"
MS = 1_000_000


def story_of(*batches: Batch, reached_s: float = 0.0) -> HttpStory:
    story = HttpStory()
    story.intervals.begin(START_NS)
    for batch in batches:
        story.add(batch)
    story.intervals.reach(START_NS + int(reached_s * 1e9))
    return story


def routes(lines: list[str]) -> dict[str, dict[str, str]]:
    """The table of routes among LINES."""
    at = next(number for number, line in enumerate(lines) if line.startswith("REQUEST "))
    end = next((n for n, line in enumerate(lines) if n > at and not line), len(lines))
    return table(lines[at:end])


SHOP = (
    row("/users/{id}", [2, 3, 3, 4] * 10, response_body_bytes=40_000),
    row("/users/{id}", [0.5] * 3, status=404),
    row("/basket", [20] * 4, status=201, method=POST, request_body_bytes=1200),
    row("/basket", [800], status=503, method=POST),
    row("/stock/{id}", [8] * 10, role=CLIENT, response_body_bytes=7000),
    row("/stock/{id}", [3000] * 2, role=CLIENT, status=0, outcome="aborted_by_server"),
)


def test_requests_are_rows_by_role_method_and_route() -> None:
    shown = routes(list(story_of(figures(0, 2, *SHOP)).interval_lines()))
    assert list(shown) == ["← GET /users/{id}", "→ GET /stock/{id}", "← POST /basket"]
    users, stock, basket = shown.values()
    assert (users["REQUESTS"], users["REQ/S"], users["ERRORS"]) == ("43", "22", "0")
    assert (users["NOT 2xx"], users["IN"], users["OUT"]) == (f"404 {times(3)}", "0", "40.0kB")
    assert (basket["ERRORS"], basket["NOT 2xx"], basket["IN"]) == ("1", f"503 {times(1)}", "1.20kB")
    assert (stock["REQUESTS"], stock["ERRORS"], stock["OUT"]) == ("12", "2", "0")
    assert stock["NOT 2xx"] == f"ABORTED by server {times(2)}"
    assert (users["MAX"], basket["MAX"], stock["MAX"]) == ("4.00ms", "800ms", "3.00s")
    # Those without a response have no first byte.
    assert (stock["TTFB P50"], stock["TTFB P99"], stock["P99"]) == ("4.00ms", "4.00ms", "2.97s")


def test_roles_are_told_apart_in_the_headline() -> None:
    served, made, *_ = story_of(figures(0, 2, *SHOP)).interval_lines()
    assert served == (
        "24 requests/s served, 1 ERROR (2.1%), p50 3.42ms, p95 19.7ms, p99 776ms, "
        "600B/s in, 20.0kB/s out"
    )
    assert made == (
        "6.0 requests/s made, 2 ERRORS (17%), p50 9.20ms, p95 2.85s, p99 2.97s, "
        "3.50kB/s in, 0B/s out"
    )
    (only, *_) = story_of(figures(0, 2, SHOP[4])).interval_lines()
    assert only.startswith("5.0 requests/s made, 0 errors, p50 8.00ms")


def test_intervals_add_up_and_the_last_one_is_shown_alone() -> None:
    story = story_of(figures(0, 1, *SHOP), figures(1, 2, SHOP[0]), reached_s=4)
    assert list(routes(list(story.interval_lines()))) == ["← GET /users/{id}"]
    lines = list(story.end_lines())
    assert lines[:2] == [
        "88 requests served, 1 ERROR (1.1%); 1.20kB in, 80.0kB out",
        "12 requests made, 2 ERRORS (17%); 2 ABORTED by server; 7.00kB in, 0B out",
    ]
    users = routes(lines)["← GET /users/{id}"]
    assert (users["REQUESTS"], users["REQ/S"]) == ("83", "21")
    served = lines.index("    SERVED IN  REQUESTS  p50 3.38ms, p95 12.2ms, p99 756ms")
    assert re.fullmatch(r" *1ms - 2.5ms +20  █+.?", lines[served + 3])
    assert re.fullmatch(r" *2.5ms - 5ms +60  █{30}", lines[served + 4])
    assert any("  ANSWERED IN  REQUESTS  p50 " in line for line in lines)


def test_a_batch_of_the_same_interval_belongs_to_it() -> None:
    story = story_of(figures(0, 1, SHOP[0]), figures(0, 1, SHOP[0]))
    assert routes(list(story.interval_lines()))["← GET /users/{id}"]["REQUESTS"] == "80"


def test_quantiles_lie_between_the_least_and_the_greatest() -> None:
    shown = routes(list(story_of(figures(0, 1, row("/", [7.5] * 9))).interval_lines()))["← GET /"]
    assert [shown[name] for name in ("P50", "P95", "P99", "MAX")] == ["7.50ms"] * 4
    assert [shown[f"TTFB {name}"] for name in ("P50", "P95", "P99")] == ["3.75ms"] * 3
    slow = routes(list(story_of(figures(0, 1, row("/", [11_000, 30_000]))).interval_lines()))
    assert slow["← GET /"]["P99"] == "29.8s"  # beyond the last bound


def test_strips_of_a_table_show_the_same_slots() -> None:
    lines = list(story_of(figures(0, 1, *SHOP)).interval_lines())
    assert lines[2].endswith("  MAX  250µs-5s")
    users, stock, basket = (line.split()[-1] for line in lines[3:])
    assert users == "▁·▃█···········"
    assert stock == "····█·········▂"
    assert basket == "·····█······▂··"


@pytest.mark.parametrize(
    ("counts", "picture"),
    [
        ([0, 1, 1000, 500, 0], "·▁█▄·"),
        ([8, 7, 6, 5, 4, 3, 2, 1], "█▇▆▅▄▃▂▁"),
        ([], "···"),
    ],
)
def test_a_strip_has_a_character_for_each_slot(counts: list[int], picture: str) -> None:
    assert strip(counts, range(len(picture))) == picture


def test_slots_have_edges() -> None:
    assert filled([Buckets((10,), [0, 3]), Buckets(), Buckets((10,), [2, 0])]) == range(2)
    assert list(filled([])) == []
    assert slot_edges(BOUNDS_NS, 0) == ("0", "100µs")
    assert slot_edges(BOUNDS_NS, 4) == ("1ms", "2.5ms")
    assert slot_edges(BOUNDS_NS, len(BOUNDS_NS)) == ("10s", "")


def test_histograms_with_the_least_and_the_greatest_value_add_up() -> None:
    both = Buckets((10, 20), [1, 0, 1], 35, 4, 31)
    both.add(Buckets((10, 20), [0, 2, 0], 30, 12, 18))
    assert (both.counts, both.least, both.most) == ([1, 2, 1], 4, 31)
    assert [both.quantile(q) for q in (0, 0.25, 0.5, 1)] == [4, 10, 15, 31]
    both.add(pb.BucketHistogram(bounds=[10, 20], counts=[1, 1, 1], sum=3))
    assert (both.least, both.most, both.quantile(1)) == (None, None, 20)


def test_half_of_the_lines_are_for_routes_with_errors() -> None:
    busy = [row(f"/busy/{n}", [1] * (50 + n)) for n in range(30)]
    bad = [row(f"/bad/{n}", [1], status=500) for n in range(30)]
    other = row("other", [1] * 900, method=0)
    lines = drawn_lines(story_of(figures(0, 1, *busy, *bad, other)).interval_table(120, 12), 120)
    assert len(lines) == 12
    names = [line.split("  ")[0] for line in lines[2:]]
    assert names[:5] == [f"← GET /busy/{n}" for n in (29, 28, 27, 26, 25)]
    assert all(name.startswith("← GET /bad/") for name in names[5:9])
    assert names[9] == "and 52 more"
    assert lines[-1].split()[3] == "2,476"


def test_the_agents_own_sum_is_last() -> None:
    rows = row("other", [1] * 900, method=0, role=CLIENT), row("/", [1] * 2)
    shown = routes(list(story_of(figures(0, 1, *rows)).interval_lines()))
    assert list(shown) == ["← GET /", "→ others"]
    assert shown["→ others"]["REQUESTS"] == "900"


SINGLE: tuple[dict[str, Any], ...] = (
    {"path": "/users/42", "route": "/users/{id}", "duration_ns": 3 * MS, "first_byte_ns": 2 * MS,
     "response_body_bytes": 20_000},
    {"path": "/users/7", "route": "/users/{id}", "duration_ns": 9 * MS, "first_byte_ns": MS},
    {"path": "/stock", "role": CLIENT, "status": 0, "duration_ns": 900 * MS,
     "outcome": pb.HTTP_OUTCOME_ABORTED_BY_CLIENT},
    {"path": "/basket", "method": POST, "status": 503, "duration_ns": 40 * MS,
     "first_byte_ns": 40 * MS, "request_body_bytes": 345},
)  # fmt: skip


def test_single_requests_add_up_to_the_same_table() -> None:
    lines = list(story_of(requests(0, 1, *SINGLE)).end_lines())
    assert lines[:2] == [
        "3 requests served, 1 ERROR (33%); 345B in, 20.0kB out",
        "1 request made, 1 ERROR (100%); 1 ABORTED by client; 0B in, 0B out",
    ]
    shown = routes(lines)
    assert list(shown) == ["← GET /users/{id}", "→ GET /stock", "← POST /basket"]
    users = shown["← GET /users/{id}"]
    assert (users["REQUESTS"], users["ERRORS"], users["MAX"]) == ("2", "0", "9.00ms")
    assert (users["P99"], users["TTFB P99"]) == ("8.92ms", "1.98ms")
    assert shown["→ GET /stock"]["TTFB P50"] == "-"
    assert shown["→ GET /stock"]["NOT 2xx"] == f"{ABORTED} {times(1)}"


def test_requests_in_progress_are_lines_without_a_duration_and_in_no_figure() -> None:
    unfinished = {
        "path": "/slow", "status": 0, "first_byte_ns": 0,
        "outcome": pb.HTTP_OUTCOME_IN_PROGRESS,
    }  # fmt: skip
    batch = requests(0, 1, *SINGLE, unfinished)
    batch.message.unread.add(what="in_progress", count=1)
    lines = list(story_of(batch).end_lines())
    assert lines[0] == "3 requests served, 1 ERROR (33%); 345B in, 20.0kB out"
    assert "not read: 1 requests in progress at the end" in lines
    assert not any("/slow" in line for line in lines)
    last = list(event_lines(batch))[-1]
    assert re.search(r"← GET /slow +-  .*in progress$", last)
    assert "0ns" not in last
    *_, data = records(batch)
    assert (data["outcome"], data["duration_ns"], data["failed"]) == ("in_progress", 0, False)


def test_the_slowest_requests_are_a_line_each() -> None:
    story = story_of(requests(0, 1, *SINGLE), requests(1, 2, SINGLE[0]))
    for lines in (list(story.end_lines()), drawn_lines(story.end_table(160), 160)):
        at = next(number for number, line in enumerate(lines) if line.startswith("SLOWEST "))
        slowest = [line.split("  ")[0] for line in lines[at + 1 : at + 6]]
        assert slowest == [
            "→ GET /stock", "← POST /basket", "← GET /users/7", "← GET /users/42",
            "← GET /users/42",
        ]  # fmt: skip
        assert re.search(rf" - .* 900ms +{ABORTED} +shop/77$", lines[at + 1])
        assert re.search(r" 503 +40.0ms +40.0ms +(- +)?shop/77$", lines[at + 2])
    interval = list(story.interval_lines())
    assert sum("/users/42" in line for line in interval) == 1
    assert not any("/stock" in line for line in interval)


def test_summaries_know_of_no_single_request() -> None:
    story = story_of(figures(0, 1, *SHOP))
    assert not any("SLOWEST" in line for line in (*story.interval_lines(), *story.end_lines()))


def test_a_tap_without_requests_says_what_would_be_seen() -> None:
    story = story_of(reached_s=3)
    for text in (
        " ".join(drawn(story.interval_table(60, 20), 60).split()),
        " ".join(drawn(story.end_table(80), 80).split()),
        " ".join(story.end_lines()),
    ):
        assert text.startswith("no HTTP requests")
        assert "HTTP/1 on TCP sockets of the watched processes would be seen" in text
        assert text.endswith("; other TLS, HTTP/2, unix sockets and io_uring are not")
    assert " in 3s: " in drawn(story.interval_table(120, 20))
    assert max(map(len, drawn_lines(story.interval_table(40, 20), 40))) <= 40


def test_what_cannot_be_read_is_told() -> None:
    story = story_of(
        unread(2, tls=(1, 0)), unread(3, tls=(3, 1_200_000), joined=(1, 0)), reached_s=3
    )
    told = "not read: TLS on 3 connections (1.20MB), 1 joined in the middle, up to the next request"
    assert drawn_lines(story.interval_table(120, 20), 120) == [f"no HTTP requests in 3s: {told}"]
    assert list(story.end_lines()) == [f"no HTTP requests: {told}"]
    batch = figures(3, 4, SHOP[0])
    batch.message.unread.add(what="http2", count=1)
    batch.message.unread.add(what="unseen", count=7, bytes=99)
    story.add(batch)
    told = "not read: HTTP/2 on 1 connection, 7 reads and writes unseen, such as by io_uring (99B)"
    assert drawn_lines(story.interval_table(120, 20), 120)[1] == told
    assert (
        drawn_lines(story.interval_table(40, 20), 40)[3]
        == "not read: HTTP/2 on 1 connection, 7 rea…"
    )
    assert list(story.end_lines())[1] == told
    assert list(routes(list(story.interval_lines()))) == ["← GET /users/{id}"]


def test_a_pause_keeps_the_last_requests_in_sight() -> None:
    story = story_of(figures(0, 1, SHOP[0]), reached_s=2.5)
    assert "no requests" not in drawn(story.interval_table(120, 20))
    story.intervals.reach(START_NS + 8 * 10**9)
    first, *_, last = drawn_lines(story.interval_table(120, 20), 120)
    assert first == "no requests for 7s; the last were"
    assert last.startswith("← GET /users/{id}")


def test_an_interval_too_short_for_rates_has_numbers() -> None:
    headline, *_ = story_of(figures(0, 0.011, SHOP[0])).interval_lines()
    assert headline.startswith("40 requests served, 0 errors, ")
    assert headline.endswith(", 0B in, 40.0kB out")


def line(width: int | None = None, **fields: Any) -> str:
    (text,) = event_lines(requests(0, 1, fields), width)
    return text


ONE: dict[str, Any] = {
    "path": "/users/42", "comm": "py\x1bthon3", "pid": 1_234_567, "duration_ns": 3_400_000,
    "first_byte_ns": 1_200_000, "request_body_bytes": 345, "response_body_bytes": 20_000,
}  # fmt: skip


def test_a_request_is_a_line() -> None:
    text = line(**ONE)
    assert text[8:] == (
        f".000000  {'← GET /users/42':<44}  200   1.20ms   3.40ms    345B/20.0kB  "
        f"{'py?thon3/1234567':<22}  127.0.0.1:40000"
    )
    aborted = line(**ONE | {"outcome": pb.HTTP_OUTCOME_ABORTED_BY_CLIENT, "status": 0})
    assert "  \x1b[31;1m-  \x1b[0m  " in aborted
    assert aborted.endswith(f"  \x1b[31;1m{ABORTED}\x1b[0m")
    assert "  \x1b[33m404\x1b[0m  " in line(**ONE, status=404)
    assert "  \x1b[31;1m500\x1b[0m  " in line(**ONE, status=500)
    long = line(**ONE | {"path": "/a" * 100, "role": CLIENT, "method": POST})
    assert f"→ POST {'/a' * 100}  200 " in long


def test_a_peer_that_is_not_known_is_none() -> None:
    unknown = ONE | {"remote_low": 0, "remote_port": 0}
    assert line(**unknown).endswith("py?thon3/1234567")
    assert line(200, **unknown).endswith("py?thon3/1234567")
    assert line(**unknown, tls=1).endswith("py?thon3/1234567        TLS")


def test_tls_is_told_with_the_peer() -> None:
    assert line(**ONE, tls=1).endswith("  127.0.0.1:40000 TLS")
    wide = ONE | {"remote_high": 0x2001_0DB8 << 32, "remote_low": 0x1111_2222_3333_4444}
    assert line(120, **wide, tls=1).endswith("  …3333:4444]:40000 TLS")


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (40, "← GET /users/42  200   3.40ms"),
        (60, "← GET /users/42         200   3.40ms"),
        (80, "← GET /users/42        200   1.20ms   3.40ms  py?thon3/1234567"),
        (120, "200   1.20ms   3.40ms  py?thon3/1234567   127.0.0.1:40000"),
        (140, "200   1.20ms   3.40ms    345B/20.0kB  py?thon3/1234567   127.0.0.1:40000"),
    ],
)
def test_a_wider_terminal_shows_more_of_a_request(width: int, text: str) -> None:
    shown = line(width, **ONE)
    assert len(shown) <= width
    if width >= 60:
        assert shown.endswith(text)


@pytest.mark.parametrize(
    ("width", "end"), [(60, "ABORTED…"), (80, ABORTED), (100, ABORTED), (140, ABORTED)]
)
def test_how_a_request_ended_takes_the_place_of_what_matters_less(width: int, end: str) -> None:
    text = line(width, **ONE | {"outcome": pb.HTTP_OUTCOME_ABORTED_BY_CLIENT, "path": "/a" * 99})
    assert cell_len(click.unstyle(text)) <= width
    assert click.unstyle(text).endswith(f"  {end}")
    assert "200" in text


@given(
    width=st.integers(30, 200),
    path=st.text(min_size=0, max_size=80),
    comm=st.text(max_size=15),
    outcome=st.integers(0, 6),
    status=st.sampled_from([0, 101, 200, 404, 599]),
    method=st.integers(0, 10),
    role=st.integers(0, 2),
    duration_ns=st.integers(0, 2**63 - 1),
    first_byte_ns=st.integers(0, 2**63 - 1),
    request_body_bytes=st.integers(0, 2**63 - 1),
    response_body_bytes=st.integers(0, 2**63 - 1),
    pid=st.integers(0, 2**22),
    remote_high=st.integers(0, 2**64 - 1),
    remote_port=st.integers(0, 65_535),
    tls=st.integers(0, 1),
)
def test_no_request_is_longer_than_the_terminal(width: int, **fields: Any) -> None:
    text = click.unstyle(line(width, **fields))
    assert cell_len(text) <= width
    assert is_printable(text)


@given(width=st.integers(20, 200), lines=st.integers(1, 40), path=st.text(max_size=60))
def test_no_table_is_wider_than_the_terminal(width: int, lines: int, path: str) -> None:
    story = story_of(requests(0, 1, *SINGLE, {"path": path, "comm": path}), figures(0, 1, *SHOP))
    for renderable in (story.interval_table(width, lines), story.end_table(width)):
        shown = drawn_lines(renderable, width)
        assert max(map(cell_len, shown)) <= width
        assert all(map(is_printable, shown))


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (40, "← GET /users/{id}/orders/{id}"),
        (20, "← GET /users…rs/{id}"),
        (6, "← GET…"),
    ],
)
def test_a_route_loses_its_middle_and_keeps_its_method(width: int, text: str) -> None:
    shown = request(SERVER, GET, "/users/{id}/orders/{id}")(width)
    assert shown == text
    assert len(shown) <= width


def test_single_requests_are_data() -> None:
    at_first, _, aborted, _ = records(requests(0, 1, *SINGLE))
    assert at_first == {
        "collector": "http_latency", "service": "shop", "time_ns": START_NS, "duration_ns": 3 * MS,
        "request_ns": 0, "first_byte_ns": 2 * MS, "connection_id": 0, "request_body_bytes": 0,
        "response_body_bytes": 20_000, "local_address": "127.0.0.1", "local_port": 0,
        "remote_address": "127.0.0.1", "remote_port": 40_000, "pid": 77, "comm": "shop",
        "role": "server", "method": "GET", "outcome": "complete", "status": 200,
        "path": "/users/42", "route": "/users/{id}", "number": 0, "version": "1.1", "tls": False,
        "network_namespace": 0, "failed": False,
        "query": "", "host": "", "trace_id": "", "parent_span_id": "",
    }  # fmt: skip
    assert (aborted["role"], aborted["status"]) == ("client", 0)
    assert aborted["outcome"] == "aborted_by_client"


def test_figures_are_data_with_quantiles() -> None:
    first, *_, last = records(figures(0, 2, *SHOP))
    assert {name: first[name] for name in ("role", "method", "route", "status", "version")} == {
        "role": "server", "method": "GET", "route": "/users/{id}", "status": 200, "version": "1.1",
    }  # fmt: skip
    assert (first["seq"], first["count"], first["min"], first["max"]) == (1, 40, 2, 4)
    assert (first["interval_start_ns"], first["tls"]) == (START_NS, False)
    assert (first["p50"], first["p99"], first["first_byte_p99"]) == (3.0, 3.98, 1.986667)
    assert (last["seq"], last["status"], last["first_byte_p50"]) == (6, 0, None)
    assert last["outcomes"] == {"aborted_by_server": 2}
    other = next(records(figures(0, 1, row("other", [1], method=0))))
    assert (other["method"], other["version"], other["route"]) == ("", "", "other")
    odd = next(records(figures(0, 1, row("/", [1], method=pb.HTTP_METHOD_OTHER))))
    assert odd["method"] == "_OTHER"


def test_outcomes_have_the_names_of_the_contract() -> None:
    assert outcome_of("aborted_by_server") == pb.HTTP_OUTCOME_ABORTED_BY_SERVER
    assert outcome_of("no_such") == 0


def test_the_doctor_counts_only_requests_that_are_right() -> None:
    assert VIEW.provocation
    count = VIEW.provocation.count
    good = {"method": POST, "status": 201, "request_body_bytes": 300, "response_body_bytes": 5000}
    wrong = (
        {"method": GET}, {"status": 200}, {"request_body_bytes": 301}, {"response_body_bytes": 1},
        {"outcome": pb.HTTP_OUTCOME_UNKNOWN},
    )  # fmt: skip
    assert count(requests(0, 1, good, *(good | one for one in wrong))) == 1
    sizes: dict[str, Any] = {"request_body_bytes": 900, "response_body_bytes": 15_000}
    right = row("/coral", [1] * 3, status=201, method=POST, **sizes)
    assert count(figures(0, 1, right)) == 3
    for change in ({"status": 200}, {"method": GET}, {"outcome": "unknown"}):
        changed: dict[str, Any] = {"status": 201, "method": POST} | change
        assert count(figures(0, 1, row("/coral", [1] * 3, **changed, **sizes))) == 0
    assert count(figures(0, 1, row("/coral", [1] * 3, status=201, method=POST))) == 0
