"""What a tap of `syscall_stats` shows: how long it watched, rates, errors by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

import click
import numpy as np
import pytest

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.intervals import Intervals
from coral.views.syscall_stats.calls import call_line
from coral.views.syscall_stats.story import SyscallStory
from coral.views.text import times
from coral.wire.rows import row_layout
from tests.drawing import drawn, table

KIND = pb.EBPF_COLLECTOR_KIND_SYSCALL_STATS
START_NS = 1_700_000_000 * 10**9
CALLS = row_layout(pb.EbpfEventBatch.DESCRIPTOR, "syscall_calls").dtype


def stats(name: str, calls: int, total_ns: int = 1000, **classes: int) -> pb.SyscallStats:
    return pb.SyscallStats(
        syscall_name=name,
        call_count=calls,
        error_count=sum(classes.values()),
        errors_by_class=classes,
        total_duration_ns=total_ns,
        max_duration_ns=100,
        latency_ns=pb.Log2Histogram(first_exponent=6, slots=32, counts=[calls]),
    )


def figures(start_s: float, end_s: float, *rows: pb.SyscallStats) -> Batch:
    return Batch(
        pb.EbpfEventBatch(
            kind=KIND,
            interval_start_ns=START_NS + int(start_s * 1e9),
            interval_end_ns=START_NS + int(end_s * 1e9),
            syscall_stats=rows,
            count=len(rows),
        ),
        np.empty(0, CALLS),
    )


def calls(start_s: float, end_s: float, results: Mapping[int, int], name: str = "read") -> Batch:
    """Single calls of NAME: how many returned what."""
    values = [value for value, count in results.items() for _ in range(count)]
    events = np.zeros(len(values), CALLS)
    events["return_value"], events["duration_ns"] = values, 500
    events["ended_ns"], events["tid"], events["comm"] = START_NS, 77, 1
    message = figures(start_s, end_s).message
    message.strings.extend([name, "reader"])
    message.count = len(values)
    return Batch(message, events)


def story_of(began_s: float, *batches: Batch, reached_s: float = 0.0) -> SyscallStory:
    story = SyscallStory()
    story.intervals.begin(START_NS + int(began_s * 1e9))
    for batch in batches:
        story.add(batch)
    story.intervals.reach(START_NS + int(reached_s * 1e9))
    return story


def test_a_rate_of_the_whole_counts_quiet_time_before_between_and_after() -> None:
    rows = figures(3, 4, stats("read", 60)), figures(7, 8, stats("read", 40))
    story = story_of(0, *rows, reached_s=12)
    assert story.intervals.seconds == 12
    read = table(story.end_lines())["read"]
    assert (read["CALLS"], read["CALLS/S"]) == ("100", "8.3")


def test_a_rate_of_single_calls_is_over_the_whole_time_too() -> None:
    story = story_of(0, calls(1, 1.018, {0: 98}), calls(9.9, 9.918, {0: 2}), reached_s=10)
    assert table(story.end_lines())["read"]["CALLS/S"] == "10"


def test_a_quiet_tap_has_watched_all_the_same() -> None:
    story = story_of(0, reached_s=2.5)
    assert story.intervals.seconds == 2.5
    assert list(story.end_lines()) == ["no system calls"]
    assert drawn(story.end_table(80)) == "no system calls\n"
    assert Intervals().seconds == 0


def test_without_word_of_the_start_the_first_interval_is_the_start() -> None:
    story = SyscallStory()
    story.add(figures(5, 6, stats("read", 1)))
    assert story.intervals.seconds == 1


def test_a_first_interval_that_is_too_short_has_no_rate() -> None:
    story = story_of(0, figures(0, 0.011, stats("read", 100)))
    assert table(story.interval_lines())["read"]["CALLS/S"] == "-"
    assert table(story.end_lines())["read"]["CALLS/S"] == "-"
    assert "9,0" not in drawn(story.interval_table(120, 20))
    story.add(figures(0.011, 1.011, stats("read", 500)))
    assert table(story.interval_lines())["read"]["CALLS/S"] == "500"
    assert table(story.end_lines())["read"]["CALLS/S"] == "593"


@pytest.mark.parametrize(
    ("lengths_s", "rated"),
    [
        ((0.011, 0.1, 0.1), (False, True, True)),  # of every 100 ms
        ((0.011, 0.1, 0.04), (False, True, False)),  # the last was cut short
        ((0.011, 1.0, 0.3), (False, True, False)),
        ((0.011, 1.0, 0.6), (False, True, True)),
        ((0.011, 60.0, 20.0), (False, True, True)),
        ((0.011, 0.012), (False, False)),
        ((1.0, 0.011), (True, False)),
    ],
)
def test_an_interval_has_a_rate_once_it_is_half_a_second_or_half_of_the_longest(
    lengths_s: tuple[float, ...], rated: tuple[bool, ...]
) -> None:
    intervals, at_s = Intervals(), 0.0
    for length_s, has_rate in zip(lengths_s, rated, strict=True):
        assert intervals.add(figures(at_s, at_s + length_s).message)
        assert bool(intervals.rate_s) is has_rate
        at_s += length_s


def test_batches_of_one_interval_are_one() -> None:
    story = story_of(0, figures(0, 1, stats("read", 1)), figures(0, 1, stats("write", 2)))
    assert table(story.interval_lines()).keys() == {"read", "write"}
    assert story.intervals.seconds == 1


def test_errors_are_named_by_class_and_by_errno() -> None:
    story = story_of(
        0,
        figures(
            0, 1, stats("openat", 9, not_found=5, permission=1), stats("futex", 3, connection=3)
        ),
    )
    rows = table(story.end_lines())
    assert rows["openat"]["ERRORS"] == "6"
    assert rows["openat"]["WHY"] == f"not found {times(5)}, permission {times(1)}"
    assert rows["futex"]["WHY"] == "timed out"
    single = story_of(0, calls(0, 1, {-2: 3, -11: 2, -512: 1, 0: 4, -5000: 1}))
    row = table(single.end_lines())["read"]
    assert row["ERRORS"] == "6"
    assert row["WHY"] == f"ENOENT {times(3)}, EAGAIN {times(2)}, ERESTARTSYS {times(1)}"


@pytest.mark.parametrize(
    ("row", "red"),
    [
        (stats("openat", 2, not_found=1), True),
        (stats("connect", 2, again=1), False),  # EINPROGRESS
        (stats("read", 2, again=1, interrupted=1), False),
        (stats("read", 2, again=1, invalid=1), True),
        (stats("futex", 2, connection=1), False),  # ETIMEDOUT
        (stats("connect", 2, connection=1), True),
    ],
)
def test_only_failures_are_red(row: pb.SyscallStats, red: bool) -> None:
    text = drawn(story_of(0, figures(0, 1, row)).end_table(120), colour=True)
    assert ("\x1b[31m" in text) is red


@pytest.mark.parametrize(
    ("value", "syscall", "outcome", "red"),
    [
        (-2, "openat", "ENOENT", True),
        (-11, "read", "EAGAIN", False),
        (-115, "connect", "EINPROGRESS", False),
        (-110, "connect", "ETIMEDOUT", True),
        (-110, "futex", "ETIMEDOUT", False),
        (-4, "read", "EINTR", False),
        (-513, "nanosleep", "ERESTARTNOINTR", False),
        (-95, "setsockopt", "EOPNOTSUPP", True),
        (-4000, "ioctl", "errno 4000", True),
        (-5000, "mmap", "-5000", False),
        (17, "read", "17", False),
        (0x7F00_0000_1000, "mmap", "0x7f0000001000", False),
    ],
)
def test_a_call_is_a_line_with_its_errno(
    value: int,
    syscall: str,
    outcome: str,
    red: bool,
) -> None:
    call = {"ended_ns": 0, "comm": "cu\x1brl", "tid": 7, "syscall": syscall}
    line = call_line({**call, "return_value": value, "duration_ns": 999.7})
    assert ("\x1b[31m" in line) is red
    plain = click.unstyle(line)
    assert plain[8:] == f".000000  {'cu?rl/7':<22} {syscall:<20} = {outcome:<14}  1.00µs"


@pytest.mark.parametrize("width", [60, 72, 80, 100, 120])
def test_a_line_of_a_call_fits_into_the_terminal(width: int) -> None:
    call = {
        "ended_ns": 0, "comm": "a-command-name", "tid": 4_194_303, "duration_ns": 12_345,
        "syscall": "rt_tgsigqueueinfo", "return_value": -516,
    }  # fmt: skip
    line = click.unstyle(call_line(call, width))
    assert len(line) <= width
    assert "/4194303 " in line
    assert "= ERESTART_REST… " in line


def test_what_the_agent_has_added_up_is_last() -> None:
    rows = (stats(name, 1, ns) for name, ns in (("other", 9000), ("read", 10), ("write", 20)))
    story = story_of(0, figures(0, 1, *rows))
    assert [line.split()[0] for line in story.end_lines()][1:] == ["write", "read", "other"]


def test_rows_that_do_not_fit_are_added_up_in_the_last_line() -> None:
    rows = (stats(f"call{n}", n + 1, 100 - n, not_found=1) for n in range(10))
    story = story_of(0, figures(0, 1, *rows))
    *_, last = drawn(story.interval_table(120, 4)).rstrip().splitlines()
    assert re.match(r"and 7 more +49 +49 +7 +not found +", last)
    assert len(drawn(story.interval_table(120, 10)).rstrip().splitlines()) == 11


def test_half_of_the_lines_are_for_calls_that_mostly_failed() -> None:
    busy = [stats(f"busy{n}", 10, 1000 - n, not_found=5) for n in range(20)]
    waits = [stats(f"wait{n}", 10, 10, again=10) for n in range(5)]  # nothing went wrong
    refused = [stats(f"refused{n}", 50 + n, 0, permission=50) for n in range(10)]
    worst = stats("ptrace", 60, 0, permission=60)
    story = story_of(0, figures(0, 1, *busy, *waits, *refused, worst))

    def shown(lines: int) -> list[str]:
        _, *rows = drawn(story.interval_table(120, lines)).rstrip().splitlines()
        assert len(rows) == lines
        return [row.split()[0] for row in rows]

    assert shown(6) == ["busy0", "busy1", "busy2", "refused0", "ptrace", "and"]
    assert shown(3) == ["busy0", "ptrace", "and"]
    assert shown(2) == ["busy0", "and"]
    refusals = [f"refused{n}" for n in range(10)] + ["ptrace"]
    assert shown(30) == [f"busy{n}" for n in range(18)] + refusals + ["and"]
