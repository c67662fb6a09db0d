"""What each caller may have at a time, by the role that it was let in with. Loop-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakValueDictionary

from coral.agent.caller import Allowance
from coral.agent.errors import LimitError
from coral.agent.rate import Bucket


class CallerQuotas:
    """How many sessions and streams callers have, and the rates that their streams share."""

    def __init__(self) -> None:
        self._sessions: Counter[str] = Counter()  # by principal
        self._streams: Counter[str] = Counter()
        # While a stream holds it: all streams of one caller have the same.
        self._rates: WeakValueDictionary[tuple[str, int], Bucket] = WeakValueDictionary()

    @contextmanager
    def session(self, principal: str, allowance: Allowance) -> Iterator[None]:
        """One more session, from its start to its end. Raises `LimitError`."""
        of = _Limit(f"{allowance.key}.quotas.sessions", allowance.sessions, "collectors")
        with _one(self._sessions, principal, of):
            yield

    @contextmanager
    def stream(self, principal: str, allowance: Allowance) -> Iterator[None]:
        """One more stream. Raises `LimitError`."""
        of = _Limit(f"{allowance.key}.quotas.streams", allowance.streams, "streams")
        with _one(self._streams, principal, of):
            yield

    def rate(self, principal: str, allowance: Allowance) -> Bucket | None:
        """What all streams of a caller take from together; None where only the agent's limits
        count. A second's worth, at most, may come at once."""
        if not (rate_bytes_s := allowance.bytes_per_second):
            return None
        bucket = self._rates.get((principal, rate_bytes_s))
        if bucket is None:
            bucket = Bucket(rate_bytes_s, rate_bytes_s)
            self._rates[principal, rate_bytes_s] = bucket
        return bucket


class _Limit(NamedTuple):
    """At most MOST at a time; 0 is without a limit."""

    name: str
    most: int
    things: str


@contextmanager
def _one(taken: Counter[str], principal: str, of: _Limit) -> Iterator[None]:
    if of.most and taken[principal] >= of.most:
        raise LimitError(
            f"{of.name} is {of.most}, and {principal} has {taken[principal]} {of.things}: end one, "
            "or wait for one to end",
            of.name,
        )
    taken[principal] += 1
    try:
        yield
    finally:
        taken[principal] -= 1
        if not taken[principal]:
            del taken[principal]
