"""Profiles by cycles of CPUs instead of time: what is counted, and that it is never called time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest

from coral.bpf.attaching.sampling import MARKS, highest_clock_hz, period_cycles
from coral.bpf.probing.features import Feature, Features
from coral.collectors.cpu_profile.collector import CpuProfileCollector
from coral.collectors.options import OptionError
from coral.views.cpu_profile.html import page
from coral.views.cpu_profile.pprof import pprof
from coral.views.cpu_profile.profile import Profile
from coral.views.cpu_profile.reading import records, take
from coral.views.cpu_profile.session import Facts, amount_words
from coral.views.cpu_profile.speedscope import speedscope
from coral.views.cpu_profile.svg import picture
from tests.pprof_reader import read
from tests.profiles import Stack, batch_of, profile_of

CYCLES: Final = 30_000_064
FACTS: Final = Facts("shop", seconds=2.0)
BY_CYCLES: Final[dict[str, Any]] = {"period_ns": 0, "period_cycles": CYCLES}
REASON: Final = "ENOENT: this machine counts no CPU cycles, as is usual for virtual ones"


def features(*, cycles: bool) -> Features:
    names = ("btf", "tp_btf", "ring_buffer", "percpu_hash", "batch", "session_maps", "cpu_clock")
    found = [Feature(name, True) for name in (*names, "pidfd", "task_storage")]
    counter = Feature("cpu_cycles", cycles, "" if cycles else REASON)
    return Features("6.18", "1.1", frozenset(), (*found, counter))


def test_cycles_are_refused_where_there_is_no_counter_and_the_option_and_why_are_named() -> None:
    config = {"scope": "host", "event": "cycles"}
    with pytest.raises(OptionError) as refused:
        CpuProfileCollector.create(config, None, features(cycles=False))
    assert str(refused.value) == (
        f"config[\"event\"]: 'cycles' is not accepted; give `cpu-clock`: {REASON}"
    )
    support = CpuProfileCollector.support(features(cycles=False))
    assert support.supported
    assert support.refused_options["event"] == f"`cpu-clock`: {REASON}"
    assert [step.taken for step in support.steps][-1] == "cpu_clock"


def test_cycles_are_accepted_where_there_is_a_counter_and_time_everywhere() -> None:
    CpuProfileCollector.create({"scope": "host", "event": "cycles"}, None, features(cycles=True))
    support = CpuProfileCollector.support(features(cycles=True))
    assert "event" not in support.refused_options
    assert [step.taken for step in support.steps][-2:] == ["cpu_clock", "cpu_cycles"]
    for cycles in (False, True):
        CpuProfileCollector.create({"scope": "host"}, None, features(cycles=cycles))


@pytest.mark.parametrize("frequency", [1, 19, 99, 999])
@pytest.mark.parametrize("mark", [0, 7, MARKS - 1])
def test_a_period_of_cycles_fits_the_clock_and_carries_its_mark(frequency: int, mark: int) -> None:
    for clock_hz in (800_000_000, 5_700_000_000):
        period = period_cycles(clock_hz, frequency, mark)
        assert period % MARKS == mark
        assert clock_hz / period == pytest.approx(frequency, rel=0.04)


def test_the_clock_is_the_highest_that_the_machine_tells_of(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    assert highest_clock_hz(tmp_path, info) == 2_500_000_000
    info.write_text("cpu MHz\t\t: 2596.120\nflags\t\t: fpu\n\ncpu MHz\t\t: 2400.000\n")
    assert highest_clock_hz(tmp_path, info) == 2_596_120_000
    for cpu, khz in enumerate(("3400000", "5100000", "damaged")):
        (tmp_path / f"cpu{cpu}/cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/cpufreq/cpuinfo_max_freq").write_text(khz)
    assert highest_clock_hz(tmp_path, info) == 5_100_000_000


def test_no_view_calls_cycles_time() -> None:
    stacks = Stack(["main", "work"], 70), Stack(["main"], 30)
    profile = profile_of(*stacks, **BY_CYCLES)
    assert amount_words(profile, 2.0) == "100 samples, 3.00G cycles, 0% in the kernel"
    found = read(pprof(profile, FACTS))
    assert found.types == [("samples", "count"), ("cycles", "count")]
    assert found.message.period == CYCLES
    assert sum(row.values[1] for row in found.rows) == 100 * CYCLES
    (everything,) = json.loads(speedscope(profile, FACTS))["profiles"]
    assert (everything["unit"], everything["endValue"]) == ("none", 100 * CYCLES)
    assert "self 70 (70%, 2.10G cycles)" in picture(profile, FACTS)
    data = re.search(r'"period":(\d+),"in_cycles":(\w+)', page(profile, FACTS))
    assert data
    assert data.groups() == (str(CYCLES), "true")
    (row, _) = records(batch_of(*stacks, **BY_CYCLES))
    assert (row["period_ns"], row["period_cycles"]) == (0, CYCLES)


def test_a_merged_profile_has_both() -> None:
    both = Profile()
    for head in (BY_CYCLES, {}):
        take(batch_of(Stack(["main"], 99), **head), both)
    assert amount_words(both, 1.0) == (
        "198 samples, 2.97G cycles, 1.00s of CPU time (1.00 CPUs), 0% in the kernel"
    )
