"""What a tap shows is made of: figures, names, columns, lines that stand for many."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from typing import Any

import click
import numpy as np
import pytest
from rich.console import Console

from coral.client import Batch, Buckets
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.addresses import address_text, endpoint
from coral.views.data import plain
from coral.views.names import Names
from coral.views.sheet import Column, Sheet
from coral.views.tcp_metrics.events import event_line
from coral.views.tcp_metrics.flows import (
    CLIENT,
    LISTENER,
    SERVER,
    Flow,
    Health,
    choose,
    fold,
    of_connection,
    of_peer,
)
from coral.views.tcp_metrics.peers import peer
from coral.views.tcp_metrics.story import TcpStory
from coral.views.tcp_metrics.tally import Tally
from coral.views.text import format_age, format_amount, format_share, shorten, times
from coral.wire.text import safe

V6 = "2001:db8:1111:2222:3333:4444:5555:6666"


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        *((0, "0"), (0.4, "0"), (999.4, "999"), (999.6, "1.00k"), (4210, "4.21k")),
        *((99_960, "100k"), (999_600, "1.00M"), (12.5e6, "12.5M"), (1.2e9, "1.20G")),
    ],
)
def test_amounts_have_three_digits_and_a_unit(amount: float, text: str) -> None:
    assert format_amount(amount) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (0.0001, "<0.1%"), (0.031, "3.1%"), (0.0996, "10%"), (0.42, "42%"), (1, "100%")],
)
def test_a_share_that_is_not_nothing_is_not_shown_as_nothing(share: float, text: str) -> None:
    assert format_share(share) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.0004, "<1ms"), (0.87, "870ms"), (12.9, "12s"), (200, "3m20s")),
        *((18_120, "5h02m"), (12 * 86400 + 4 * 3600, "12d04h")),
    ],
)
def test_an_age_has_two_units_at_most(seconds: float, text: str) -> None:
    assert format_age(seconds * 1e9) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nginx: worker", "nginx: worker"),
        ("\x1b[2Jboom\r\n", "?[2Jboom??"),
        ("python\0\x90\ufffd", "python"),
        ("a\u202eb\x9bc", "a?b?c"),
        ("dæmon-日本", "dæmon-日本"),
    ],
)
def test_names_of_others_give_a_terminal_no_orders(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_what_is_shortened_keeps_its_end() -> None:
    assert shorten("abcdefgh", 8) == "abcdefgh"
    assert shorten("abcdefgh", 5) == "abcd…"
    assert shorten("abcdefgh", 5, 2) == "ab…gh"
    assert shorten("abcdefgh", 2, 7) == "…h"


def test_buckets_add_up_and_have_quantiles() -> None:
    buckets = Buckets()
    assert buckets.quantile(0.5) == 0
    buckets.add(pb.BucketHistogram())
    buckets.add(pb.BucketHistogram(bounds=[10, 20], counts=[1, 2, 0], sum=40))
    buckets.add(Buckets((10, 20), [0, 2, 5], 360))
    assert (buckets.count, buckets.sum, buckets.counts) == (10, 400, [1, 4, 5])
    assert buckets.quantile(0.1) == 10
    assert buckets.quantile(0.3) == 15
    assert buckets.quantile(0.99) == 20  # what is above all bounds is not known better
    with pytest.raises(ValueError, match="other bounds"):
        buckets.add(pb.BucketHistogram(bounds=[5], counts=[1, 1]))


@pytest.mark.parametrize(
    ("flow", "width", "text"),
    [
        (Flow(CLIENT, "10.0.0.9", 5432), 40, "→ 10.0.0.9:5432"),
        (Flow(SERVER, "10.0.0.5", 8080, 41234), 40, ":8080 ← 10.0.0.5:41234"),
        (Flow(SERVER, "10.0.0.5", 8080, connections=1234), 40, f":8080 ← 10.0.0.5 {times(1234)}"),
        (Flow(SERVER, "10.0.0.5", 8080, connections=90, addresses=12), 40,
         f":8080 ← 12 addresses {times(90)}"),
        (Flow(LISTENER, "0.0.0.0", 8080), 40, ":8080"),
        (Flow(0, "other", 0, connections=7), 40, f"others {times(7)}"),
        (Flow(CLIENT, V6, 443), 60, f"→ [{V6}]:443"),
        (Flow(CLIENT, V6, 443), 24, "→ [2001:db…555:6666]:443"),
        (Flow(SERVER, V6, 443), 24, ":443 ← 2001:db8…555:6666"),
        (Flow(SERVER, V6, 443, 41234), 24, ":443 ← 2001:db8…555:6666"),
        (Flow(SERVER, "10.0.0.5", 8080, 41234), 22, ":8080 ← 10.0.0.5:41234"),
        (Flow(SERVER, "10.0.0.5", 8080, 41234), 21, ":8080 ← 10.0.0.5"),
    ],
)  # fmt: skip
def test_a_peer_fits_and_keeps_port_and_number(flow: Flow, width: int, text: str) -> None:
    shown = peer(flow)(width)
    assert shown == text
    assert len(shown) <= width


def test_a_name_loses_its_end_and_not_its_port() -> None:
    names = Names(lambda _: "a-database.of.some.department.example.com")
    names.of("10.0.0.9")
    names.settle(10)
    assert peer(Flow(CLIENT, "10.0.0.9", 5432), names)(20) == "→ a-database.o…:5432"


def test_endpoints_have_brackets_where_colons_are() -> None:
    assert endpoint("10.0.0.1", 80) == "10.0.0.1:80"
    assert endpoint("fd77::1", 80) == "[fd77::1]:80"
    assert address_text(0, 0xFFFF_0A00_0001) == "10.0.0.1"
    assert address_text(0xFD77 << 48, 1) == "fd77::1"


def test_a_name_is_asked_for_once_and_shown_when_it_is_known() -> None:
    answer, asked = threading.Event(), []

    def ask(address: str) -> str:
        asked.append(address)
        answer.wait()
        return f"name-of-{address}"

    names = Names(ask)
    assert [names.of(f"10.0.0.{n}") for n in range(20)] == [""] * 20
    assert names.of("10.0.0.1") == ""
    names.settle(0.01)  # waits no longer than that
    assert len(asked) <= 8
    answer.set()
    names.settle(10)
    assert [names.of(f"10.0.0.{n}") for n in range(20)] == [
        f"name-of-10.0.0.{n}" for n in range(20)
    ]
    assert sorted(asked) == sorted({f"10.0.0.{n}" for n in range(20)})


def test_a_name_server_that_does_not_answer_does_not_hold_up_the_end() -> None:
    code = (
        "import time; from coral.views.names import Names\n"
        "names = Names(lambda _: time.sleep(1000))\n"
        "names.of('10.0.0.1'); names.settle(0.05); print(names.of('10.0.0.1') == '')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


SHEET = Sheet(
    (
        Column("WHO", right=False),
        Column("WHERE", right=False, fits=True),
        Column("SPARE", spare=1),
        Column("N"),
    )
)
SHEET.add("a", lambda width: shorten("[a place that is long]", width), "12345", ("7", "red"))
SHEET.add("bcd", "here", "", "1,234")


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (80, ["WHO  WHERE                   SPARE      N",
              "a    [a place that is long]  12345      7",
              "bcd  here                           1,234"]),
        (35, ["WHO  WHERE                       N",
              "a    [a place that is long]      7",
              "bcd  here                    1,234"]),
        (30, ["WHO  WHERE                   N",
              "a    [a place that is…       7",
              "bcd  here                1,234"]),
    ],
)  # fmt: skip
def test_a_table_first_loses_what_is_spare_and_then_shortens(width: int, shown: list[str]) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(SHEET.table(width))
    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines == shown
    assert max(map(len, lines)) <= width


def test_lines_for_a_pipe_are_as_wide_as_what_is_in_them() -> None:
    assert list(SHEET.lines()) == [
        "WHO  WHERE                   SPARE      N",
        "a    [a place that is long]  12345      7",
        "bcd  here                        -  1,234",
    ]
    assert list(Sheet((Column("ONLY"),)).lines()) == ["ONLY"]


def ended(end: int, local_port: int, sent: int = 10, **fields: object) -> Flow:
    row = pb.TcpMetrics(
        role=CLIENT, remote_address="10.0.0.9", remote_port=80, local_port=local_port, pid=7,
        state=pb.TCP_STATE_CLOSE, end=end, opened=1, was_established=True, **fields,  # type: ignore[arg-type]
    )  # fmt: skip
    row.delta.bytes_sent = sent
    row.delta.segments_sent = 4
    return of_connection(row)


def test_connections_that_are_alike_are_one_line() -> None:
    flows = [ended(pb.TCP_END_FIN_LOCAL, port) for port in range(1234)]
    flows += [ended(pb.TCP_END_RESET_REMOTE, port, 0) for port in range(2)]
    whole, resets = fold(flows)
    assert (whole.connections, whole.word, whole.bytes_out) == (1234, "closed", 12_340)
    assert (whole.opened, whole.closed, whole.segments, whole.health) == (1234, 1234, 4936, 0)
    assert (resets.connections, resets.word, resets.health) == (2, "PEER RESET", Health.BAD)
    assert peer(whole)(40) == f"→ 10.0.0.9:80 {times(1234)}"


def test_the_many_addresses_of_a_server_are_one_line() -> None:
    flows = [Flow(SERVER, f"10.0.{n // 250}.{n % 250}", 80, n, word="closed") for n in range(3000)]
    (one,) = fold(flows)
    assert (one.connections, one.addresses) == (3000, 3000)
    assert len(fold(flows[:10])) == 10


def test_half_of_the_lines_are_for_what_is_in_trouble() -> None:
    busy = [Flow(CLIENT, f"10.0.0.{n}", 80, bytes_out=1000 + n) for n in range(50)]
    bad = [Flow(CLIENT, f"10.0.1.{n}", 80, health=Health.BAD, failed=n) for n in range(50)]
    shown, rest = choose([*busy, *bad], 10)
    assert [flow.bytes_out for flow in shown[:5]] == [1049, 1048, 1047, 1046, 1045]
    assert {flow.failed for flow in shown[5:]} == {45, 46, 47, 48, 49}
    assert len(rest) == 90


@pytest.mark.parametrize(
    ("fields", "word", "health"),
    [
        ({"state": pb.TCP_STATE_ESTABLISHED}, "open", Health.WELL),
        ({"state": pb.TCP_STATE_SYN_SENT}, "opening", Health.WELL),
        ({"state": pb.TCP_STATE_CLOSE_WAIT, "end": pb.TCP_END_FIN_REMOTE}, "close-wait",
         Health.WELL),
        ({"state": pb.TCP_STATE_CLOSE, "end": pb.TCP_END_REFUSED}, "REFUSED", Health.BAD),
        ({"state": pb.TCP_STATE_CLOSE, "end": pb.TCP_END_ERROR, "error": "EHOSTUNREACH"},
         "EHOSTUNREACH", Health.BAD),
        ({"state": pb.TCP_STATE_ESTABLISHED, "was_established": True,
          "delta": {"retransmits": 1, "segments_sent": 20}}, "LOSSY", Health.LOSSY),
        ({"state": pb.TCP_STATE_SYN_SENT, "delta": {"retransmits": 1}}, "UNANSWERED", Health.LOSSY),
        ({"role": LISTENER, "delta": {"resets_sent": 3}}, "RESETS", Health.LOSSY),
        ({"role": LISTENER, "delta": {"syn_ack_retransmits": 3}}, "SYN RESENT", Health.LOSSY),
        ({"role": LISTENER, "delta": {"listen_drops": 7}, "backlog": 3, "backlog_limit": 2},
         "DROPPED 7, 3 of 2 wait", Health.BAD),
        ({"role": LISTENER, "backlog": 3, "backlog_limit": 2}, "FULL, 3 of 2 wait", Health.LOSSY),
    ],
)  # fmt: skip
def test_trouble_is_a_word(fields: dict[str, object], word: str, health: Health) -> None:
    flow = of_connection(pb.TcpMetrics(**{"role": CLIENT, **fields}))  # type: ignore[arg-type]
    assert (flow.word, flow.health) == (word, health)


def test_a_peer_tells_how_its_connections_ended() -> None:
    row = pb.TcpPeerMetrics(role=CLIENT, port=80, connections_failed=3, connections_closed=5)
    row.ends.update({"error": 2, "refused": 1, "fin_local": 2})
    row.failures.update({"EHOSTUNREACH": 2, "ECONNREFUSED": 1})
    flow = of_peer(row)
    assert flow.ends == {"EHOSTUNREACH": 2, "REFUSED": 1, "closed": 2}
    assert (flow.failed, flow.health) == (3, Health.BAD)


EVENT = {
    "time_ns": 0, "pid": 7, "comm": "cu\x1brl", "role": CLIENT, "count": 1, "reason": "",
    "local_address": "10.0.0.1", "local_port": 1234, "remote_address": "fd77::2", "remote_port": 80,
    "error": 0, "end": 0, "old_state": pb.TCP_STATE_ESTABLISHED,
    "new_state": pb.TCP_STATE_ESTABLISHED,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"what": pb.TcpStateChange.WHAT_STATE, "new_state": pb.TCP_STATE_FIN_WAIT1},
         "established → fin-wait1"),
        ({"what": pb.TcpStateChange.WHAT_STATE, "new_state": pb.TCP_STATE_CLOSE,
          "end": pb.TCP_END_TIMEOUT, "error": 110}, "established → close  TIMEOUT  ETIMEDOUT"),
        ({"what": pb.TcpStateChange.WHAT_STATE, "new_state": pb.TCP_STATE_CLOSE,
          "end": pb.TCP_END_ABORTED}, "established → close  RESET"),
        ({"what": pb.TcpStateChange.WHAT_RETRANSMIT_TIMEOUT, "count": 3},
         f"RETRANSMIT {times(3)}, timer, established"),
        ({"what": pb.TcpStateChange.WHAT_RETRANSMIT_FAST},
         "RETRANSMIT, fast recovery, established"),
        ({"what": pb.TcpStateChange.WHAT_RESET_SENT, "reason": "TCP_ABORT_ON_CLOSE"},
         "RESET sent: TCP_ABORT_ON_CLOSE"),
        ({"what": pb.TcpStateChange.WHAT_RESET_RECEIVED}, "RESET received"),
    ],
)  # fmt: skip
def test_an_event_is_a_line(fields: dict[str, object], text: str) -> None:
    line = click.unstyle(event_line({**EVENT, **fields}))
    assert line[8:] == (f".000000  {'cu?rl/7':<22} {'10.0.0.1:1234 → [fd77::2]:80':<41} {text}")


CLOSED = {
    "time_ns": 0, "pid": 1234567, "comm": "python3", "what": pb.TcpStateChange.WHAT_STATE,
    "remote_address": "127.0.0.1", "new_state": pb.TCP_STATE_CLOSE,
}  # fmt: skip


@pytest.mark.parametrize(
    ("width", "who", "fields", "text"),
    [
        (60, "", {"old_state": pb.TCP_STATE_CLOSE, "new_state": pb.TCP_STATE_SYN_SENT},
         "close → syn-sent"),
        (60, "", {"new_state": pb.TCP_STATE_CLOSE_WAIT}, "established → close-wait"),
        (60, "", {"end": pb.TCP_END_FIN_REMOTE}, "→ close  peer closed"),
        (60, "", {"end": pb.TCP_END_TIMEOUT, "error": 110}, "→ close  TIMEOUT"),
        (66, "1234567 ", {"new_state": pb.TCP_STATE_CLOSE_WAIT}, "established → close-wait"),
        (80, "python3/1234567 ", {"new_state": pb.TCP_STATE_CLOSE_WAIT},
         "established → close-wait"),
        (119, "python3/1234567 ", {"end": pb.TCP_END_TIMEOUT, "error": 110},
         "established → close  TIMEOUT  ETIMEDOUT"),
        (40, "", {"new_state": pb.TCP_STATE_CLOSE_WAIT}, "→ clos…"),
    ],
)  # fmt: skip
def test_an_event_never_loses_a_part_of_its_transition(
    width: int, who: str, fields: dict[str, object], text: str
) -> None:
    line = click.unstyle(event_line({**EVENT, **CLOSED, **fields}, width=width))
    assert len(line) <= width
    assert f" {text}" in line
    assert line.endswith(text)
    assert re.match(rf"[\d:]{{8}}\.(\d{{6}}|\d{{3}})  {who} *→ 127\.0", line)


def test_a_message_as_data_has_all_of_its_fields() -> None:
    data = plain(pb.TcpPeerMetrics(role=SERVER, port=80, ends={"fin_local": 2}))
    assert (data["role"], data["port"], data["ends"]) == ("server", 80, {"fin_local": 2})
    assert data["delta"]["bytes_sent"] == 0
    assert data["rtt_us_delta"] == {"bounds": [], "counts": [], "sum": 0}


def batch(start_s: int, end_s: int, *rows: pb.TcpMetrics) -> Batch:
    return Batch(
        pb.EbpfEventBatch(
            kind=pb.EBPF_COLLECTOR_KIND_TCP_METRICS,
            interval_start_ns=start_s * 10**9,
            interval_end_ns=end_s * 10**9,
            tcp_metrics=rows,
            count=len(rows),
        ),
        np.empty(0),
    )


def connection(number: int, sent: int, ever: int, **fields: Any) -> pb.TcpMetrics:
    row = pb.TcpMetrics(
        connection_id=number, role=CLIENT, remote_address="10.0.0.9", remote_port=80, pid=7,
        state=pb.TCP_STATE_ESTABLISHED, was_established=True, **fields,
    )  # fmt: skip
    row.delta.bytes_sent, row.total.bytes_sent = sent, ever
    return row


def test_batches_of_one_interval_are_one_and_what_is_idle_stays_known() -> None:
    tally = Tally()
    tally.add(batch(0, 1, connection(1, 10, 10, opened=1)))
    tally.add(batch(0, 1, connection(2, 20, 20, opened=1)))
    assert (tally.intervals.seconds, len(tally.latest), tally.idle()) == (1, 2, [])
    assert (tally.interval.bytes_out, tally.all.bytes_out, tally.all.opened) == (30, 30, 2)
    closed = connection(2, 5, 25, end=pb.TCP_END_RESET_REMOTE, error="ECONNRESET")
    closed.state = pb.TCP_STATE_CLOSE
    tally.add(batch(1, 3, closed))
    assert (tally.intervals.seconds, tally.intervals.latest_s, len(tally.latest)) == (3, 2, 1)
    assert (tally.interval.bytes_out, tally.all.bytes_out, tally.open_now) == (5, 35, 1)
    (idle,) = tally.idle()
    assert (idle.word, idle.bytes_out, idle.ever_out) == ("open", 0, 10)
    ((trouble, count),) = tally.troubles.items()
    assert (trouble.word, trouble.why, trouble.address, trouble.port, count) == (
        "PEER RESET", "ECONNRESET", "10.0.0.9", 80, 1,
    )  # fmt: skip
    (peer_total,) = tally.peers()
    assert (peer_total.bytes_out, peer_total.open, peer_total.closed) == (35, 1, 1)


def test_rows_that_the_agent_has_added_up_hide_what_is_open() -> None:
    tally = Tally()
    tally.add(batch(0, 1, pb.TcpMetrics(remote_address="other", connections=9, opened=4)))
    assert (tally.knows_open, tally.all.opened) == (False, 4)
    assert peer(tally.latest[0])(20) == f"others {times(9)}"


def test_totals_say_that_a_listener_dropped_connections_or_was_full() -> None:
    def listener(port: int, backlog: int, drops: int = 0) -> pb.TcpMetrics:
        row = pb.TcpMetrics(
            role=LISTENER, local_port=port, state=pb.TCP_STATE_LISTEN, pid=7,
            backlog=backlog, backlog_limit=2,
        )  # fmt: skip
        row.delta.listen_drops = drops
        return row

    story = TcpStory()
    for second in range(3):
        drops = 5 if second == 1 else 0
        rows = listener(80, 3, drops), listener(81, 3), listener(82, 2, drops), listener(83, 2)
        story.add(batch(second, second + 1, *rows, connection(1, 10, 10)))
    lines = [re.split(" {2,}", line) for line in story.end_lines()]
    at = next(index for index, line in enumerate(lines) if line[0] == "PEER")
    assert lines[at][-1] == "LISTENER"
    assert {line[0]: line[-1] for line in lines[at + 1 :]} == {
        ":80": f"DROPPED 5, FULL {times(3)}",
        ":81": f"FULL {times(3)}",
        ":82": "DROPPED 5",
        "→ 10.0.0.9:80": "-",
    }
    console = Console(width=80)
    with console.capture() as capture:
        console.print(story.end_table(80))
    assert re.search(rf":80 .* DROPPED 5, FULL {times(3)} *$", capture.get(), re.MULTILINE)
