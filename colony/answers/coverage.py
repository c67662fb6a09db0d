"""What is missing in an answer: events that were lost, times in which agents could not be reached,
and up to when everything is there. Read from the store's books, in the answer's own snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import duckdb

from coral.colony.answers.named import summed
from coral.colony.answers.repeats import Watch, overlapping, repeats
from coral.colony.answers.sources import Sources
from coral.colony.answers.window import Plan, Window
from coral.colony.quoting import literal
from coral.colony.tables import base_of
from coral.mesh.colony.v1 import colony_pb2 as pb

LOSSES: Final = "losses"
SEGMENT_LOST: Final = "segment_lost"
"""The stage of rows whose file was deleted or overwritten by somebody else."""
_MOST_LOST: Final = 1000
_MOST_GAPS: Final = 1000
_MOST_NOTES: Final = 10


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose losses concern an answer: those of these KINDS, and of the services and agents that are
    chosen by SQL conditions on the columns `service` and `agent`."""

    kinds: Sequence[str]
    conditions: Sequence[str] = ()
    agent_conditions: Sequence[str] = ()


def covered(
    cursor: duckdb.DuckDBPyConnection,
    sources: Sources,
    window: Window,
    scope: Scope,
    *,
    plans: Iterable[Plan] = (),
    watches: Sequence[Watch] = (),
) -> pb.Coverage:
    """What is missing in an answer about WINDOW, whose rows are of the sessions WATCHES. Its
    numbers of rows are left to the caller."""
    coverage = pb.Coverage()
    plans = list(plans)
    from_ns = min((it.window.from_ns for it in plans), default=window.from_ns)
    to_ns = max((it.window.to_ns for it in plans), default=window.to_ns)
    # Before the first session nobody watched: rates are of the time since then.
    first_ns = _first_ns(cursor, Window(from_ns, to_ns), scope) if plans else from_ns
    if first_ns is not None:
        from_ns = max(from_ns, min(first_ns, to_ns - 1))
    set_time(coverage, "from", from_ns)
    set_time(coverage, "to", to_ns)
    set_time(coverage, "as_of", sources.committed_ns)
    for piece in dict.fromkeys(piece for plan in plans for piece in plan.pieces):
        added = coverage.pieces.add(tier=piece.tier)
        set_time(added, "from", piece.window.from_ns)
        set_time(added, "to", piece.window.to_ns)
    window = Window(from_ns, to_ns)
    coverage.lost.extend(_lost(cursor, sources, window, scope))
    coverage.lost.extend(_missing(sources))
    coverage.gaps.extend(_gaps(cursor, window, scope))
    notes = [*(note for plan in plans for note in plan.notes), *_twice(watches)]
    coverage.notes.extend(list(dict.fromkeys(notes))[:_MOST_NOTES])
    complete_ns = _complete_to(cursor, scope)
    if complete_ns is not None:
        set_time(coverage, "complete_to", complete_ns)
    elif scope.kinds:
        when = "is collected now" if first_ns is not None else "was collected in this time"
        coverage.notes.append(f"nothing of {_any_of(scope.kinds)} {when}")
    return coverage


def set_time(message: Any, field: str, time_ns: int) -> None:  # noqa: ANN401  any message
    """Sets a Timestamp."""
    getattr(message, field).FromNanoseconds(time_ns)


def _lost(
    cursor: duckdb.DuckDBPyConnection, sources: Sources, window: Window, scope: Scope
) -> Iterator[pb.Lost]:
    """By stage, kind, service and agent, the most first. What was lost between two times is told
    where either lies in WINDOW, or between them."""
    where = " AND ".join((_of_kinds(scope), *scope.conditions, *scope.agent_conditions))
    # A loss is known when the next batch comes: that may be after the window.
    rows = sources.rows(LOSSES, window.from_ns, window.to_ns + _LATE_NS)
    sql = f"""
        SELECT stage, kind, service, agent, {summed('sum("count")')}, min(time_from_ns),
            max(time_to_ns)
        FROM ({rows})
        WHERE time_to_ns >= {window.from_ns} AND time_from_ns < {window.to_ns} AND {where}
        GROUP BY ALL ORDER BY 5 DESC, 1, 2, 3, 4 LIMIT {_MOST_LOST}"""
    for stage, kind, service, agent, count, from_ns, to_ns in cursor.execute(sql).fetchall():
        lost = pb.Lost(stage=stage, kind=kind, service=service, agent=agent, count=count)
        set_time(lost, "from", from_ns)
        set_time(lost, "to", to_ns)
        yield lost


def _missing(sources: Sources) -> Iterator[pb.Lost]:
    """The rows that the answer should have been made of, and that are not there any more."""
    for it in sources.missing:
        lost = pb.Lost(stage=SEGMENT_LOST, kind=base_of(it.table)[0], count=it.rows)
        set_time(lost, "from", it.from_ns)
        set_time(lost, "to", it.to_ns)
        yield lost


_LATE_NS: Final = 3600 * 10**9


