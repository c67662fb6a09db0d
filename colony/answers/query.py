"""A named query as SQL: what was asked, checked against what there is.

The same columns are selected of every piece of the window and of every table of the query, put one
after the other, and added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from coral.colony.answers.chosen import check_value
from coral.colony.answers.named import TIME, Named, Source, Times, Value, summed
from coral.colony.answers.refusals import RefusedError, unknown
from coral.colony.answers.repeats import Repeat
from coral.colony.answers.sources import Sources
from coral.colony.answers.window import (
    RAW,
    WIDTHS_NS,
    Kept,
    Piece,
    Plan,
    Window,
    planned,
    step_of,
)
from coral.colony.quoting import literal, quoted
from coral.colony.tables import TABLES
from coral.colony.tables.histograms import Histogram

MOST_GROUPS: Final = 200_000
_FOREVER_NS: Final = 1 << 62
_ROWS: Final = "rows_used"
_GROUPS: Final = "groups_in_all"
ACCOUNT: Final = (_ROWS, _GROUPS)
"""Columns of the SQL that are no part of the answer: how many rows all groups were made from, and
how many groups there are."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a named query. `top` is 0 for all rows."""

    named: Named
    window: Window
    by: Sequence[str] = ()
    top: int = 0
    services: Sequence[str] = ()
    where: Mapping[str, str] = field(default_factory=dict)
    against_ns: int = 0

    def checked(self) -> Asked:
        """This, with the query's own `by` where none is given. Raises `RefusedError`, which begins
        with the name of the field."""
        known = self.named.columns
        for name in self.by:
            if name not in (*known, TIME):
                raise RefusedError(f"by: {unknown('column', name, (*known, TIME))}")
        for name in self.where:
            if name not in known:
                raise RefusedError(f"where: {unknown('column', name, known)}")
        if any("\0" in text for text in (*self.services, *self.where.values())):
            raise RefusedError("where: a value has a NUL byte")
        for name, text in self.where.items():
            check_value(self.named, name, text)
        if self.against_ns and not self.named.can_compare:
            raise RefusedError(f"against: {self.named.name} compares no windows")
        if self.against_ns and TIME in self.by:
            raise RefusedError("against: rows by time are not compared")
        by = tuple(dict.fromkeys((*(self.by or self.named.by), *self.named.always_by)))
        return Asked(
            self.named, self.window, by, self.top, self.services, self.where, self.against_ns
        )

    @property
    def needs_raw(self) -> Sequence[str]:
        """The columns asked for that rollups do not have."""
        return [name for name in self.named.raw_only if name in self.by or name in self.where]


@dataclass(frozen=True)
class Slots:
    """A histogram, and the columns that have its counts in the tables of a query."""

    histogram: Histogram
    columns: Sequence[str]


@dataclass(frozen=True)
class Statement:
    """SQL for a checked request, the plan of each table, and the histograms' slots by name; rows by
    time are of parts of `step_ns`."""

    sql: str
    plans: Mapping[str, Plan]
    slots: Mapping[str, Slots]
    step_ns: int


def table_of(table: str, tier: str) -> str:
    """The name of a tier of TABLE."""
    return table if tier == RAW else f"{table}_{tier}"


def plan_of(table: str, window: Window, sources: Sources, *, widest_ns: int = _FOREVER_NS) -> Plan:
    """Which tiers of TABLE have the rows of WINDOW, without tiers that are wider than WIDEST_NS."""
    kept: dict[str, Kept] = {}
    for tier, width_ns in WIDTHS_NS.items():
        oldest_ns = sources.kept_from_ns(table_of(table, tier))
        if tier == RAW:
            # What a rollup has not taken in yet is in raw rows, however old.
            kept[tier] = Kept(oldest_ns if oldest_ns is not None else _FOREVER_NS, _FOREVER_NS)
        elif oldest_ns is not None and width_ns <= widest_ns:
            kept[tier] = Kept(oldest_ns, sources.watermark_ns(width_ns))
    return planned(window, kept)


