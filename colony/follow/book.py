"""The account of one session on its way to the store: batches become deliveries, each of which says
where every event since the one before is. Loop-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from coral.client import Account, Batch, CollectorInfo, ContractError
from coral.colony.delivery import AGENT_LOST, Delivery, Ended, Session, Standing
from coral.colony.follow.claims import by_named_stage, few, heard, short, started

_MOST: Final = (1 << 62) - 1
"""No session has so many events, and databases have no larger numbers."""
_STANDS_EVERY_NS: Final = 10_000_000_000
"""How often a session in which nothing happens says that it is still followed."""


def session_of(agent_id: str, info: CollectorInfo) -> Session:
    """The session that INFO describes."""
    return Session(
        agent_id=agent_id,
        collector_id=info.collector_id,
        kind=info.kind,
        service=short(info.service_name),
        started_ns=started(info.started_at_ns),
        config=few(info.config),
        attributes=few(info.message.attributes),
    )


class Book:
    """What has been delivered of a session, over all its streams and all lives of the colony.

    A session that the store has a STANDING of goes on after it; any other begins with its first
    event. `last_seq` is the number to resume after.
    """

    def __init__(self, session: Session, standing: Standing | None = None) -> None:
        self.session = session
        self.last_seq = standing.last_seq if standing else 0
        self.heard_ns = standing.updated_ns if standing else session.started_ns
        self.ended = standing.ended if standing else None
        self._produced = standing.produced if standing else 0
        self._lost_in_kernel: Mapping[str, int] = standing.lost_in_kernel if standing else {}
        self._told_ns = 0
        self._stream = Account(self.last_seq, self.last_seq, self._produced, 0, 0)

    def begin_stream(self) -> int:
        """A new stream is asked for; returns the number that it resumes after."""
        self._stream = Account(self.last_seq, self.last_seq, self._produced, 0, 0)
        return self.last_seq

    def is_told(self, produced: int) -> None:
        """The agent says that it has numbered this many events. Those that it cannot deliver any
        more, because it dies, are known to be lost."""
        self._produced = max(self._produced, min(produced, _MOST))

    def take(self, batch: Batch, account: Account, size_bytes: int, now_ns: int) -> Delivery | None:
        """BATCH, of SIZE_BYTES on the wire, as a delivery; ACCOUNT is that of its stream, up to it.
        None for a batch that says only what is known.

        A delivery without rows still tells what was lost, and every ten seconds that the session is
        followed. Raises `ContractError` for figures that cannot be; the book is then as it was.
        """
        lost = Counter(account.lost)
        lost.subtract(self._stream.lost)
        _check(account, lost)
        self._stream = account
        end = batch.end
        if end:
            self.ended = Ended(str(end.reason), short(end.detail), now_ns)
        self._learn(batch, account)
        after_seq, self.last_seq = self.last_seq, account.last_seq
        self.heard_ns = now_ns
        is_news = batch.count or end or account.last_seq > after_seq
        if not is_news and now_ns - self._told_ns < _STANDS_EVERY_NS:
            return None
        self._told_ns = now_ns
        return Delivery(
            session=self.session,
            batch=batch if batch.count else None,
            after_seq=after_seq,
            last_seq=self.last_seq,
            produced=self._produced,
            time_ns=heard(batch.message.interval_end_ns, now_ns),
            size_bytes=size_bytes,
            lost=by_named_stage(+lost),
            lost_in_kernel=self._lost_in_kernel,
            ended=self.ended,
        )

    def close_as_lost(self, why: str, now_ns: int) -> Delivery:
        """The delivery that ends a session which its agent does not have any more: events that the
        agent had numbered, as far as is known, are lost with it."""
        after_seq, self.last_seq = self.last_seq, max(self._produced, self.last_seq)
        self._produced = self.last_seq
        self.ended = Ended(AGENT_LOST, short(why), now_ns)
        lost = self.last_seq - after_seq
        return Delivery(
            session=self.session,
            batch=None,
            after_seq=after_seq,
            last_seq=self.last_seq,
            produced=self._produced,
            time_ns=now_ns,
            size_bytes=0,
            lost={AGENT_LOST: lost} if lost else {},
            lost_in_kernel=self._lost_in_kernel,
            ended=self.ended,
        )

    def _learn(self, batch: Batch, account: Account) -> None:
        self._produced = max(self._produced, account.produced)
        lost_in_kernel = by_named_stage(account.lost_in_kernel)
        if lost_in_kernel != self._lost_in_kernel:
            self._lost_in_kernel = dict(Counter(self._lost_in_kernel) | Counter(lost_in_kernel))
        if batch.message.attributes and batch.message.attributes != self.session.attributes:
            self.session = replace(self.session, attributes=few(batch.message.attributes))


def _check(account: Account, lost: Counter[str]) -> None:
    """Beside what the stream itself has checked: LOST since the batch before."""
    if account.filtered:
        raise ContractError(f"{account.filtered} events were filtered, and no filter was given")
    if min(lost.values(), default=0) < 0:
        raise ContractError(f"fewer events are lost than before: {dict(lost)}")
    figures = (account.last_seq, account.produced, *account.lost_in_kernel.values())
    if max(figures) > _MOST:
        raise ContractError(f"a session cannot have {max(figures):,} events")
