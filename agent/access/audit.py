"""The audit: a JSON line for each decision about a caller, and for the end of each session.

With them, every session can be followed from who started it to how it ended. This module makes the
lines; its sinks may be slow, full or broken, and hold up nobody.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol

from coral.agent.access.rpcs import short
from coral.agent.caller import Caller

if TYPE_CHECKING:
    from coral.agent.access.access import Verdict

_MOST_TEXT: Final = 1024  # characters of a value that a caller chose
_MOST_ITEMS: Final = 64
_PATIENCE_S: Final = 0.1  # of the end of the agent, which has little time


class Sink(Protocol):
    """Where lines go."""

    @property
    def dropped(self) -> int:
        """Lines that could not be written, or not in time."""

    def put(self, line: str) -> None:
        """Queues LINE, or drops it. Never blocks, never raises."""

    def start(self) -> None:
        """Starts to write."""

    def close(self, patience_s: float) -> None:
        """Writes what waits, for at most PATIENCE_S seconds."""


class Audit:
    """The lines of the agent NAME, on their way to SINKS."""

    def __init__(self, name: str, sinks: Sequence[Sink] = ()) -> None:
        self._name = name
        self._sinks = sinks
        self._putting = threading.Lock()  # what joins a session comes from a thread
        for sink in sinks:
            sink.start()
        self.decisions: Counter[str] = Counter({"allowed": 0, "refused": 0})
        self.lines = 0

    @property
    def dropped(self) -> int:
        """Lines that could not be written, or not in time, over all sinks."""
        return sum(sink.dropped for sink in self._sinks)

    def close(self) -> None:
        """Writes what waits, for a short while."""
        for sink in self._sinks:
            sink.close(_PATIENCE_S)

    def decided(
        self,
        caller: Caller,
        rpc: str,
        verdict: Verdict,
        *,
        asked: Mapping[str, object] | None = None,
        resolved: Mapping[str, object] | None = None,
        session: str = "",
        limit: str = "",
    ) -> None:
        """A decision about a call of RPC, by its full name. ASKED is the target in the request's
        words, RESOLVED what it came to; SESSION is the session's id, LIMIT the name of what stands
        against it."""
        word = "allowed" if verdict.allowed else "refused"
        self.decisions[word] += 1
        if not self._sinks:
            return
        line: dict[str, object] = {
            "event": "decision",
            "who": caller.identity.principal,
            "how": caller.identity.how,
            "names": list(caller.identity.names),
            "peer": caller.peer,
            "rpc": short(rpc),
            "verdict": word,
            "role": str(verdict.role),
            "reason": verdict.reason,
        }
        if asked is not None:
            line["asked"] = asked
        if resolved is not None:
            line["resolved"] = resolved
        if limit:
            line["limit"] = limit
        if session:
            line["session"] = session
        self._put(line)

    def joined(self, session: str, pods: Sequence[str], left_out: Sequence[str]) -> None:
        """PODS, by their names, have come to what a session watches; LEFT_OUT are those that it may
        not watch. Safe to call from any thread."""
        for event, names in (("joined", pods), ("left out", left_out)):
            if names:
                some = list(names[:_MOST_ITEMS])
                self._put({"event": event, "session": session, "pods": some, "number": len(names)})

    def continuous(
        self, session: str, asked: Mapping[str, object], resolved: Mapping[str, object]
    ) -> None:
        """A session of the configuration starts."""
        self._put(
            {"event": "continuous", "who": "configuration", "asked": asked, "resolved": resolved,
             "session": session}
        )  # fmt: skip

    def ended(self, session: str, end: str, produced: int) -> None:
        """A session has ended, or could not start; END says how, PRODUCED how many events it
        numbered."""
        self._put({"event": "end", "session": session, "end": end, "produced": produced})

    def _put(self, values: Mapping[str, object]) -> None:
        if not self._sinks:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": now, "agent": self._name, **values}
        text = json.dumps(_bounded(line), separators=(",", ":"))
        with self._putting:
            self.lines += 1
            for sink in self._sinks:
                sink.put(text)


def _bounded(value: object) -> object:
    """VALUE with long texts and lists cut off."""
    if isinstance(value, str):
        return value if len(value) <= _MOST_TEXT else f"{value[:_MOST_TEXT]}[...]"
    if isinstance(value, Mapping):
        items = list(value.items())[:_MOST_ITEMS]
        return {str(_bounded(str(key))): _bounded(below) for key, below in items}
    if isinstance(value, list | tuple):
        return [_bounded(each) for each in value[:_MOST_ITEMS]]
    return value
