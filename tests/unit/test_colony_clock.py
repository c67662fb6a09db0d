"""The colony's own time while the machine's clock is set."""

from __future__ import annotations

from dataclasses import dataclass

from coral.colony.clock import Clock

SECOND_NS = 10**9
YEAR_NS = 365 * 86_400 * SECOND_NS


@dataclass
class Machine:
    wall_ns: int = 60 * YEAR_NS
    elapsed_ns: int = 5

    def passes(self, seconds: int) -> None:
        self.wall_ns += seconds * SECOND_NS
        self.elapsed_ns += seconds * SECOND_NS


def test_a_step_that_is_taken_back_is_not_seen_and_one_that_stays_is() -> None:
    it = Machine()
    clock = Clock(lambda: it.wall_ns, lambda: it.elapsed_ns)
    it.passes(100)
    it.wall_ns += 59 * 60 * SECOND_NS  # as operators and time servers do
    assert clock() == it.wall_ns
    for step_ns in (YEAR_NS, -2 * YEAR_NS):
        right_ns = it.wall_ns
        it.wall_ns += step_ns
        for _ in range(14):
            it.passes(60)
            assert clock() == it.wall_ns - step_ns
        it.wall_ns -= step_ns
        assert clock() == it.wall_ns == right_ns + 14 * 60 * SECOND_NS
    it.wall_ns += YEAR_NS
    assert clock() == it.wall_ns - YEAR_NS
    it.passes(901)
    assert clock() == it.wall_ns
    it.passes(7 * 86_400)  # suspended
    assert clock() == it.wall_ns
