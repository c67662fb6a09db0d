"""A named query as SQL: what was asked, checked against what there is.

The same columns are selected of every piece of the window and of every table of the query, put one
after the other, and added up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from coral.colony.answers.histograms import Slots, slots_of
from coral.colony.answers.named import Named, Source, Times, Value
from coral.colony.answers.refusals import RefusedError, unknown
from coral.colony.answers.sources import Sources
from coral.colony.answers.window import RAW, WIDTHS_NS, Kept, Piece, Plan, Window, planned

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
            if name not in known:
                raise RefusedError(f"by: {unknown('column', name, known)}")
        for name in self.where:
            if name not in known:
                raise RefusedError(f"where: {unknown('column', name, known)}")
        if any("\0" in text for text in (*self.services, *self.where.values())):
            raise RefusedError("where: a value has a NUL byte")
        if self.against_ns and not self.named.can_compare:
            raise RefusedError(f"against: {self.named.name} compares no windows")
        by = tuple(dict.fromkeys(self.by or self.named.by))
        return Asked(
            self.named, self.window, by, self.top, self.services, self.where, self.against_ns
        )

    @property
    def needs_raw(self) -> Sequence[str]:
        """The columns asked for that rollups do not have."""
        return [name for name in self.named.raw_only if name in self.by or name in self.where]


@dataclass(frozen=True)
class Statement:
    """SQL for a checked request, the plan of each table, and the histograms' slots."""

    sql: str
    plans: Mapping[str, Plan]
    slots: Mapping[str, Slots]
    values: Sequence[str]


def table_of(table: str, tier: str) -> str:
    """The name of a tier of TABLE."""
    return table if tier == RAW else f"{table}_{tier}"


def plan_of(table: str, window: Window, sources: Sources, *, raw_only: bool = False) -> Plan:
    """Which tiers of TABLE have the rows of WINDOW."""
    kept: dict[str, Kept] = {}
    for tier, width_ns in WIDTHS_NS.items():
        oldest_ns = sources.kept_from_ns(table_of(table, tier))
        if tier == RAW:
            # What a rollup has not taken in yet is in raw rows, however old.
            kept[tier] = Kept(oldest_ns if oldest_ns is not None else _FOREVER_NS, _FOREVER_NS)
        elif oldest_ns is not None and not raw_only:
            kept[tier] = Kept(oldest_ns, sources.watermark_ns(width_ns))
    return planned(window, kept)


def statement(asked: Asked, window: Window, sources: Sources, *, top: int) -> Statement:
    """The SQL for one WINDOW of a checked request; TOP is 0 for all groups, of which there are at
    most MOST_GROUPS."""
    named = asked.named
    tables = dict.fromkeys(source.table for source in named.sources)
    raw_only = bool(asked.needs_raw)
    plans = {
        table: plan_of(table, window, sources, raw_only=raw_only)
        for table in tables
        if sources.columns(table)
    }
    slots = {it.histogram: _slots(it, named.sources, sources) for it in named.times}
    values = [*named.values, *_slot_sums(slots)]
    inner = list(
        dict.fromkeys((*asked.by, *asked.where, "service", *(c for v in values for c in v.of)))
    )
    selects = [
        _select(source, piece, inner, asked, sources, slots)
        for source in named.sources
        if source.table in plans
        for piece in plans[source.table].pieces
        if sources.columns(table_of(source.table, piece.tier))
    ]
    if not selects:
        return Statement("", plans, slots, [it.name for it in values])
    keys = ", ".join(map(quoted, asked.by))
    figures = ", ".join(f"{it.sql} AS {quoted(it.name)}" for it in values)
    limit = min(top or MOST_GROUPS, MOST_GROUPS)
    sql = f"""
        WITH together AS ({" UNION ALL ".join(selects)}),
        summed AS (
            SELECT {keys}, {figures}, sum({_ROWS})::BIGINT AS {_ROWS}
            FROM together GROUP BY {keys}
        )
        SELECT * REPLACE (sum({_ROWS}) OVER ()::BIGINT AS {_ROWS}), count(*) OVER () AS {_GROUPS}
        FROM summed ORDER BY {_order(named, values)} DESC NULLS LAST, {keys} LIMIT {limit}"""
    return Statement(sql, plans, slots, [it.name for it in values])


def _order(named: Named, values: Sequence[Value]) -> str:
    names = {it.name for it in values}
    return " ".join(quoted(w) if w in names else w for w in named.order.split())


def _slots(times: Times, tables: Iterable[Source], sources: Sources) -> Slots:
    columns = {
        column
        for source in tables
        if source.has_times
        for tier in WIDTHS_NS
        for column in sources.columns(table_of(source.table, tier))
    }
    return slots_of(times.histogram, columns)


def _slot_sums(slots: Mapping[str, Slots]) -> Iterator[Value]:
    for found in slots.values():
        for column in found.columns:
            yield Value(column, f"coalesce(sum({quoted(column)}), 0)::BIGINT", (column,))


def _select(
    source: Source,
    piece: Piece,
    inner: Sequence[str],
    asked: Asked,
    sources: Sources,
    slots: Mapping[str, Slots],
) -> str:
    """The columns INNER of one piece of a table."""
    table = table_of(source.table, piece.tier)
    there = set(sources.columns(table))
    missing = "".join(f", NULL AS {quoted(it)}" for it in source.optional if it not in there)
    of_times = {column for found in slots.values() for column in found.columns}
    if not source.has_times:
        there -= of_times

    def expression(column: str) -> str:
        own = source.as_sql.get(column, quoted(column) if column in there else "NULL")
        return f"{own} AS {quoted(column)}"

    window = piece.window
    rows = f"SELECT *{missing} FROM ({sources.rows(table, window.from_ns, window.to_ns)})"
    at = f"time_ns >= {window.from_ns} AND time_ns < {window.to_ns}"
    where = f"{at} AND {source.where}" if source.where else at
    picked = ", ".join(map(expression, inner))
    select = f"SELECT {picked}, 1 AS {_ROWS} FROM ({rows}) WHERE {where}"
    chosen = " AND ".join(conditions(asked))
    return f"SELECT * FROM ({select}) WHERE {chosen}" if chosen else select


def conditions(asked: Asked) -> Iterator[str]:
    """Which rows are wanted, as conditions on the query's columns."""
    if asked.services:
        yield f"({' OR '.join(_like('service', text) for text in asked.services)})"
    for name, text in asked.where.items():
        yield _like(name, text)


def _like(column: str, pattern: str) -> str:
    """The condition that COLUMN, as text, is PATTERN, in which `*` stands for anything."""
    text = f"CAST({quoted(column)} AS VARCHAR)"
    if "*" not in pattern:
        return f"{text} = {literal(pattern)}"
    for char in "\\%_":
        pattern = pattern.replace(char, f"\\{char}")
    return f"{text} LIKE {literal(pattern.replace('*', '%'))} ESCAPE '\\'"


def quoted(name: str) -> str:
    """A name of SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A text of SQL."""
    return "'" + text.replace("'", "''") + "'"
