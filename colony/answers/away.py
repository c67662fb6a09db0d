"""Addresses at which no agent is followed now. The store's books know only agents that were
followed once; what an answer lacks because of the others, the fleet alone can say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import duckdb

from coral.colony.delivery import Away
from coral.colony.quoting import literal
from coral.mesh.colony.v1 import colony_pb2 as pb

NONE: Final = "SELECT '' AS agent, '' AS address, 0::BIGINT AS since_ns, '' AS why LIMIT 0"


def named(cursor: duckdb.DuckDBPyConnection, away: Sequence[Away]) -> Sequence[Away]:
    """AWAY with what the books know of an agent that was followed at an address before the colony
    began: its id, and when it was heard last."""
    sql = "SELECT address, agent, last_seen_ns FROM agents WHERE NOT connected"
    known = {address: it for address, *it in cursor.execute(sql).fetchall()} if away else {}
    return [
        replace(
            it, agent=str(known[it.address][0]), since_ns=int(known[it.address][1] or it.since_ns)
        )
        if not it.agent and it.address in known
        else it
        for it in away
    ]


def add_gaps(coverage: pb.Coverage, away: Sequence[Away], pattern: str = "*") -> None:
    """Notes in COVERAGE which agents are AWAY, of those whose name is PATTERN; an address stands
    for an agent whose name nobody knows. Those that the books have already are not repeated."""
    told = {gap.agent for gap in coverage.gaps if not gap.HasField("to")}
    end_ns = coverage.to.ToNanoseconds()
    wanted = re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)
    for it in away:
        name = it.agent or it.address
        if it.elsewhere or name in told or it.since_ns >= end_ns or not wanted.fullmatch(name):
            continue
        gap = coverage.gaps.add(agent=name, why=it.why)
        getattr(gap, "from").FromNanoseconds(it.since_ns)
    if coverage.HasField("against"):
        add_gaps(coverage.against, away, pattern)


def as_sql(away: Iterable[Away]) -> str:
    """AWAY as a statement that selects `agent`, `address`, `since_ns`, `why`."""
    return " UNION ALL ".join(_selects(away)) or NONE


def _selects(away: Iterable[Away]) -> Iterator[str]:
    for it in away:
        yield (
            f"SELECT {literal(it.agent)} AS agent, {literal(it.address)} AS address, "
            f"{it.since_ns}::BIGINT AS since_ns, {literal(it.why)} AS why"
        )