def _gaps(cursor: duckdb.DuckDBPyConnection, window: Window, scope: Scope) -> Iterator[pb.Gap]:
    """Those that overlap with WINDOW; and of an agent that cannot be reached now and has sessions
    that may be at work, the time since it was heard last."""
    conditions = " AND ".join(("true", *scope.agent_conditions))
    sql = f"""
        WITH away AS (
            SELECT agent, last_seen_ns AS time_from_ns, NULL AS time_to_ns, detail AS why
            FROM agents
            WHERE NOT connected AND agent IN (SELECT agent FROM ledger WHERE ended IS NULL)
        ), gone AS (
            SELECT agent, time_from_ns, nullif(time_to_ns, 0) AS time_to_ns, why FROM gaps
            WHERE (agent, time_from_ns) NOT IN (SELECT (agent, time_from_ns) FROM away)
            UNION ALL SELECT * FROM away
        )
        SELECT agent, time_from_ns, time_to_ns, why FROM gone
        WHERE time_from_ns < {window.to_ns}
            AND coalesce(time_to_ns, {window.to_ns}) > {window.from_ns}
            AND {conditions}
        ORDER BY 2, 1 LIMIT {_MOST_GAPS}"""
    for agent, from_ns, to_ns, why in cursor.execute(sql).fetchall():
        gap = pb.Gap(agent=agent, why=why or "")
        set_time(gap, "from", from_ns)
        if to_ns is not None:
            set_time(gap, "to", to_ns)
        yield gap


def _first_ns(cursor: duckdb.DuckDBPyConnection, window: Window, scope: Scope) -> int | None:
    """When the first session began that was at work in WINDOW, whether or not it saw anything; None
    where there was none."""
    conditions = " AND ".join((_of_kinds(scope), *scope.conditions, *scope.agent_conditions))
    sql = f"""
        SELECT min(started_ns) FROM ledger
        WHERE {conditions} AND started_ns < {window.to_ns}
            AND coalesce(ended_ns, {window.to_ns}) >= {window.from_ns}"""
    ((first_ns,),) = cursor.execute(sql).fetchall()
    return int(first_ns) if first_ns is not None else None


def _any_of(kinds: Sequence[str]) -> str:
    *most, last = kinds
    return f"{', '.join(most)} or {last}" if most else last


def _complete_to(cursor: duckdb.DuckDBPyConnection, scope: Scope) -> int | None:
    """Up to when everything of the agents that can be reached has arrived: the least that one of
    their sessions has come to. A row that comes later is of an interval that ends later. None where
    no session is at work."""
    conditions = " AND ".join((_of_kinds(scope), *scope.conditions, *scope.agent_conditions))
    sql = f"""
        SELECT min(updated_ns) FROM ledger
        WHERE ended IS NULL AND {conditions}
            AND agent NOT IN (SELECT agent FROM agents WHERE NOT connected)"""
    ((least_ns,),) = cursor.execute(sql).fetchall()
    return int(least_ns) if least_ns is not None else None


def watches_of(cursor: duckdb.DuckDBPyConnection, window: Window, scope: Scope) -> Sequence[Watch]:
    """The sessions that were at work in WINDOW."""
    conditions = " AND ".join((_of_kinds(scope), *scope.conditions, *scope.agent_conditions))
    sql = f"""
        SELECT agent, session, kind, service, config, started_ns, ended_ns FROM ledger
        WHERE {conditions} AND stored > 0 AND started_ns < {window.to_ns}
            AND coalesce(ended_ns, {window.to_ns}) >= {window.from_ns}"""
    return [Watch(*row) for row in cursor.execute(sql).fetchall()]


def _twice(watches: Sequence[Watch]) -> Iterator[str]:
    """What is counted several times, or is left out because it would be."""
    found = list(repeats(watches))
    if found:
        where = found[0].agent if len(found) == 1 else f"{len({it.agent for it in found})} agents"
        yield (
            f"{len(found)} sessions on {where} saw the same as others at the time: these are left "
            "out while both were at work"
            if len(found) > 1
            else f"a session on {where} saw the same as another at the time: it is left out while "
            "both were at work"
        )
    differing: dict[tuple[str, str], list[str]] = {}
    for kind, service, agent in overlapping(watches, found):
        differing.setdefault((kind, service), []).append(agent)
    for (kind, service), agents in differing.items():
        where = agents[0] if len(agents) == 1 else f"{len(agents)} agents"
        yield (
            f"several sessions of {kind} with different options watched {service or 'the host'} "
            f"on {where} at a time: what they all saw is counted several times"
        )


def _of_kinds(scope: Scope) -> str:
    return f"kind IN ({', '.join(map(literal, scope.kinds))})" if scope.kinds else "true"


def by_stage(lost: Iterable[pb.Lost]) -> Mapping[str, int]:
    """How many were lost at each stage."""
    counts: dict[str, int] = {}
    for each in lost:
        counts[each.stage] = counts.get(each.stage, 0) + each.count
    return counts
