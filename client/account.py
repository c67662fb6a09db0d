"""The books of one stream, kept by its reader: where every event is, over all connections.

The agent's own account begins at 0 with every call. The `Ledger` adds the calls up, counts the rows
itself, and checks the contract's promise at each batch. It does no I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from coral.client.batch import Batch
from coral.client.errors import ContractError
from coral.client.results import by_stage


@dataclass(frozen=True, slots=True)
class Account:
    """Where the events of a session are, as one stream sees it up to event number `last_seq`:

        last_seq - after_seq = delivered + filtered + the sum of lost

    `lost` are events that had a number, by stage. `lost_in_kernel` counts on top, by stage, and
    `produced` counts all events numbered: both since the session began.
    """

    after_seq: int
    last_seq: int
    produced: int
    delivered: int
    filtered: int
    lost: Mapping[str, int] = field(default_factory=dict)
    lost_in_kernel: Mapping[str, int] = field(default_factory=dict)


class Ledger:
    """The account of a stream that begins after event number AFTER_SEQ."""

    def __init__(self, after_seq: int) -> None:
        self.last_seq = after_seq
        self._after_seq = after_seq
        self._produced = 0
        self._lost_in_kernel: Counter[str] = Counter()
        # Of the calls before this one, and of this one.
        self._before = _Call(after_seq)
        self._call = _Call(after_seq)

    @property
    def account(self) -> Account:
        """The account as of now."""
        before, call = self._before, self._call
        return Account(
            after_seq=self._after_seq,
            last_seq=self.last_seq,
            produced=max(self._produced, self.last_seq),
            delivered=before.delivered + call.delivered,
            filtered=before.filtered + call.filtered,
            lost=dict(before.lost + call.lost),
            lost_in_kernel=dict(self._lost_in_kernel),
        )

    def begin_call(self) -> int:
        """A new call resumes the stream; returns the number to resume after. Safe to call again,
        for a call that failed."""
        self._before.delivered += self._call.delivered
        self._before.filtered += self._call.filtered
        self._before.lost.update(self._call.lost)
        self._call = _Call(self.last_seq)
        return self.last_seq

    def take(self, batch: Batch) -> bool:
        """Books a batch; False for one whose events have been delivered before. Raises
        `ContractError` where the agent's numbers do not add up."""
        last_seq = self.last_seq
        if batch.last_seq <= last_seq and (batch.count or batch.last_seq < last_seq):
            if batch.end is None:
                return False
            raise ContractError(f"the session ended at event {batch.last_seq}, before {last_seq}")
        if batch.count and batch.first_seq <= last_seq:
            raise ContractError(
                f"events {batch.first_seq} to {batch.last_seq} came, and those up to number "
                f"{last_seq} had come before"
            )
        call = self._call
        told = batch.message.account
        call.delivered += batch.count
        call.filtered = told.filtered
        call.lost = Counter(by_stage(told.lost))
        self.last_seq = batch.last_seq
        self._produced = max(self._produced, batch.message.produced)
        # A batch that was kept for a resume says what was lost up to then.
        self._lost_in_kernel |= Counter(by_stage(batch.message.lost_in_kernel))
        self._check(batch)
        return True

    def _check(self, batch: Batch) -> None:
        call = self._call
        explained = call.delivered + call.filtered + call.lost.total()
        if self.last_seq - call.after_seq != explained:
            raise ContractError(
                f"of the events {call.after_seq + 1} to {self.last_seq}, {explained} are accounted "
                f"for: {call.delivered} delivered, {call.filtered} filtered, lost: "
                f"{dict(call.lost) or 'none'}"
            )
        end = batch.end
        if end is None:
            return
        self._produced = max(self._produced, end.produced)
        self._lost_in_kernel |= Counter(end.lost_in_kernel)
        if self._produced != self.last_seq:
            raise ContractError(
                f"the session ended after {self._produced} events, and those after number "
                f"{self.last_seq} are not accounted for"
            )


@dataclass(slots=True)
class _Call:
    after_seq: int
    delivered: int = 0
    filtered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
