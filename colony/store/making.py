"""What one transaction holds, made of what waits: deliveries, agents, gaps. No database."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import structlog

from coral.colony.delivery import AgentSeen, Delivery, Gap, Standing
from coral.colony.store.book import Book, Key
from coral.colony.store.rows import Intake, Rollup, Rows
from coral.colony.store.settings import HOUR_NS, LOSSES, MINUTE_NS, Settings

log: Final[structlog.stdlib.BoundLogger] = structlog.get_logger("coral.colony")

UNTIL_NS: Final = {MINUTE_NS: "minutes_until_ns", HOUR_NS: "hours_until_ns"}
"""By width of intervals, the column of `marks` with their watermark."""


Waiting = Delivery | AgentSeen | Gap


@dataclass(frozen=True, slots=True)
class Commit:
    """One transaction. `items` is how many of what was put are in it, or in one before."""

    number: int
    items: int
    tables: Mapping[str, pa.Table]
    standings: Mapping[Key, Standing]
    new_lines: pa.Table
    changed_lines: pa.Table
    agents: pa.Table
    gaps: pa.Table
    committed_ns: int
    marks: Mapping[str, int]
    confirmed: Callable[[], None]
    """To be called once it is durable."""

    @property
    def rows(self) -> int:
        """In all tables."""
        return sum(it.num_rows for it in self.tables.values())


class Making:
    """Makes transactions, in their order. What was made is nowhere else: it is stored, or tried
    again."""

    def __init__(self, rows: Rows, settings: Settings, book: Book) -> None:
        self._settings = settings
        self._book = book
        self.intake: Intake = rows.intake()
        self.minutes: Rollup = rows.rollup(MINUTE_NS)
        self.hours: Rollup = rows.rollup(HOUR_NS)
        self.watermarks: dict[int, int] = {MINUTE_NS: 0, HOUR_NS: 0}
        """By width: rows of intervals that begin before are in the rollups."""
        self.number = 0
        self._items = 0

    def make(self, waiting: Iterable[Waiting]) -> Commit:
        """The next transaction."""
        agents: dict[str, AgentSeen] = {}
        gaps: dict[tuple[str, int], Gap] = {}
        for it in waiting:
            self._items += 1
            if isinstance(it, Delivery):
                self._add(it)
            elif isinstance(it, AgentSeen):
                agents[it.agent_id] = it
            else:
                gaps[it.agent_id, it.from_ns] = it
        tables = dict(self.intake.take())
        stored = {name: rows for name, rows in tables.items() if rows.num_rows}
        tables = dict(stored)
        tables |= self._rolled_up(tables)
        standings, new, changed, losses = self._book.take_changed()
        tables[LOSSES] = losses
        self.number += 1
        committed_ns = self._settings.clock_ns()
        return Commit(
            number=self.number,
            items=self._items,
            tables={name: rows for name, rows in tables.items() if rows.num_rows},
            standings=standings,
            new_lines=new,
            changed_lines=changed,
            agents=_agent_lines(agents.values()),
            gaps=_gap_lines(gaps.values()),
            committed_ns=committed_ns,
            marks={
                "transaction": self.number,
                "committed_ns": committed_ns,
                **{UNTIL_NS[width]: at for width, at in self.watermarks.items()},
            },
            confirmed=lambda: self.intake.confirm(stored),
        )

    def rollup_until_ns(self) -> int:
        """The beginning of the first minute that stays open for now."""
        now_ns = self._settings.clock_ns() - int(self._settings.lateness_s * 1e9)
        return max(now_ns // MINUTE_NS * MINUTE_NS, self.watermarks[MINUTE_NS])

    def _add(self, delivery: Delivery) -> None:
        try:
            self.intake.add(delivery)
        except Exception as error:  # noqa: BLE001  an agent may send anything
            # It is its session's loss, and nobody else's; a session may go on like that.
            if not self._book.has_unreadable(delivery.session.key):
                log.warning(
                    "rows that cannot be read",
                    agent=delivery.session.agent_id,
                    session=delivery.session.collector_id,
                    error=f"{type(error).__name__}: {error}",
                )
            self._book.enter(delivery, unreadable=True)
        else:
            self._book.enter(delivery)

    def _rolled_up(self, tables: Mapping[str, pa.Table]) -> Mapping[str, pa.Table]:
        """Every row of an interval before the watermark, and none of a later one, has gone into
        the rollups by the end of the transaction that stores it: so a restart knows the rest."""
        until_ns = self.rollup_until_ns()
        self.watermarks[MINUTE_NS] = until_ns
        self.watermarks[HOUR_NS] = until_ns // HOUR_NS * HOUR_NS
        for name, rows in tables.items():
            self.minutes.add(name, rows)
        minutes = self.minutes.take(until_ns)
        for name, rows in minutes.items():
            self.hours.add(name, rows)
        return {**minutes, **self.hours.take(self.watermarks[HOUR_NS])}


def _agent_lines(agents: Iterable[AgentSeen]) -> pa.Table:
    rows = [
        {
            "agent": it.agent_id,
            "address": it.address,
            "version": it.version,
            "kernel": it.kernel,
            "connected": it.connected,
            "detail": it.detail,
            "attributes": json.dumps(dict(it.attributes), sort_keys=True),
            "first_seen_ns": it.seen_ns,
            "last_seen_ns": it.seen_ns,
        }
        for it in agents
    ]
    return pa.Table.from_pylist(rows, _AGENTS)


def _gap_lines(gaps: Iterable[Gap]) -> pa.Table:
    rows = [
        {"time_from_ns": it.from_ns, "time_to_ns": it.to_ns, "agent": it.agent_id, "why": it.why}
        for it in gaps
    ]
    return pa.Table.from_pylist(rows, _GAPS)


_AGENTS: Final = pa.schema(
    [
        *((name, pa.string()) for name in ("agent", "address", "version", "kernel")),
        ("connected", pa.bool_()),
        ("detail", pa.string()),
        ("attributes", pa.string()),
        ("first_seen_ns", pa.int64()),
        ("last_seen_ns", pa.int64()),
    ]
)
_GAPS: Final = pa.schema(
    [
        ("time_from_ns", pa.int64()),
        ("time_to_ns", pa.int64()),
        ("agent", pa.string()),
        ("why", pa.string()),
    ]
)
