"""The books of all sessions: what was taken, what of it is durable. No database, no thread.

The loop's thread asks `admit` for every delivery; the writing thread enters admitted ones in their
order, and publishes what a transaction has made durable. Each of the dictionaries has one writer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from coral.client import Kind
from coral.colony.delivery import AGENT_LOST, Delivery, Ended, SequenceError, Session, Standing
from coral.colony.store.rows import LOSSES_SCHEMA

UNREADABLE: Final = "unreadable"
"""The stage of events in a delivery that the colony could not make rows of."""

Key = tuple[str, str]


@dataclass(slots=True)
class Entry:
    """The line of one session. `id` is its number in the table `ledger`."""

    id: int
    session: Session
    last_seq: int = 0
    produced: int = 0
    stored: int = 0
    updated_ns: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    lost_in_kernel: dict[str, int] = field(default_factory=dict)
    ended: Ended | None = None
    rows_of: str = ""
    """The table that its rows are in."""

    @property
    def standing(self) -> Standing:
        """As of now."""
        return Standing(
            self.session,
            self.last_seq,
            self.produced,
            self.stored,
            self.updated_ns,
            dict(self.lost),
            dict(self.lost_in_kernel),
            self.ended,
        )


class Book:
    """Begins with what the table `ledger` has."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._entries = {it.session.key: it for it in entries}
        self._durable = {key: it.standing for key, it in self._entries.items()}
        self._rows_of = {key: it.rows_of for key, it in self._entries.items()}
        self._admitted = {key: it.last_seq for key, it in self._entries.items()}
        self._next_id = 1 + max((it.id for it in self._entries.values()), default=0)
        self._changed: dict[Key, bool] = {}  # whether the table has no line of it yet
        self._losses: list[tuple[object, ...]] = []

    # The loop's thread.

    def expected_seq(self, key: Key) -> int:
        """The number of the last event that was admitted; 0 for a session that is new."""
        return self._admitted.get(key, 0)

    def admit(self, delivery: Delivery) -> bool:
        """Whether DELIVERY is news; what was admitted before is not. Raises `SequenceError` where
        it does not follow on, ValueError where its figures do not add up."""
        key = delivery.session.key
        expected = self.expected_seq(key)
        after, last = delivery.after_seq, delivery.last_seq
        if last - after != delivery.rows + sum(delivery.lost.values()):
            raise ValueError(
                f"session {key}: events {after + 1} to {last} are not {delivery.rows} rows and "
                f"{dict(delivery.lost)} lost"
            )
        if after == expected:
            self._admitted[key] = last
            return True
        if last <= expected:
            return False
        raise SequenceError(
            f"session {key}: a delivery goes on after event {after}, and the store has {expected}",
            expected,
        )

    # The writing thread.

    def enter(self, delivery: Delivery, *, unreadable: bool = False) -> None:
        """The rows of DELIVERY are among those of the next transaction; or they are lost, if they
        were UNREADABLE."""
        session = delivery.session
        key = session.key
        entry = self._entries.get(key)
        if not entry:
            entry = self._entries[key] = Entry(self._next_id, session)
            self._rows_of[key] = ""
            self._next_id += 1
            self._changed[key] = True
        else:
            self._changed.setdefault(key, False)
        entry.session = session
        if delivery.batch and delivery.batch.rows:
            entry.rows_of = self._rows_of[key] = delivery.batch.rows
        lost = dict(delivery.lost)
        if unreadable and delivery.rows:
            lost[UNREADABLE] = lost.get(UNREADABLE, 0) + delivery.rows
        else:
            entry.stored += delivery.rows
        self._lose(entry, delivery.time_ns, lost, delivery.lost_in_kernel)
        entry.last_seq = delivery.last_seq
        entry.produced = max(entry.produced, delivery.produced, delivery.last_seq)
        entry.updated_ns = max(entry.updated_ns, delivery.time_ns)
        entry.ended = delivery.ended  # one given up as lost may come back

    def has_unreadable(self, key: Key) -> bool:
        """Whether rows of a session were lost because they could not be read."""
        entry = self._entries.get(key)
        return entry is not None and UNREADABLE in entry.lost

    def take_changed(self) -> tuple[Mapping[Key, Standing], pa.Table, pa.Table, pa.Table]:
        """What has changed since the last call: standings; lines for `ledger` that are new; lines
        that replace others of the same `id`; rows for `losses`."""
        new = [self._entries[key] for key, is_new in self._changed.items() if is_new]
        old = [self._entries[key] for key, is_new in self._changed.items() if not is_new]
        standings = {key: self._entries[key].standing for key in self._changed}
        losses = table_of(self._losses, LOSSES_SCHEMA)
        self._changed.clear()
        self._losses.clear()
        return standings, ledger_lines(new), ledger_lines(old), losses

    def publish(self, standings: Mapping[Key, Standing]) -> None:
        """A transaction has made STANDINGS durable."""
        self._durable.update(standings)

    def forget(self, ended_before_ns: int, lost_before_ns: int) -> None:
        """Drops sessions that ended before that, unless something of them waits. One that was
        given up as lost may come back, with an agent that was cut off."""
        for key, standing in list(self._durable.items()):
            ended = standing.ended
            if (
                ended
                and ended.at_ns
                < (lost_before_ns if ended.reason == AGENT_LOST else ended_before_ns)
                and key not in self._changed
                and self._admitted.get(key) == standing.last_seq
            ):
                self._admitted.pop(key, None)
                self._entries.pop(key, None)
                self._durable.pop(key, None)
                self._rows_of.pop(key, None)

    def durable_in(self, table: str) -> Sequence[Entry]:
        """How the sessions stand whose rows are in TABLE, as of the last transaction."""
        return [
            Entry(
                0,
                it.session,
                it.last_seq,
                it.produced,
                it.stored,
                it.updated_ns,
                dict(it.lost),
                dict(it.lost_in_kernel),
                it.ended,
                table,
            )
            for key, it in self._durable.items()
            if self._rows_of[key] == table
        ]

    # Any thread.

    def standing(self, key: Key) -> Standing | None:
        """The durable one."""
        return self._durable.get(key)

    def standings(self) -> Sequence[Standing]:
        """The durable ones."""
        return list(self._durable.values())

    def _lose(
        self, entry: Entry, time_ns: int, lost: Mapping[str, int], in_kernel: Mapping[str, int]
    ) -> None:
        session = entry.session
        from_ns = min(entry.updated_ns or session.started_ns or time_ns, time_ns)

        def row(stage: str, count: int, *, kernel: bool) -> None:
            who = (session.agent_id, session.collector_id, session.service, session.kind.name)
            self._losses.append((time_ns, from_ns, time_ns, *who, stage, kernel, count))

        for stage, count in lost.items():
            if count > 0:
                entry.lost[stage] = entry.lost.get(stage, 0) + count
                row(stage, count, kernel=False)
        for stage, total in in_kernel.items():
            more = total - entry.lost_in_kernel.get(stage, 0)
            if more > 0:
                entry.lost_in_kernel[stage] = total
                row(stage, more, kernel=True)


