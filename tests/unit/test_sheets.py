"""Tables at every width: nothing is longer than the terminal, and what matters is there."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from coral.cli import show
from coral.client import Batch, CollectorInfo, CollectorOption
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.contract import Story
from coral.views.http_latency.story import HttpStory
from coral.views.sheet import Column, Sheet
from coral.views.syscall_stats.story import SyscallStory
from coral.views.tcp_metrics.flows import CLIENT, SERVER
from coral.views.tcp_metrics.story import TcpStory
from coral.views.text import times
from tests.drawing import drawn_lines as drawn
from tests.requests import CLIENT as CLIENT_SIDE
from tests.requests import POST, figures, row

ID: Final = "0b7e5f3c-6a52-4a39-9d0f-3f3b1c2d4e5f"
V6: Final = "2001:db8:1111:2222:3333:4444:5555:6666"
# Names that others choose: markup, escape sequences, characters of two cells.
HOSTILE: Final = ("[/x]", "[bold]a", "\x1b[2Jboom", "日本語のサービス", "a\nb")
WIDTHS: Final = (60, 80, 120)


def batch(kind: pb.EbpfCollectorKind, **rows: Any) -> Batch:
    message = pb.EbpfEventBatch(
        kind=kind, interval_start_ns=10**9, interval_end_ns=2 * 10**9, count=1, **rows
    )
    return Batch(message, np.empty(0))


def syscalls() -> Story:
    story = SyscallStory()
    rows = [
        pb.SyscallStats(
            syscall_name=name,
            call_count=calls,
            error_count=sum(classes.values()),
            errors_by_class=classes,
            total_duration_ns=calls * 1234,
            max_duration_ns=999_700,
            latency_ns=pb.Log2Histogram(first_exponent=6, slots=32, counts=[0, calls]),
        )
        for name, calls, classes in (
            ("clock_nanosleep", 234_567, {"interrupted": 12}),
            ("openat", 23_456, {"not_found": 12_345, "permission": 678, "exhausted": 9}),
            ("rt_tgsigqueueinfo", 1, {}),
            ("other", 77, {"again": 3}),
        )
    ]
    story.add(batch(pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, syscall_stats=rows))
    return story


def connections() -> Story:
    story = TcpStory()
    rows = []
    for number, (comm, role, address, end) in enumerate(
        (
            ("python3", CLIENT, "10.100.200.30", pb.TCP_END_OPEN),
            ("a-long-command", SERVER, "10.0.0.5", pb.TCP_END_OPEN),
            ("nginx", CLIENT, V6, pb.TCP_END_REFUSED),
            ("nginx", SERVER, V6, pb.TCP_END_RESET_REMOTE),
            *((name, CLIENT, "10.0.0.9", pb.TCP_END_OPEN) for name in HOSTILE),
        )
    ):
        row = pb.TcpMetrics(
            connection_id=number + 1, role=role, remote_address=address, remote_port=54_321,
            local_port=34_567, pid=4_194_303 - number, comm=comm, opened=1, duration_ns=10**9,
            end=end, state=pb.TCP_STATE_CLOSE if end else pb.TCP_STATE_ESTABLISHED,
            was_established=True, rtt_us=12_345, congestion_window=10,
        )  # fmt: skip
        row.delta.bytes_sent = row.total.bytes_sent = 123_456_789
        row.delta.segments_sent, row.delta.retransmits = 100, number % 2
        row.rtt_us_delta.bounds.extend([100, 1000])
        row.rtt_us_delta.counts.extend([5, 6, 7])
        rows.append(row)
    story.add(batch(pb.EBPF_COLLECTOR_KIND_TCP_METRICS, tcp_metrics=rows))
    return story


def peers() -> Story:
    story = TcpStory()
    row = pb.TcpPeerMetrics(
        role=CLIENT, remote_address=V6, port=443, connections_opened=12_345,
        connections_open=1234, connections_failed=3, connections_closed=20,
        ends={"refused": 3, "reset_remote": 17}, failures={"ECONNREFUSED": 3},
    )  # fmt: skip
    row.delta.bytes_sent = row.delta.bytes_received = 999_700_000
    row.delta.segments_sent, row.delta.retransmits = 1000, 17
    other = pb.TcpPeerMetrics(remote_address="other", connections_open=7)
    other.delta.bytes_sent = 10**12
    story.add(batch(pb.EBPF_COLLECTOR_KIND_TCP_METRICS, tcp_peers=[other, row]))
    return story


def http_requests() -> Story:
    story = HttpStory()
    rows = [
        row("/users/{id}/orders/{id}/items/{id}", [3] * 12_345, status=404),
        row("/basket", [800] * 12, status=503, method=POST, request_body_bytes=10**9),
        row("/stock", [1, 20, 9000], role=CLIENT_SIDE, response_body_bytes=10**12),
        row("/stock", [3000] * 2, role=CLIENT_SIDE, status=0, outcome="aborted_by_server"),
        *(row(f"/{name}", [1]) for name in HOSTILE),
        row("other", [0.01] * 7, method=0),
    ]
    story.add(figures(0, 1, *rows))
    return story


STORIES: Final = {
    "requests": (http_requests, ("REQUEST", "REQ/S", "ERRORS", "P99"), ("P50",)),
    "syscalls": (syscalls, ("SYSCALL", "CALLS", "ERRORS", "TIME"), ("ERRORS", "P99", "WHY")),
    "connections": (connections, ("PROCESS", "CONNECTION", "STATE"), ("OUT/S", "IN/S")),
    "peers": (peers, ("PEER", "OPEN", "ENDED BADLY"), ("OUT/S", "IN/S")),
}


@pytest.mark.parametrize("name", STORIES)
@given(width=st.integers(40, 200), lines=st.integers(1, 40))
def test_no_line_of_a_tap_is_longer_than_the_terminal(name: str, width: int, lines: int) -> None:
    make, always, _ = STORIES[name]
    story = make()
    for shown in (story.interval_table(width, lines), story.end_table(width)):
        text = drawn(shown, width)
        assert max(map(cell_len, text)) <= width
        assert not any("\x1b" in line for line in text)
    header = next(
        line for line in drawn(story.interval_table(width, 30), width) if always[0] in line
    )
    assert all(title in header for title in always)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", STORIES)
def test_the_important_columns_are_there_from_60_columns_on(name: str, width: int) -> None:
    make, always, important = STORIES[name]
    text = drawn(make().interval_table(width, 30), width)
    header = next(line for line in text if always[0] in line)
    assert all(title in header for title in (*always, *important))


@pytest.mark.parametrize(
    ("width", "name", "row"),
    [
        (60, "rt_tgsigqueuei…", "openat 23,456 13,032 not found, … 255ns 9.1%"),
        (80, "rt_tgsigqueuei…", "openat 23,456 23,456 13,032 not found, … "),
        (120, "rt_tgsigqueueinfo", f"not found {times(12_345)}, permission {times(678)}, … 192ns"),
    ],
)  # fmt: skip
def test_a_name_loses_its_end_and_a_number_never_does(width: int, name: str, row: str) -> None:
    text = drawn(syscalls().interval_table(width, 30), width)
    names = [line.split()[0] for line in text[1:]]
    assert names == ["clock_nanosleep", "openat", name, "other"]
    assert row in " ".join(text[2].split())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_agents_own_sum_is_the_last_of_the_peers(width: int) -> None:
    text = drawn(peers().interval_table(width, 30), width)
    assert text[-1].startswith("others ")
    assert text[-2].startswith("→ [2001:")
    assert ":443" in text[-2]


def running(**fields: Any) -> pb.CollectorInfo:
    info = pb.CollectorInfo(
        collector_id=ID, kind=pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS, produced=1_234_567,
        map_memory_bytes=552_960, **fields,
    )  # fmt: skip
    info.subscribers.add(peer="ipv4:127.0.0.1:43210", delivered=1_234_567, lost=3)
    info.subscribers.add(peer="unix:", delivered=5)
    return info


NOW_S: Final = 1_700_000_000.0


def leased(left_s: float, **fields: Any) -> pb.CollectorInfo:
    info = running(**fields)
    info.expires_at.FromNanoseconds(int((NOW_S + left_s) * 1e9))
    return info


def listed(*infos: pb.CollectorInfo) -> Sheet:
    return show.collectors_sheet(map(CollectorInfo.of, infos), NOW_S)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("width", [40, *WIDTHS, 200])
def test_collectors_of_any_name_are_listed_whole(name: str, width: int) -> None:
    sheet = listed(leased(287, service_name=name))
    text = drawn(sheet.table(width), width)
    assert max(map(cell_len, text)) <= width
    assert not any("\x1b" in line for line in text)
    prose = " ".join(" ".join(text).split())
    assert ID in prose
    if width >= 60:
        for wanted in ("syscall_stats", "4m47s", "1,234,567", "553kB", "unix: 5 delivered"):
            assert wanted in prose
        shown = name.replace("\x1b", "?").replace("\n", " ")
        assert shown.split()[0] in prose


def test_a_continuous_collector_never_ends() -> None:
    lines = list(listed(running(continuous=True), leased(-1), leased(0.5), leased(59.9)).lines())
    at = lines[0].index("ENDS IN")
    assert [line[at : at + 7].strip() for line in lines[1:]] == ["never", "now", "500ms", "59s"]


@pytest.mark.parametrize("width", [40, *WIDTHS, 200])
def test_options_are_wrapped_between_words(width: int) -> None:
    option = CollectorOption(
        name="follow_children",
        default_value="true",
        description="watch what the watched processes fork, from its first call on",
        accepts="a path such as /sys/fs/cgroup/system.slice/nginx.service",
        refused="",
    )
    text = drawn(show._options([option]).table(width), width)
    assert max(map(cell_len, text)) <= width
    words = " ".join(text).split()
    whole = f"{option.description} accepts {option.accepts}".split()
    longest = "/sys/fs/cgroup/system.slice/nginx.service"
    assert set(whole) - {longest} <= set(words)
    if width >= 80:
        assert longest in words
    assert len(text) == 3 or width < 200


def test_prose_without_room_beside_its_row_goes_below_it() -> None:
    sheet = Sheet((Column("NAME", right=False), Column("WHY", right=False, wraps=True, room=20)))
    sheet.add("a-name-of-thirty-characters-xx", "because of some reason")
    assert drawn(sheet.table(60), 60)[1:] == [
        "a-name-of-thirty-characters-xx  because of some reason"
    ]
    assert drawn(sheet.table(40), 40) == [
        "NAME",
        "a-name-of-thirty-characters-xx",
        "  because of some reason",
    ]


def test_a_column_without_anything_in_it_may_be_hidden_on_a_terminal() -> None:
    sheet = Sheet((Column("A"), Column("B", optional=True), Column("C")))
    sheet.add("1", "", "2")
    assert drawn(sheet.table(80), 80) == ["A  C", "1  2"]
    assert list(sheet.lines()) == ["A  B  C", "1  -  2"]
