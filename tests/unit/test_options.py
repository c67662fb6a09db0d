"""Options of collectors: what is accepted, and what an error says."""

from __future__ import annotations

import os
import threading

import pytest

from coral.collectors.contract import ServiceProcesses
from coral.collectors.options import (
    OptionError,
    UnknownOptionError,
    describe,
    format_duration,
    parse_duration_s,
    parse_options,
)
from coral.collectors.syscall_stats.collector import SyscallStatsOptions
from coral.collectors.targets import Targets

SERVICE = ServiceProcesses("checkout", (1,))


def parse(**config: str) -> SyscallStatsOptions:
    return parse_options(SyscallStatsOptions, config)


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("1s", 1), ("1.5m", 90), ("2h", 7200), ("30", 30)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "500ms"), (1, "1s"), (90, "90s"), (300, "5m"), (0.1, "100ms")]
)
def test_durations_are_written_as_they_are_read(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
    assert parse_duration_s(text) == seconds


def test_defaults_are_those_of_the_description() -> None:
    options = parse()
    assert options.interval == 1.0
    assert options.follow_children is True
    assert {option.name: option.default for option in describe(SyscallStatsOptions)} == {
        "pid": "", "comm": "", "cgroup": "", "pod": "", "pods": "", "namespace": "",
        "workload": "", "container": "", "scope": "", "follow_children": "true",
        "until_exit": "false", "from_exec": "false", "interval": "1s", "include": "",
        "exclude": "", "top": "0", "entries": "10240", "mode": "summaries", "min_duration": "0s",
        "errors_only": "false", "sample": "1", "ring": "4MiB",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "accepts"),
    [
        ("interval", "50ms", "a duration from 100ms to 1m"),
        ("interval", "2m", "a duration from 100ms to 1m"),
        ("interval", "soon", "a duration from 100ms to 1m"),
        ("top", "-1", "a whole number from 0 to 10240"),
        ("ring", "100KiB", "a power of two from 64KiB to 256MiB"),
        ("ring", "4KiB", "a power of two from 64KiB to 256MiB"),
        ("mode", "both", "summaries or events"),
        ("sample", "0", "a whole number from 1 to 1000000"),
        ("top", "many", "a whole number from 0 to 10240"),
        ("follow_children", "yes", "true or false"),
        ("scope", "world", "host"),
        ("comm", "a_name_of_sixteen", "a command name of at most 15 bytes"),
        ("include", "read,wrote", "this kernel has no 'wrote'"),
        ("pid", "one", "process ids, such as 1234 or 1234,5678"),
        ("pid", "0", "process ids, such as 1234 or 1234,5678, from 1 to 4194303"),
        ("pid", "²", "process ids, such as 1234 or 1234,5678"),
        ("pid", "9" * 5000, "process ids, such as 1234 or 1234,5678, from 1 to 4194303"),
        ("pid", "4194304", "process ids, such as 1234 or 1234,5678, from 1 to 4194303"),
        ("comm", "a\x1b", "a command name of at most 15 bytes, in printable characters"),
        ("cgroup", "a\nb", "in printable characters"),
        ("top", "9" * 5000, "a whole number from 0 to 10240"),
        ("pid", "4194303", "processes that run now: 4194303 does not"),
    ],
)
def test_a_bad_value_is_refused_by_name_value_and_what_is_accepted(
    name: str, value: str, accepts: str
) -> None:
    with pytest.raises(OptionError) as caught:
        parse(**{name: value})
    error = caught.value
    assert (error.name, error.value) == (name, value)
    assert accepts in error.accepts
    assert str(error) == f'config["{name}"]: {value!r} is not accepted; give {error.accepts}'


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownOptionError, match='did you mean "interval"') as caught:
        parse(intervall="1s")
    assert (caught.value.name, caught.value.nearest) == ("intervall", "interval")
    assert "top" in caught.value.known
    with pytest.raises(UnknownOptionError) as caught:
        parse(zzz="1s")
    assert caught.value.nearest == ""


def test_the_id_of_a_thread_is_refused() -> None:
    ids: list[int] = []
    ready, done = threading.Event(), threading.Event()

    def run() -> None:
        ids.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        with pytest.raises(OptionError, match=f"{ids[0]} is a thread of process {os.getpid()}"):
            parse(pid=str(ids[0]))
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "a service_name, or one of pid, comm, cgroup"),
        ({"comm": "x", "scope": "host"}, "only one of pid, comm, .*, scope; comm is given too"),
        ({"comm": "x", "until_exit": "true"}, "it with pid or a service_name only"),
        ({"comm": "x", "from_exec": "true"}, "it with pid only"),
        ({"cgroup": "/no/such/cgroup"}, "there is none at this path"),
        ({"comm": "x", "errors_only": "true"}, "it with mode=events only"),
        ({"comm": "x", "min_duration": "5ms"}, "'5ms' is not accepted; give it with mode=events"),
        ({"comm": "x", "sample": "10"}, "'10' is not accepted; give it with mode=events only"),
    ],
)
def test_targets_that_make_no_sense_are_refused(config: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Targets(parse(**config), None)


def test_a_service_is_a_target_unless_the_options_name_one() -> None:
    assert Targets(parse(), SERVICE).label
    assert Targets(parse(comm="nginx"), None).label == "nginx"
    assert Targets(parse(scope="host"), None).label == "host"


def test_a_mask_has_the_bits_of_the_named_calls() -> None:
    native, compat = parse(include="read,write").wanted
    assert [sum(map(int.bit_count, bits.tolist())) for bits in (native, compat)] == [2, 2]
    native, compat = parse(exclude="read").wanted
    assert [sum(map(int.bit_count, bits.tolist())) for bits in (native, compat)] == [1023, 1023]
    assert sum(map(int.bit_count, parse().wanted.ravel().tolist())) == 2048
