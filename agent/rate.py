"""A rate with a burst. Loop-free."""

from __future__ import annotations


class Bucket:
    """A token bucket that lends: it holds BURST at first and at most, and RATE a second flows in.
    What is taken beyond that is a debt, and nothing more should be taken until the rate has paid
    it. So an amount larger than the burst passes too."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._filled_at_s = 0.0

    def take(self, amount: float, now_s: float) -> bool:
        """Takes AMOUNT, on credit where there is not enough, unless there is a debt; returns
        whether it did."""
        if self.wait_s(now_s):
            return False
        self._level -= amount
        return True

    def spend(self, amount: float, now_s: float) -> None:
        """Takes AMOUNT in any case: for what has already been used."""
        self._fill(now_s)
        self._level -= amount

    def wait_s(self, now_s: float) -> float:
        """How long until the debt is paid, in seconds; 0 without one."""
        self._fill(now_s)
        return max(0.0, -self._level / self._rate)

    def is_full(self, now_s: float) -> bool:
        """Whether a new bucket would behave the same."""
        self._fill(now_s)
        return self._level >= self._burst

    def _fill(self, now_s: float) -> None:
        passed_s = now_s - self._filled_at_s
        self._filled_at_s = now_s
        self._level = min(self._burst, self._level + passed_s * self._rate)


class Buckets:
    """Several buckets that are taken from together."""

    def __init__(self, *buckets: Bucket) -> None:
        self._buckets = buckets

    def take(self, amount: float, now_s: float) -> bool:
        """Takes AMOUNT from each, unless one has a debt; returns whether it did."""
        if any(bucket.wait_s(now_s) for bucket in self._buckets):
            return False
        return all(bucket.take(amount, now_s) for bucket in self._buckets)

    def spend(self, amount: float, now_s: float) -> None:
        """Takes AMOUNT from each in any case."""
        for bucket in self._buckets:
            bucket.spend(amount, now_s)


def both(one: Bucket | None, other: Bucket | None) -> Bucket | Buckets | None:
    """What takes from those that there are."""
    if one and other:
        return Buckets(one, other)
    return one or other
