"""What an answer of a colony was made from, and what is missing in it, as plain data. All times are
Unix times in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from coral.mesh.colony.v1 import colony_pb2 as pb


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the window, and the rows that were used for it: "raw", "1m" or "1h"."""

    tier: str
    from_ns: int
    to_ns: int


@dataclass(frozen=True, slots=True)
class Lost:
    """Events that are in no row: at which stage, of what, and when."""

    stage: str
    count: int
    kind: str
    service: str
    agent: str
    from_ns: int
    to_ns: int


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which an agent could not be reached; `to_ns` is None where it still cannot."""

    agent: str
    from_ns: int
    to_ns: int | None
    why: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """The window of an answer; up to when everything had arrived, if any collector is at work; when
    the colony looked; how many rows were used and are answered; whether rows were left out (`cut`),
    and how many, where that is known; what is missing. `message` is the contract's own."""

    from_ns: int
    to_ns: int
    complete_to_ns: int | None
    as_of_ns: int
    rows_used: int
    rows: int
    cut: bool
    left_out: int
    pieces: Sequence[Piece]
    lost: Sequence[Lost]
    gaps: Sequence[Gap]
    notes: Sequence[str]
    against: Coverage | None
    message: pb.Coverage

    @classmethod
    def of(cls, message: pb.Coverage) -> Self:
        """From the contract's message."""
        return cls(
            from_ns=_time(message, "from"),
            to_ns=_time(message, "to"),
            complete_to_ns=_time_or_none(message, "complete_to"),
            as_of_ns=_time(message, "as_of"),
            rows_used=message.rows_used,
            rows=message.rows,
            cut=message.cut,
            left_out=message.left_out,
            pieces=tuple(
                Piece(it.tier, _time(it, "from"), _time(it, "to")) for it in message.pieces
            ),
            lost=tuple(
                Lost(
                    it.stage,
                    it.count,
                    it.kind,
                    it.service,
                    it.agent,
                    _time(it, "from"),
                    _time(it, "to"),
                )
                for it in message.lost
            ),
            gaps=tuple(
                Gap(it.agent, _time(it, "from"), _time_or_none(it, "to"), it.why)
                for it in message.gaps
            ),
            notes=tuple(message.notes),
            against=cls.of(message.against) if message.HasField("against") else None,
            message=message,
        )

    @property
    def lost_events(self) -> int:
        """How many events are in no row."""
        return sum(it.count for it in self.lost)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is known to be missing."""
        return not (self.lost or self.gaps or (self.against and not self.against.is_whole))


def _time(message: Any, field: str) -> int:  # noqa: ANN401  any message
    return int(getattr(message, field).ToNanoseconds())


def _time_or_none(message: Any, field: str) -> int | None:  # noqa: ANN401
    return _time(message, field) if message.HasField(field) else None