def statement(
    asked: Asked, window: Window, sources: Sources, *, top: int, left_out: Sequence[Repeat] = ()
) -> Statement:
    """The SQL for one WINDOW of a checked request, without what LEFT_OUT names; TOP is 0 for all
    groups, of which there are at most MOST_GROUPS."""
    named = asked.named
    tables = dict.fromkeys(source.table for source in named.sources)
    step_ns = step_of(window)
    widest_ns = 1 if asked.needs_raw else step_ns if TIME in asked.by else _FOREVER_NS
    plans = {table: plan_of(table, window, sources, widest_ns=widest_ns) for table in tables}
    slots = {it.histogram: _slots(it, named.sources, sources) for it in named.times}
    values = [*named.values, *_slot_sums(slots)]
    inner = list(
        dict.fromkeys((*asked.by, *asked.where, "service", *(c for v in values for c in v.of)))
    )
    selects = [
        _Part(source, piece, sources, slots, step_ns).select(inner, asked, left_out)
        for source in named.sources
        for piece in plans[source.table].pieces
    ]
    keys = ", ".join(map(quoted, asked.by))
    figures = ", ".join(f"{it.sql} AS {quoted(it.name)}" for it in values)
    limit = min(top or MOST_GROUPS, MOST_GROUPS)
    first = f"{TIME}, " if TIME in asked.by else ""
    sql = f"""
        WITH together AS ({" UNION ALL ".join(selects)}),
        summed AS (
            SELECT {keys}, {figures}, sum({_ROWS})::BIGINT AS {_ROWS}
            FROM together GROUP BY {keys}
        )
        SELECT * REPLACE (sum({_ROWS}) OVER ()::BIGINT AS {_ROWS}), count(*) OVER () AS {_GROUPS}
        FROM summed ORDER BY {first}{_order(named, values)} DESC NULLS LAST, {keys} LIMIT {limit}"""
    return Statement(sql, plans, slots, step_ns)


def _order(named: Named, values: Sequence[Value]) -> str:
    names = {it.name for it in values}
    return " ".join(quoted(w) if w in names else w for w in named.order.split())


def _slots(times: Times, tables: Iterable[Source], sources: Sources) -> Slots:
    columns: set[str] = set()
    histogram = None
    for source in tables:
        found = TABLES[source.table].histograms.get(times.histogram)
        if found and source.has_times:
            histogram = found
            for tier in WIDTHS_NS:
                columns.update(sources.columns(table_of(source.table, tier)))
    assert histogram  # noqa: S101  the query names it
    return Slots(histogram, histogram.of(columns))


def _slot_sums(slots: Mapping[str, Slots]) -> Iterator[Value]:
    for found in slots.values():
        for column in found.columns:
            yield Value(column, summed(f"sum({quoted(column)})"), (column,))


@dataclass(frozen=True)
class _Part:
    """A piece of a window, in one table."""

    source: Source
    piece: Piece
    sources: Sources
    slots: Mapping[str, Slots]
    step_ns: int

    def select(self, inner: Sequence[str], asked: Asked, left_out: Sequence[Repeat]) -> str:
        """The columns INNER."""
        source, window = self.source, self.piece.window
        table = table_of(source.table, self.piece.tier)
        there = set(self.sources.columns(table))
        missing = "".join(f", NULL AS {quoted(it)}" for it in source.optional if it not in there)
        if not source.has_times:
            there -= {column for found in self.slots.values() for column in found.columns}

        def expression(column: str) -> str:
            if column == TIME:
                return f"time_ns // {self.step_ns} * {self.step_ns} AS {TIME}"
            own = source.as_sql.get(column, quoted(column) if column in there else "NULL")
            return f"{own} AS {quoted(column)}"

        rows = self.sources.rows(table, window.from_ns, window.to_ns)
        where = [f"time_ns >= {window.from_ns}", f"time_ns < {window.to_ns}"]
        if source.where:
            where.append(source.where)
        if left_out:
            where.append(_without(left_out))
        picked = ", ".join(map(expression, inner))
        select = (
            f"SELECT {picked}, 1 AS {_ROWS} FROM (SELECT *{missing} FROM ({rows})) AS part "
            f"WHERE {' AND '.join(where)}"
        )
        chosen = " AND ".join(conditions(asked))
        return f"SELECT * FROM ({select}) WHERE {chosen}" if chosen else select


def _without(left_out: Sequence[Repeat]) -> str:
    """The condition that a row of `part` is none of LEFT_OUT."""
    values = ", ".join(
        f"({literal(it.agent)}, {literal(it.session)}, {it.from_ns}, {it.to_ns})" for it in left_out
    )
    return (
        f"NOT EXISTS (FROM (VALUES {values}) AS again(agent, session, from_ns, to_ns) "
        "WHERE again.agent = part.agent AND again.session = part.session "
        "AND part.time_ns > again.from_ns AND part.time_ns <= again.to_ns)"
    )


def conditions(asked: Asked) -> Iterator[str]:
    """Which rows are wanted, as conditions on the query's columns."""
    if asked.services:
        yield f"({' OR '.join(like('service', text) for text in asked.services)})"
    for name, text in asked.where.items():
        yield like(name, text)


def like(column: str, pattern: str) -> str:
    """The condition that COLUMN, as text, is PATTERN, in which `*` stands for anything."""
    text = f"CAST({quoted(column)} AS VARCHAR)"
    if "*" not in pattern:
        return f"{text} = {literal(pattern)}"
    for char in "\\%_":
        pattern = pattern.replace(char, f"\\{char}")
    return f"{text} LIKE {literal(pattern.replace('*', '%'))} ESCAPE '\\'"
