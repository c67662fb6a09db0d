"""Histograms by powers of two and by given bounds: adding them up, and reading quantiles."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coral.mesh.v1 import ebpf_pb2 as pb


@dataclass
class Histogram:
    """Counts of values in ns by powers of two; see Log2Histogram in the contract.

    `max_ns` is exact; a quantile lies within its slot, that is, within a factor of two.
    """

    first_exponent: int = 0
    counts: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    max_ns: int = 0

    @property
    def count(self) -> int:
        """How many values were added."""
        return int(self.counts.sum())

    def add(self, message: pb.Log2Histogram, max_ns: int) -> None:
        """Adds the values of another interval or another process. Raises ValueError where its slots
        begin at another exponent."""
        counts = np.zeros(max(message.slots, len(message.counts)), np.uint64)
        counts[: len(message.counts)] = message.counts
        self.add_counts(message.first_exponent, counts, max_ns)

    def add_counts(self, first_exponent: int, counts: NDArray[np.uint64], max_ns: int) -> None:
        """The same from counts by slot, of shape (slots,), such as a row of the column
        `latency_ns`, or the sum of its rows."""
        if not len(counts):
            return
        if len(self.counts) and first_exponent != self.first_exponent:
            raise ValueError(
                f"histograms from 2^{first_exponent} and from 2^{self.first_exponent} up cannot be "
                "added up"
            )
        self.first_exponent = first_exponent
        if len(self.counts) < len(counts):
            self.counts = np.pad(self.counts, (0, len(counts) - len(self.counts)))
        self.counts[: len(counts)] += counts
        self.max_ns = max(self.max_ns, max_ns)

    def quantile_ns(self, q: float) -> float:
        """The value that a share Q (0 to 1) of all values do not exceed, interpolated linearly
        inside its slot, and never above the greatest value. 0 where there are no values."""
        total = self.count
        if not total:
            return 0.0
        cumulative = self.counts.cumsum()
        slot = int(np.argmax((cumulative >= q * total) & (self.counts > 0)))
        below = float(cumulative[slot - 1]) if slot else 0.0
        lower = float(2 ** (self.first_exponent + slot)) if slot else 0.0
        upper = float(2 ** (self.first_exponent + slot + 1))
        share = (q * total - below) / float(self.counts[slot])
        return min(lower + (upper - lower) * share, float(self.max_ns))


@dataclass
class Buckets:
    """Counts of values by upper bounds; see BucketHistogram in the contract. `sum` adds up the
    values; `least` and `most` are the smallest and the greatest of them, where they are known."""

    bounds: tuple[int, ...] = ()
    counts: list[int] = field(default_factory=list)
    sum: int = 0
    least: int | None = None
    most: int | None = None

    @property
    def count(self) -> int:
        """How many values were added."""
        return sum(self.counts)

    def add(self, more: pb.BucketHistogram | Buckets) -> None:
        """Adds the values of another interval or another connection. Raises ValueError where the
        bounds differ."""
        if not more.counts:
            return
        bounds = tuple(more.bounds)
        least, most = (more.least, more.most) if isinstance(more, Buckets) else (None, None)
        if not self.counts:
            self.bounds, self.counts, self.sum = bounds, list(more.counts), more.sum
            self.least, self.most = least, most
            return
        if len(more.counts) != len(self.counts) or bounds != self.bounds:
            raise ValueError("histograms with other bounds cannot be added up")
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, more.counts, strict=True)]
        self.sum += more.sum
        self.least = None if self.least is None or least is None else min(self.least, least)
        self.most = None if self.most is None or most is None else max(self.most, most)

    def quantile(self, q: float) -> float:
        """The value that a share Q (0 to 1) of all values do not exceed, interpolated linearly
        inside its slot, and between `least` and `most`. Where `most` is not known, the last bound
        for values above all bounds. 0 where there are no values."""
        wanted, below = q * self.count, 0
        for slot, count in enumerate(self.counts):
            if count and below + count >= wanted:
                lower, upper = self._edges(slot)
                return lower + (upper - lower) * (wanted - below) / count
            below += count
        return 0.0

    def _edges(self, slot: int) -> tuple[int, int]:
        """Between which values those of SLOT lie."""
        above = slot >= len(self.bounds)
        lower = self.bounds[slot - 1] if slot else 0
        upper = lower if above else self.bounds[slot]
        if self.most is not None:
            upper = self.most if above else min(upper, self.most)
        if self.least is not None:
            lower = max(lower, self.least)
        return lower, max(lower, upper)
