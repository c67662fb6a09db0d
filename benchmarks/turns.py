"""Variants of one measurement, each in turn, so that what the machine does to one it mostly does to
the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from benchmarks import kernel
from benchmarks.bench import Bench
from benchmarks.peers import PeerError
from benchmarks.report import not_measured


class Variant(Protocol):
    """One way to do what is measured."""

    name: str
    failure: str  # why it cannot be measured here; empty while it can

    async def measure(self, bench: Bench) -> None:
        """Takes one more sample. Raises `PeerError` where it cannot be measured here."""


async def measure_in_turns(
    bench: Bench, variants: Sequence[Variant], rounds: int, progress: Callable[[], str]
) -> list[str]:
    """Measures each of VARIANTS once in each round, and says the PROGRESS after it. Returns
    remarks: what could not be measured, and what may have disturbed the others."""
    disturbed = 0
    for turn in range(rounds):
        foreign = kernel.foreign_programs()
        # A different one is first each time, so that no variant always follows the same other.
        first = turn % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            if not variant.failure:
                await _measure(bench, variant)
        disturbed += foreign or kernel.foreign_programs()
        bench.say(f"round {turn + 1} of {rounds}: {progress()}")
    remarks = list(not_measured({v.name: v.failure for v in variants if v.failure}))
    if disturbed:
        remarks.append(
            f"around {disturbed} of {rounds} rounds others had programs loaded on this machine: "
            "they may have slowed everything, bare runs too"
        )
    return remarks


async def _measure(bench: Bench, variant: Variant) -> None:
    try:
        await variant.measure(bench)
    except PeerError as error:
        variant.failure = str(error)
        bench.say(f"{variant.name} cannot be measured here: {error}")
