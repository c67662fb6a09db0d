"""Queries of the store's own books: agents, sessions, and where every event of these is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import duckdb
import pyarrow as pa

from coral.colony.answers.away import as_sql
from coral.colony.answers.coverage import Scope, covered
from coral.colony.answers.named import summed
from coral.colony.answers.query import like
from coral.colony.answers.refusals import RefusedError, unknown
from coral.colony.answers.sources import Sources
from coral.colony.answers.window import Window
from coral.colony.delivery import Away
from coral.mesh.colony.v1 import colony_pb2 as pb


@dataclass(frozen=True, slots=True)
class Listing:
    """A query without groups: `sql` selects its rows, for a window, in their order."""

    name: str
    about: str
    columns: Sequence[str]
    sql: str
    has_services: bool = True


_AT_WORK: Final = """started_ns < {to_ns} AND coalesce(ended_ns, {to_ns}) >= {from_ns}"""

SESSIONS: Final = Listing(
    name="sessions",
    about="Sessions of collectors: where, since when, how they ended, and how much they saw.",
    columns=("agent", "session", "kind", "service", "ended"),
    sql=f"""
        SELECT agent, session, kind, service, started_ns, ended_ns, coalesce(ended, '') AS ended,
            coalesce(ended_detail, '') AS ended_detail, updated_ns, produced::BIGINT AS produced,
            stored::BIGINT AS stored, lost::BIGINT AS lost, config
        FROM ledger WHERE {_AT_WORK} ORDER BY ended_ns IS NOT NULL, kind, agent, started_ns""",
)

ACCOUNTS: Final = Listing(
    name="accounts",
    about="Where every event of each session is: produced = stored + lost, by stage.",
    columns=("agent", "session", "kind", "service", "ended"),
    sql=f"""
        SELECT agent, session, kind, service, coalesce(ended, '') AS ended,
            produced::BIGINT AS produced, stored::BIGINT AS stored, lost::BIGINT AS lost,
            lost_by_stage, (produced::HUGEINT - last_seq)::BIGINT AS not_arrived,
            (last_seq::HUGEINT - stored - lost)::BIGINT AS unexplained, lost_in_kernel
        FROM ledger WHERE {_AT_WORK}
        ORDER BY abs(unexplained) DESC, lost DESC, kind, agent, session""",
)

AGENTS: Final = Listing(
    name="agents",
    about="Agents: which can be reached, since when, and what runs on them.",
    columns=("agent", "address", "version", "connected"),
    sql=f"""
        WITH work AS (
            SELECT agent, count(*) FILTER (ended IS NULL) AS sessions,
                {summed("sum(stored)")} AS stored, {summed("sum(lost)")} AS lost,
                max(updated_ns) AS updated_ns
            FROM ledger GROUP BY agent
        ), away AS (
            SELECT agent, count(*) AS gaps,
                sum(least(coalesce(nullif(time_to_ns, 0), {{to_ns}}), {{to_ns}})
                    - greatest(time_from_ns, {{from_ns}}))::BIGINT AS away_ns
            FROM gaps
            WHERE time_from_ns < {{to_ns}}
                AND coalesce(nullif(time_to_ns, 0), {{to_ns}}) > {{from_ns}}
            GROUP BY agent
        ), standing AS ({{standing}}
        ), known AS (
            SELECT agent, address, version, kernel, connected, first_seen_ns, last_seen_ns,
                coalesce((SELECT max(why) FROM standing
                    WHERE standing.agent = agents.agent OR standing.address = agents.address),
                    detail) AS detail
            FROM agents
            UNION ALL BY NAME
            SELECT agent, address, false AS connected, '' AS version, '' AS kernel,
                why AS detail, NULL AS first_seen_ns, NULL AS last_seen_ns
            FROM standing
            WHERE address NOT IN (SELECT address FROM agents WHERE address IS NOT NULL)
        )
        SELECT agent, address, version, kernel, connected, detail, first_seen_ns,
            greatest(coalesce(last_seen_ns, 0), coalesce(updated_ns, 0)) AS last_seen_ns,
            coalesce(sessions, 0)::BIGINT AS sessions, coalesce(stored, 0)::BIGINT AS stored,
            coalesce(lost, 0)::BIGINT AS lost, coalesce(gaps, 0)::BIGINT AS gaps,
            coalesce(away_ns, 0)::BIGINT AS away_ns
        FROM known LEFT JOIN work USING (agent) LEFT JOIN away USING (agent)
        ORDER BY connected, agent, address""",
    has_services=False,
)

LISTINGS: Final[Mapping[str, Listing]] = {it.name: it for it in (SESSIONS, ACCOUNTS, AGENTS)}


@dataclass(frozen=True, slots=True)
class AskedListing:
    """A request for a listing. `top` is 0 for all rows."""

    listing: Listing
    window: Window
    by: Sequence[str] = ()
    top: int = 0
    services: Sequence[str] = ()
    where: Mapping[str, str] = field(default_factory=dict)
    against_ns: int = 0

    def checked(self) -> AskedListing:
        """This. Raises `RefusedError`, which begins with the name of the field."""
        name = self.listing.name
        if self.by:
            raise RefusedError(f"by: {name} are listed one by one")
        if self.against_ns:
            raise RefusedError(f"against: {name} are not compared")
        if self.services and not self.listing.has_services:
            raise RefusedError(f"services: {name} are of no service")
        for column in self.where:
            if column not in self.listing.columns:
                raise RefusedError(f"where: {unknown('column', column, self.listing.columns)}")
        if any("\0" in text for text in (*self.services, *self.where.values())):
            raise RefusedError("where: a value has a NUL byte")
        return self


def listed(
    cursor: duckdb.DuckDBPyConnection,
    sources: Sources,
    asked: AskedListing,
    away: Sequence[Away] = (),
) -> tuple[pa.Table, pb.Coverage]:
    """The rows of a checked request, and what they cover. AWAY are addresses that are not followed,
    which the list of agents has, too."""
    window = asked.window
    chosen = list(_conditions(asked))
    sql = asked.listing.sql.format(
        from_ns=window.from_ns, to_ns=window.to_ns, standing=as_sql(away)
    )
    if chosen:
        sql = f"SELECT * FROM ({sql}) WHERE {' AND '.join(chosen)}"
    table: pa.Table = cursor.sql(sql).to_arrow_table()
    coverage = covered(cursor, sources, window, _scope(asked))
    coverage.rows_used = table.num_rows
    if asked.top and table.num_rows > asked.top:
        coverage.cut = True
        coverage.left_out = table.num_rows - asked.top
        table = table.slice(0, asked.top)
    coverage.rows = table.num_rows
    return table, coverage


def _conditions(asked: AskedListing) -> Iterator[str]:
    if asked.services:
        yield f"({' OR '.join(like('service', text) for text in asked.services)})"
    for name, text in asked.where.items():
        yield like(name, text)


def _scope(asked: AskedListing) -> Scope:
    agents = [like("agent", asked.where["agent"])] if "agent" in asked.where else []
    kinds = [asked.where["kind"]] if "*" not in asked.where.get("kind", "*") else []
    return Scope(kinds, [like("service", text) for text in asked.services[:1]], agents)
