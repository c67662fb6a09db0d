"""How the sources of names stand: which are used, which have stopped to answer, and for how long
what they said before still counts. A core without sockets or threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from coral.agent.machine.pods.source import SourceState

SOURCES: Final = ("api", "kubelet", "cri")
"""The sources of names, that which knows most first."""


@dataclass
class _Standing:
    about: str = ""  # which it is, as of its last answer
    answered_s: float | None = None
    why_not: str = "it was not asked yet"  # empty while it answers


@dataclass
class Standings:
    """The sources of names, by name. One that has answered and does not any more is stale: its
    facts are kept, and count for STALE_AFTER_S seconds for what is asked from then on."""

    stale_after_s: float
    clock: Callable[[], float] = time.monotonic
    _of: dict[str, _Standing] = field(default_factory=lambda: {s: _Standing() for s in SOURCES})

    def answered(self, name: str, about: str) -> None:
        """A source has said all that it knows, or what has changed."""
        self._of[name] = _Standing(about, self.clock(), "")

    def failed(self, name: str, why_not: str) -> None:
        """It cannot be asked, or does not answer."""
        self._of[name].why_not = why_not

    def alive(self, name: str) -> None:
        """A source that tells by itself is there, though nothing has changed."""
        if not self._of[name].why_not:
            self._of[name].answered_s = self.clock()

    def is_used(self, name: str) -> bool:
        """Whether its facts count for what is asked now."""
        it = self._of[name]
        if it.answered_s is None:
            return False
        return not it.why_not or self.clock() - it.answered_s <= self.stale_after_s

    @property
    def knows_names(self) -> bool:
        """Whether any of them does."""
        return any(map(self.is_used, SOURCES))

    @property
    def order(self) -> list[str]:
        """All of them, that which counts most first: what one said before it became silent must not
        stand for ever against what another one says now."""
        return sorted(SOURCES, key=lambda name: not self.is_used(name))

    @property
    def stale_s(self) -> Mapping[str, float]:
        """For how many seconds each that has ever answered has not; 0 for one that does."""
        return {
            name: self.clock() - it.answered_s if it.why_not else 0.0
            for name, it in self._of.items()
            if it.answered_s is not None
        }

    def states(self) -> Iterator[SourceState]:
        """Each, in words."""
        for name, it in self._of.items():
            if it.answered_s is None or not it.why_not:
                yield SourceState(name, it.answered_s is not None, it.why_not or it.about)
                continue
            ago_s = self.clock() - it.answered_s
            used = self.is_used(name)
            rest = "counts" if used else "no longer counts"
            detail = f"stale: what it said {ago_s:.0f} s ago {rest}; {it.why_not}"
            yield SourceState(name, used, f"{it.about}, {detail}" if it.about else detail)

    def notes(self) -> Iterator[str]:
        """What those who ask for pods may not expect."""
        for name, it in self._of.items():
            if it.why_not and it.answered_s is not None and self.is_used(name):
                ago_s = self.clock() - it.answered_s
                yield (
                    f"the source {name} has not answered for {ago_s:.0f} s: pods are those that it "
                    f"knew then; {it.why_not}"
                )
