"""Unix time of the programs' times, by clocks that are stepped, suspended and read slowly."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.collectors.clock import Reading, UnixClock, read_clocks

BEGAN_NS = 1_700_000_000_000_000_000
SECOND = 1_000_000_000
ACCURACY_NS = 1_000


@dataclass
class Machine:
    """The clocks of a machine, and how long each reading of one takes."""

    monotonic_ns: int = 50 * SECOND
    suspended_ns: int = 7 * SECOND
    setting_ns: int = BEGAN_NS
    delays_ns: list[int] = field(default_factory=list)

    def _now(self) -> int:
        self.monotonic_ns += self.delays_ns.pop(0) if self.delays_ns else 40
        return self.monotonic_ns

    def read(self) -> Reading:
        boot = self._now() + self.suspended_ns
        monotonic = self._now()
        unix = self._now() + self.suspended_ns + self.setting_ns
        return Reading(boot, monotonic, unix, self._now() + self.suspended_ns)

    @property
    def unix_ns(self) -> int:
        """The true Unix time."""
        return self.monotonic_ns + self.suspended_ns + self.setting_ns


def unix_ns(clock: UnixClock, *times: int) -> list[int]:
    """Of TIMES, in the same way in an array and by themselves."""
    result: list[int] = clock.unix_ns(np.array(times, np.uint64)).tolist()
    assert clock.unix_ns_of(*times) == result
    return result


def test_a_reading_that_is_interrupted_changes_nothing() -> None:
    machine = Machine()
    clock = UnixClock(machine.read)
    (first,) = unix_ns(clock, 50 * SECOND)
    assert abs(first - (BEGAN_NS + 57 * SECOND)) < ACCURACY_NS
    for where in range(4):  # 4.5 ms, as measured, before each of the clocks
        machine.delays_ns = [40] * where + [4_500_000]
        assert unix_ns(clock, 50 * SECOND) == [first]


@given(st.lists(st.integers(1, 10_000_000), min_size=20, max_size=200))
def test_the_first_value_is_that_of_the_best_reading(delays_ns: list[int]) -> None:
    machine = Machine(delays_ns=[*delays_ns])
    (first,) = unix_ns(UnixClock(machine.read), 0)
    widths = [sum(delays_ns[start + 1 : start + 4]) for start in range(0, 20, 4)]
    assert abs(first - (machine.suspended_ns + BEGAN_NS)) <= min(widths)


@pytest.mark.parametrize("step_ns", [-3600 * SECOND, -5_000, 5_000, 25_000_000])
def test_a_step_moves_earlier_times_too(step_ns: int) -> None:
    machine = Machine()
    clock = UnixClock(machine.read)
    before = unix_ns(clock, SECOND, 40 * SECOND)
    machine.setting_ns += step_ns
    after = unix_ns(clock, SECOND, 40 * SECOND, machine.monotonic_ns)
    for was, now in zip(before, after[:2], strict=True):
        assert abs(now - was - step_ns) < ACCURACY_NS
    assert abs(after[2] - machine.unix_ns) < ACCURACY_NS
    assert unix_ns(clock, SECOND) == after[:1]


def test_small_steps_are_not_missed_for_ever() -> None:
    machine = Machine()
    clock = UnixClock(machine.read)
    for _ in range(100):
        machine.setting_ns += 100
        (now,) = unix_ns(clock, machine.monotonic_ns)
        assert abs(now - machine.unix_ns) < 2 * ACCURACY_NS


def test_a_suspend_moves_only_what_comes_after() -> None:
    machine = Machine()
    clock = UnixClock(machine.read)
    before = unix_ns(clock, SECOND, machine.monotonic_ns)
    looked_ns = machine.monotonic_ns
    machine.monotonic_ns += SECOND
    machine.suspended_ns += 3600 * SECOND
    machine.monotonic_ns += SECOND
    assert unix_ns(clock, SECOND, 50 * SECOND)[0] == before[0]
    now_ns, true_ns = machine.monotonic_ns, machine.unix_ns
    since, now = unix_ns(clock, looked_ns + SECOND, now_ns)
    assert abs(now - true_ns) < ACCURACY_NS
    assert now - since == now_ns - looked_ns - SECOND
    machine.suspended_ns += SECOND  # and again
    machine.setting_ns += 5 * SECOND  # and a step
    times = unix_ns(clock, SECOND, looked_ns + SECOND, machine.monotonic_ns)
    assert abs(times[0] - before[0] - 5 * SECOND) < ACCURACY_NS
    assert abs(times[1] - since - 5 * SECOND) < ACCURACY_NS
    assert abs(times[2] - machine.unix_ns) < ACCURACY_NS


@pytest.mark.timed
def test_the_real_clocks_agree_with_each_other() -> None:
    clock = UnixClock()
    at_ns, unix = time.monotonic_ns(), time.time_ns()
    (first,) = unix_ns(clock, at_ns)
    assert abs(first - unix) < 20_000_000  # the two were not read at once
    assert all(unix_ns(clock, at_ns) == [first] for _ in range(10_000))
    assert abs(clock.now_ns() - time.time_ns()) < 20_000_000
    assert read_clocks().width_ns >= 0


def test_it_takes_arrays_of_any_shape_and_leaves_them_alone() -> None:
    clock = UnixClock(Machine().read)
    times = np.arange(6, dtype=np.uint64).reshape(2, 3)
    assert clock.unix_ns(times).dtype == np.int64
    assert np.diff(clock.unix_ns(times), axis=1).tolist() == [[1, 1], [1, 1]]
    assert times.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert clock.unix_ns(times[:0]).shape == (0, 3)
