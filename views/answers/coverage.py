"""What an answer covers, in a line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Final

from coral.client import Coverage, Gap, Lost

_MOST_NAMED: Final = 3
_NS_PER_S: Final = 1_000_000_000
_SKIPPED: Final = "program_missed"
"""A run that the kernel skipped may have concerned no event that was to be seen."""
_WHY: Final = {
    "kernel_buffer": ": the kernel's buffer was full",
    "map_full": ": a table in the kernel was full",
    "program_missed": ": the kernel skipped a program that ran already",
    "kernel_busy": ": a table in the kernel was locked",
    "truncated": ": too large for a record",
    "rate_limit": ": beyond the agent's limit for a reader",
    "subscriber_queue": ": the colony read too slowly",
    "replay_evicted": ": the colony came too late",
    "agent_lost": ": the agent ended before it had sent them",
    "unreadable": ": the colony could not read them",
    "bus_evicted": ": the bus dropped them before they were read",
    "bus_too_large": ": larger than the bus takes",
}
"""What became of the events of a stage; for others its name says what there is to say."""
_TIERS: Final = {"raw": "raw", "1m": "minutes", "1h": "hours"}


def coverage_line(coverage: Coverage) -> str:
    """`complete to 12:03:10`, or what is missing; then which rows were used."""
    parts = [*_missing(coverage)]
    if coverage.against:
        parts += [f"before: {text}" for text in _missing(coverage.against)]
    reached = _reached(coverage)
    if not parts:
        parts = [reached or f"as of {clock(coverage.as_of_ns)}"]
    elif reached:
        parts.append(reached)
    if coverage.cut:
        parts.append(f"{coverage.left_out:,} more rows" if coverage.left_out else "more rows")
    return "; ".join(parts)


def source_line(coverage: Coverage) -> str:
    """`from 1,234 rows (raw, minutes), 12:00-12:15`: which rows the answer is made of."""
    text = f"from {coverage.rows_used:,} row{'' if coverage.rows_used == 1 else 's'}"
    if coverage.pieces:
        tiers = dict.fromkeys(_TIERS.get(piece.tier, piece.tier) for piece in coverage.pieces)
        text += f" ({', '.join(tiers)})"
    return f"{text}, {span(coverage.from_ns, coverage.to_ns)}"


def _reached(coverage: Coverage) -> str:
    if coverage.complete_to_ns is None:
        return ""
    return f"complete to {clock(min(coverage.complete_to_ns, coverage.to_ns), coverage.as_of_ns)}"


def _missing(coverage: Coverage) -> Iterator[str]:
    known = [it for it in coverage.lost if it.stage != _SKIPPED]
    if known:
        yield f"missing: {_lost(known, coverage.as_of_ns)}"
    if skipped := [it for it in coverage.lost if it.stage == _SKIPPED]:
        yield f"perhaps missing: up to {_lost(skipped, coverage.as_of_ns)}"
    if coverage.gaps:
        yield _gaps(coverage.gaps, coverage.as_of_ns)


def _lost(lost: Sequence[Lost], now_ns: int) -> str:
    """By stage and service: over agents."""
    sums: dict[tuple[str, str], list[int]] = {}
    for it in lost:
        found = sums.setdefault(
            (it.stage, it.service or it.agent or it.kind), [0, it.from_ns, it.to_ns]
        )
        found[0] += it.count
        found[1], found[2] = min(found[1], it.from_ns), max(found[2], it.to_ns)
    ordered = sorted(sums.items(), key=lambda item: (-item[1][0], item[0]))
    texts = [
        f"{count:,} event{'' if count == 1 else 's'} of {whose} {span(from_ns, to_ns, now_ns)} "
        f"({stage}{_WHY.get(stage, '')})"
        for (stage, whose), (count, from_ns, to_ns) in ordered[:_MOST_NAMED]
    ]
    if rest := ordered[_MOST_NAMED:]:
        texts.append(f"{sum(it[0] for _, it in rest):,} more elsewhere")
    return ", ".join(texts)


def _gaps(gaps: Sequence[Gap], now_ns: int) -> str:
    agents = {gap.agent for gap in gaps}
    if len(agents) > _MOST_NAMED:
        away = len({gap.agent for gap in gaps if gap.to_ns is None})
        still = f", {away} of them still" if away else ""
        return f"{len(agents):,} agents unreachable at some time{still}"
    texts = []
    for gap in gaps[:_MOST_NAMED]:
        when = (
            f"since {clock(gap.from_ns, now_ns)}"
            if gap.to_ns is None
            else span(gap.from_ns, gap.to_ns, now_ns)
        )
        texts.append(f"agent {gap.agent} unreachable {when}")
    if rest := len(gaps) - len(texts):
        texts.append(f"{rest:,} more gaps")
    return ", ".join(texts)


def span(from_ns: int, to_ns: int, now_ns: int = 0) -> str:
    """`11:58-11:59`, to the second where both are in one minute; with days where they are not of
    today."""
    exact = to_ns - from_ns < 2 * 60 * _NS_PER_S
    begin, end = (clock(at, now_ns, seconds=exact) for at in (from_ns, to_ns))
    return begin if begin == end else f"{begin}-{end}"


def clock(at_ns: int, now_ns: int = 0, *, seconds: bool = True) -> str:
    """The local time of day; with the date where that is not the date of NOW_NS, by default the
    present."""
    at = time.localtime(at_ns // _NS_PER_S)
    now = time.localtime(now_ns // _NS_PER_S if now_ns else None)
    text = time.strftime("%H:%M:%S" if seconds else "%H:%M", at)
    same_day = (at.tm_year, at.tm_yday) == (now.tm_year, now.tm_yday)
    if same_day:
        return text
    date = "%m-%d" if at.tm_year == now.tm_year else "%Y-%m-%d"
    return f"{time.strftime(date, at)} {text}"
