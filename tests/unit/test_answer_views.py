"""Answers of a colony on the screen: what matters is there, and fits."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import pytest
from rich.cells import cell_len

from coral.cli.query.forms import csv_text, json_lines, parse_output
from coral.cli.query.times import moment, span_s
from coral.client import Coverage, Gap, Lost
from coral.mesh.colony.v1 import colony_pb2 as pb
from coral.views.answers.contract import Shown
from coral.views.answers.coverage import coverage_line, source_line
from coral.views.answers.profile import profile_of
from coral.views.answers.registry import ANSWER_VIEWS
from coral.views.cpu_profile.folded import folded
from coral.views.cpu_profile.session import Facts
from coral.views.cpu_profile.svg import picture
from coral.views.sheet import Sheet
from tests.drawing import drawn_lines

HOSTILE: Final = ("checkout", "[/x]", "\x1b[2Jboom", "日本語のサービスの名前", "a\nb", "x" * 90, "")
WIDTHS: Final = (60, 80, 120)
MS: Final = 1_000_000
MINUTE: Final = 60 * 10**9
NOW: Final = int(time.mktime((2026, 11, 27, 12, 4, 0, 0, 0, -1))) * 10**9


def http(service: str, route: str = "/users/{id}", **more: Any) -> dict[str, Any]:
    figures = ("request_body_bytes", "response_body_bytes", "status_4xx", "no_response")
    return {
        "service": service,
        "role": "server",
        "method": "GET",
        "route": route,
        "count": 1234,
        "errors": 12,
        "status_5xx": 12,
        **dict.fromkeys(figures, 5),
        "sum_ns": MS,
        "min_ns": 1,
        "max_ns": 30 * MS,
        "histogram": [1000, 200, 34],
        **{f"p{q}_ns": q * MS / 10 for q in (50, 95, 99)},
        **{f"first_byte_p{q}_ns": None for q in (50, 95, 99)},
        **more,
    }


def syscalls(service: str) -> dict[str, Any]:
    return {
        "service": service,
        "syscall": "clock_nanosleep",
        "calls": 10**7,
        "errors": 3,
        "total_ns": 10**12,
        "max_ns": 10**9,
        "p50_ns": 1e3,
        "p95_ns": 1e6,
        "p99_ns": 1e7,
    }


def tcp(service: str) -> dict[str, Any]:
    counts = ("opened", "failed", "refused", "timeouts", "resets", "listen_drops", "retransmits")
    return {
        "service": service,
        "role": "client",
        "port": 5432,
        "remote_address": "2001:db8:1111:2222:3333:4444:5555:6666",
        "segments_sent": 100,
        **dict.fromkeys(counts, 7),
        "bytes_sent": 10**9,
        "bytes_received": 0,
        "rtt_p50_us": 50.0,
        "rtt_p99_us": None,
        "connect_p50_us": 70.0,
    }


def services(service: str) -> dict[str, Any]:
    counts = ("requests", "requests_made", "errors", "calls", "opened", "failed", "retransmits")
    return {
        "service": service,
        "namespace": "shop",
        "workload": "deployment/checkout",
        **dict.fromkeys(counts, 12345),
        "agents": 3,
        "segments_sent": 10**6,
        "cpu_ns": 10**9,
        "p99_ns": 3e6,
    }


def profile(service: str) -> dict[str, Any]:
    return {
        "service": service,
        "process": service,
        "end": "copy_too_short",
        "unwinding": "",
        "in_kernel": True,
        "count": 10,
        "cpu_ns": 10**8,
        "cycles": 0,
        "samples_lost": 2,
        "samples_truncated": 1,
        "functions": ["main", service],
        "modules": ["shop", "[kernel]"],
        "flags": [0, 1],
        "build_ids": ["", ""],
        "addresses": [1, 2],
    }


def books(service: str) -> dict[str, Any]:
    return {
        "agent": service,
        "session": "9382661e-e05f-48d5-98f0-1b70ff8558c8",
        "kind": "syscall_stats",
        "service": service,
        "started_ns": NOW - MINUTE,
        "ended_ns": NOW,
        "ended": "preempted",
        "produced": 10**9,
        "stored": 10**9 - 3,
        "lost": 1,
        "not_arrived": 1,
        "unexplained": 1,
        "lost_in_kernel": '{"map_full":3}',
        "lost_by_stage": '{"subscriber_queue":1}',
        "address": "node-1.example.org:9001",
        "connected": False,
        "last_seen_ns": NOW - MINUTE,
        "sessions": 3,
        "away_ns": MINUTE,
        "version": "0.1.0",
        "kernel": "6.18.0",
        "detail": f"connection refused by {service}",
    }


MAKERS: Final = {
    "http": (http, ("service", "role", "method", "route")),
    "syscalls": (syscalls, ("service", "syscall")),
    "tcp": (tcp, ("service", "role", "remote_address", "port")),
    "services": (services, ("service", "namespace", "workload")),
    "profile": (profile, ("service",)),
    "sessions": (books, ()),
    "accounts": (books, ()),
    "agents": (books, ()),
    "sql": (lambda service: {"service": service, "n": 7, "rate": 1 / 3, "at": None}, ()),
}


def before(row: dict[str, Any], by: tuple[str, ...]) -> dict[str, Any]:
    figures = {name: value for name, value in row.items() if name not in by}
    return {**row, **{f"{name}_before": it for name, it in figures.items()}, "verdict": "slower"}


def shown(name: str, *, compared: bool = False) -> Shown:
    make, by = MAKERS[name]
    rows = [make(service) for service in HOSTILE]
    if compared:
        rows = [before(row, by) for row in rows]
        rows[0] = {name: None if name.endswith("_before") else it for name, it in rows[0].items()}
    bounds = {"histogram": (MS, 10 * MS)}
    return Shown(rows, by, 900.0, bounds, compared=compared, now_ns=NOW)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("compared", [False, True])
def test_no_line_is_longer_than_the_terminal(name: str, width: int, compared: bool) -> None:
    if compared and not MAKERS[name][1]:
        return
    for sheet in ANSWER_VIEWS[name].sheets(shown(name, compared=compared)):
        if not isinstance(sheet, Sheet):
            continue
        lines = drawn_lines(sheet.table(width), width)
        assert len(lines) > 2
        assert max(map(cell_len, lines)) <= width
        assert not any("\x1b[2J" in line for line in lines)
        assert list(sheet.lines())


def text_of(name: str, answer: Shown, width: int = 80) -> str:
    parts = ANSWER_VIEWS[name].sheets(answer)
    lines: list[str] = []
    for part in parts:
        lines += [part] if isinstance(part, str) else drawn_lines(part.table(width), width)
    return "\n".join(lines)


def test_requests_of_one_service_have_a_headline_and_a_histogram() -> None:
    rows = [http("shop"), http("shop", "/", count=766, errors=0, status_5xx=0)]
    answer = Shown(rows, ("role", "method", "route"), 100.0, {"histogram": (MS, 10 * MS)})
    text = text_of("http", answer)
    assert text.startswith("2,000 requests, 20/s, 12 errors (0.6%)\n")
    assert "← GET /users/{id}" in text
    assert " over 10ms        68  █" in text
    assert "SERVED IN" not in text_of("http", replace(answer, cut=True))


def test_compared_rows_show_both_windows() -> None:
    row = before(http("shop"), ("service", "role", "method", "route"))
    row |= {"p99_ns_before": 2 * MS, "count_before": None}
    text = text_of("http", Shown([row], ("route",), 100.0, compared=True))
    assert "slower" in text
    assert "- → 1,234" in text
    assert "2.00ms → 9.90ms" in text


def test_a_profile_of_several_services_has_them_as_processes() -> None:
    rows = [profile("cart"), {**profile("shop"), "functions": None}]
    answer = Shown(rows, ("service",), 10.0)
    assert folded(profile_of(answer)).splitlines() == [
        "cart␣cart;[cut];main;cart_[k] 10",
        "shop␣shop;[cut];[frames␣not␣kept] 10",
    ]
    assert profile_of(answer).cpu_ns == 2 * 10**8


def test_a_profile_says_how_many_samples_could_not_be_seen_or_not_whole() -> None:
    rows = [profile("shop"), {**profile("cart"), "end": "bottom", "unwinding": "eh_frame"}]
    answer = Shown(rows, ("service",), 10.0)
    assert text_of("profile", answer).splitlines()[1:5] == [
        "4 samples lost in the kernel",
        "10 samples (50%) without the outermost callers, shown under [cut]: 10 copy too short",
        "2 samples had more stack than was copied",
        "user stacks found by .eh_frame 100%",
    ]
    drawn = picture(profile_of(answer), Facts("shop", lost_samples=4))
    assert "4 samples lost in the kernel" in drawn
    assert "2 samples had more stack than was copied" in drawn


def coverage(**figures: Any) -> Coverage:
    at = {"from_ns": NOW - 15 * MINUTE, "to_ns": NOW, "as_of_ns": NOW}
    numbers = {"rows_used": 1234, "rows": 7, "cut": False, "left_out": 0}
    lists: dict[str, Any] = {"pieces": (), "lost": (), "gaps": (), "notes": ()}
    other = {"complete_to_ns": NOW - 50 * 10**9, "against": None, "message": pb.Coverage()}
    return Coverage(**{**at, **numbers, **lists, **other, **figures})


def test_a_line_says_what_is_missing() -> None:
    assert coverage_line(coverage()) == "complete to 12:03:10"
    assert coverage_line(coverage(complete_to_ns=None)) == "as of 12:04:00"
    lost = Lost("kernel_buffer", 312, "http_latency", "checkout", "n1", NOW - 6 * MINUTE, 0)
    lost = replace(lost, to_ns=NOW - 3 * MINUTE)
    gap = Gap("n3", NOW - 14 * MINUTE, NOW - 12 * MINUTE, "")
    line = coverage_line(coverage(lost=(lost,), gaps=(gap,), cut=True, left_out=17))
    assert line == (
        "missing: 312 events of checkout 11:58-12:01 "
        "(kernel_buffer: the kernel's buffer was full); "
        "agent n3 unreachable 11:50-11:52; complete to 12:03:10; 17 more rows"
    )
    skipped = replace(lost, stage="program_missed", count=1)
    assert coverage_line(coverage(lost=(skipped,))).startswith(
        "perhaps missing: up to 1 event of checkout 11:58-12:01 (program_missed: the kernel skipped"
    )
    still = replace(gap, to_ns=None)
    assert "agent n3 unreachable since 11:50:00" in coverage_line(coverage(gaps=(still,)))
    many = tuple(replace(still, agent=f"n{number}") for number in range(5))
    assert "5 agents unreachable at some time, 5 of them still" in coverage_line(
        coverage(gaps=many)
    )
    assert coverage_line(coverage(against=coverage(lost=(lost,)))).startswith(
        "before: missing: 312"
    )
    assert not coverage(against=coverage(lost=(lost,))).is_whole


def test_a_line_says_which_rows_were_used() -> None:
    assert source_line(coverage()) == "from 1,234 rows, 11:49-12:04"


def test_moments_are_ago_or_times() -> None:
    now = datetime(2026, 11, 27, 12, 4, tzinfo=UTC)
    assert moment("15m", now) == 900.0
    assert moment("7d", now) == 7 * 86400.0
    assert moment("12:03", now) == datetime(2026, 11, 27, 12, 3, tzinfo=UTC)
    assert moment("23:50:07", now) == datetime(2026, 11, 26, 23, 50, 7, tzinfo=UTC)
    assert moment("2026-11-27T12:03Z", now) == datetime(2026, 11, 27, 12, 3, tzinfo=UTC)
    assert span_s("1h") == 3600.0
    for bad in ("", "x", "1y", "25:00", "2026-13-01", "-5m"):
        with pytest.raises(ValueError, match="give how long ago"):
            moment(bad, now)
    with pytest.raises(ValueError, match="it is in the future"):
        moment("2026-11-28", now)


def test_data_have_no_surprises() -> None:
    rows = [{"a": 'x,"y"\n', "b": None, "c": [1, 2], "d": True, "e": datetime(2026, 1, 2)}]
    assert csv_text(list(rows[0]), rows).decode() == (
        'a,b,c,d,e\r\n"x,""y""\n",,"[1, 2]",true,2026-01-02 00:00:00\r\n'
    )
    assert json.loads(json_lines(rows)) == {**rows[0], "e": "2026-01-02T00:00:00"}


def test_a_file_is_chosen_by_its_suffix(tmp_path: Path) -> None:
    assert parse_output("csv", pictures=False).form == "csv"
    assert parse_output("svg", pictures=True).form == ".svg"
    assert parse_output(f"{tmp_path}/x.speedscope.json", pictures=True).form == ".speedscope.json"
    assert parse_output(f"{tmp_path}/x.speedscope.json", pictures=False).form == "json"
    for bad in ("svg", "yaml", f"{tmp_path}/x.svg", f"{tmp_path}/none/x.csv"):
        with pytest.raises(click.UsageError):
            parse_output(bad, pictures=False)
