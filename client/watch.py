"""Watching which collectors an agent has, over as many connections as it takes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Self

from coral.client.calls import RepeatedCall
from coral.client.connection import parsed
from coral.client.results import CollectorInfo
from coral.mesh.v1 import ebpf_pb2 as pb


class What(Enum):
    """What happened."""

    PRESENT = "present"
    """The collector was at work when the watch began."""
    SYNCED = "synced"
    """All that were at work have been reported."""
    STARTED = "started"
    ENDED = "ended"
    """`collector.end` says how."""
    RECONNECTED = "reconnected"
    """The connection broke and was made again. What happened meanwhile is not known: forget the
    collectors reported so far; PRESENT, for each one at work now, and SYNCED follow."""


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that happened to the collectors of an agent. `collector` is None for SYNCED and
    RECONNECTED."""

    what: What
    collector: CollectorInfo | None = None


class Watch:
    """Iterate over it to get changes. It does not end by itself; it raises `UnavailableError` when
    the agent stays away for too long, `ContractError` for what is no change. A read may be
    cancelled."""

    def __init__(self, calls: RepeatedCall) -> None:
        self._calls = calls
        self._reported = 1  # calls that the caller knows of
        self._held: Change | None = None  # comes after RECONNECTED

    async def open(self) -> None:
        """Returns when the watch stands. Raises `AgentError`."""
        await self._calls.open()
        self._reported = self._calls.stood

    def close(self) -> None:
        """Ends the watch."""
        self._calls.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        if self._held:
            change, self._held = self._held, None
            return change
        while True:
            wire = await self._calls.read()
            if wire is None:  # the agent shuts down; another one may follow
                self._calls.close()
                continue
            coming = _change(parsed(pb.CollectorChange, wire))
            if self._reported != self._calls.stood:
                self._reported, self._held = self._calls.stood, coming
                return Change(What.RECONNECTED)
            if coming:
                return coming


def _change(message: pb.CollectorChange) -> Change | None:
    """The change; None for one that only newer clients know."""
    name = pb.CollectorChange.What.DESCRIPTOR.values_by_number.get(message.what)
    try:
        what = What(name.name.removeprefix("WHAT_").lower() if name else "")
    except ValueError:
        return None
    collector = CollectorInfo.of(message.collector) if message.HasField("collector") else None
    return Change(what, collector)
