"""Sessions that saw the same at the same time: a continuous one, and one that somebody asked for
beside it. Only the first to begin counts; the others are left out for as long as both were at work,
as an agent's own metrics do it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

# Options that change how often or how finely it is told, and not what is seen.
_MANNER: Final = frozenset({"interval", "frequency", "stack_bytes", "by"})
_FOREVER_NS: Final = 1 << 62


@dataclass(frozen=True, slots=True)
class Watch:
    """A session, as the ledger has it; `config` is JSON, `ended_ns` None while it is at work."""

    agent: str
    session: str
    kind: str
    service: str
    config: str
    started_ns: int
    ended_ns: int | None

    @property
    def is_summary(self) -> bool:
        """Whether it fills the tables of summaries."""
        return bool(json.loads(self.config or "{}").get("mode") != "events")

    @property
    def target(self) -> tuple[str, ...]:
        """The same for sessions that see the same."""
        config = json.loads(self.config or "{}")
        seen = {key: text for key, text in config.items() if key not in _MANNER}
        return self.agent, self.kind, self.service, json.dumps(seen, sort_keys=True)


@dataclass(frozen=True, slots=True)
class Repeat:
    """The rows of a session that end in this time repeat those of another."""

    agent: str
    session: str
    from_ns: int
    to_ns: int


def repeats(watches: Iterable[Watch]) -> Iterator[Repeat]:
    """What is left out of the sessions WATCHES."""
    alike: dict[tuple[str, ...], list[Watch]] = {}
    for watch in watches:
        if watch.is_summary:
            alike.setdefault(watch.target, []).append(watch)
    for same in alike.values():
        until_ns = 0
        for watch in sorted(same, key=lambda it: (it.started_ns, it.session)):
            ended_ns = watch.ended_ns if watch.ended_ns is not None else _FOREVER_NS
            if watch.started_ns < until_ns:
                to_ns = min(until_ns, ended_ns)
                yield Repeat(watch.agent, watch.session, watch.started_ns, to_ns)
            until_ns = max(until_ns, ended_ns)


def overlapping(
    watches: Sequence[Watch], found: Sequence[Repeat]
) -> Iterator[tuple[str, str, str]]:
    """The kind, service and agent of sessions of one service that overlapped and differ in what
    they saw, so that nobody can say which part of it is in both."""
    left_out = {(it.agent, it.session) for it in found}
    alike: dict[tuple[str, str, str], list[Watch]] = {}
    for watch in watches:
        if watch.is_summary and (watch.agent, watch.session) not in left_out:
            alike.setdefault((watch.kind, watch.service, watch.agent), []).append(watch)
    for key, same in alike.items():
        until_ns = 0
        for watch in sorted(same, key=lambda it: it.started_ns):
            if watch.started_ns < until_ns:
                yield key
                break
            ended_ns = watch.ended_ns if watch.ended_ns is not None else _FOREVER_NS
            until_ns = max(until_ns, ended_ns)
