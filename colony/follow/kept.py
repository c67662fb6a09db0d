"""Collectors that callers asked for, for longer than agents' leases: which lease to renew, and
until when. Loop-free; callers pass the time, in seconds of a monotonic clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from coral.wire.leases import MAX_LEASE_S

_AGAIN_S: Final = 5.0
MOST: Final = 100_000
"""Beyond this, what is asked for ends with its first lease."""


@dataclass(frozen=True, slots=True)
class Renewal:
    """A lease to renew, for `lease_s` seconds from now. `is_last` says that no further one is due:
    the collector ends with it."""

    agent_id: str
    collector_id: str
    lease_s: float
    is_last: bool


@dataclass(slots=True)
class _Kept:
    until_s: float
    due_s: float
    expires_s: float


class Kept:
    """What is kept at work. Every renewal of `due` is answered with `renewed`, `failed` or
    `forget`."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def started(self, agent_id: str, collector_id: str, duration_s: float, now_s: float) -> None:
        """A collector was started with a lease of MAX_LEASE_S, and is to live for DURATION_S."""
        if duration_s > MAX_LEASE_S and len(self._kept) < MOST:
            self._kept[agent_id, collector_id] = _Kept(
                now_s + duration_s, now_s + MAX_LEASE_S / 3, now_s + MAX_LEASE_S
            )

    def due(self, now_s: float) -> Sequence[Renewal]:
        """What to renew now. Those whose leases have run out are forgotten."""
        self._kept = {key: it for key, it in self._kept.items() if it.expires_s > now_s}
        return [
            Renewal(*key, min(it.until_s - now_s, MAX_LEASE_S), it.until_s - now_s <= MAX_LEASE_S)
            for key, it in self._kept.items()
            if it.due_s <= now_s
        ]

    def renewed(self, renewal: Renewal, now_s: float) -> None:
        """The agent did it."""
        key = renewal.agent_id, renewal.collector_id
        if renewal.is_last:
            self._kept.pop(key, None)
        elif kept := self._kept.get(key):
            kept.due_s, kept.expires_s = now_s + MAX_LEASE_S / 3, now_s + MAX_LEASE_S

    def failed(self, renewal: Renewal, now_s: float) -> None:
        """The agent did not answer: it is asked again, until the lease has run out."""
        if kept := self._kept.get((renewal.agent_id, renewal.collector_id)):
            kept.due_s = now_s + _AGAIN_S

    def forget(self, agent_id: str, collector_id: str) -> bool:
        """A collector is not kept at work any more; whether it was."""
        return self._kept.pop((agent_id, collector_id), None) is not None