LEDGER_SCHEMA: Final = pa.schema(
    [
        ("id", pa.int64()),
        *((name, pa.string()) for name in ("agent", "session", "kind", "service")),
        ("started_ns", pa.int64()),
        ("config", pa.string()),
        ("attributes", pa.string()),
        *((name, pa.uint64()) for name in ("last_seq", "produced", "stored", "lost")),
        ("lost_by_stage", pa.string()),
        ("lost_in_kernel", pa.string()),
        ("updated_ns", pa.int64()),
        ("ended", pa.string()),
        ("ended_detail", pa.string()),
        ("ended_ns", pa.int64()),
        ("rows_of", pa.string()),
    ]
)


def ledger_lines(entries: Iterable[Entry]) -> pa.Table:
    """Lines of the table `ledger`."""
    rows = [
        (
            it.id,
            it.session.agent_id,
            it.session.collector_id,
            it.session.kind.name,
            it.session.service,
            it.session.started_ns,
            _json(it.session.config),
            _json(it.session.attributes),
            it.last_seq,
            it.produced,
            it.stored,
            sum(it.lost.values()),
            _json(it.lost),
            _json(it.lost_in_kernel),
            it.updated_ns,
            it.ended.reason if it.ended else None,
            it.ended.detail if it.ended else None,
            it.ended.at_ns if it.ended else None,
            it.rows_of,
        )
        for it in entries
    ]
    return table_of(rows, LEDGER_SCHEMA)


def table_of(rows: Sequence[tuple[object, ...]], schema: pa.Schema) -> pa.Table:
    """ROWS, each with a value for every field of SCHEMA."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    arrays = [pa.array(it, field.type) for it, field in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def entries_of(lines: pa.Table) -> Iterator[Entry]:
    """What lines of the table `ledger` say."""
    for line in lines.to_pylist():
        session = Session(
            line["agent"],
            line["session"],
            _kind(line["kind"]),
            line["service"],
            line["started_ns"],
            json.loads(line["config"]),
            json.loads(line["attributes"]),
        )
        ended = line["ended"]
        yield Entry(
            line["id"],
            session,
            line["last_seq"],
            line["produced"],
            line["stored"],
            line["updated_ns"],
            json.loads(line["lost_by_stage"]),
            json.loads(line["lost_in_kernel"]),
            Ended(ended, line["ended_detail"], line["ended_ns"]) if ended else None,
            line["rows_of"],
        )


def _kind(text: str) -> Kind:
    """The kind of that name or number. A database may have been another version's, with kinds that
    this one does not have."""
    try:
        return Kind(int(text)) if text.lstrip("-").isdecimal() else Kind.of(text)
    except ValueError:
        return Kind(0)


def _json(mapping: Mapping[str, object]) -> str:
    return json.dumps(dict(mapping), separators=(",", ":"), sort_keys=True) if mapping else "{}"
