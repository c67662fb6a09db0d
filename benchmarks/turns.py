"""Variants of one measurement, each in turn, so that what the machine does to one it mostly does to
the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from benchmarks.bench import Bench
from benchmarks.peers import PeerError


class Variant(Protocol):
    """One way to do what is measured."""

    name: str
    failure: str  # why it cannot be measured here; empty while it can

    async def measure(self, bench: Bench) -> None:
        """Takes one more sample. Raises `PeerError` where it cannot be measured here."""


async def measure_each(bench: Bench, variants: Sequence[Variant], turn: int) -> None:
    """Measures each of VARIANTS once. A different one is first in each TURN, so that no variant
    always follows the same other."""
    first = turn % len(variants)
    for variant in (*variants[first:], *variants[:first]):
        if variant.failure:
            continue
        try:
            await variant.measure(bench)
        except PeerError as error:
            variant.failure = str(error)
            bench.say(f"{variant.name} cannot be measured here: {error}")
