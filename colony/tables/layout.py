"""The tables of the colony: one for each field of rows in the contract, by its name, derived from
the contract's descriptors and options and from `words.py`.

All begin with the same columns:

    time_ns      the end of the interval that the row tells of; of a single event, its own time;
                 of a rollup, the start of its window
    interval_ns  of summaries: how long the interval was
    agent, session, service, namespace, workload, pod, container
                 where it was seen; "" where that is not known

Rollups, `<table>_1m` and `<table>_1h`, have the columns that can be added up: keys tell rows apart,
the others are sums, maxima or minima, and `row_count` is the number of raw rows. The rules, where
`words.py` says nothing else: texts, enumerations, truths and numbers of 32 bits are keys; numbers
of 64 bits and matrices are sums; processes and threads are dropped; the contract's durations are
maxima; a name with `min` or `max` is what it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import cached_property
from typing import Any, Final

import pyarrow as pa
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from coral.client import Kind
from coral.colony.tables.histograms import Histogram
from coral.colony.tables.matrices import Matrix, Numbered
from coral.colony.tables.words import WORDS, Derived, Word, Words, word_of
from coral.mesh.v1 import options_pb2 as options
from coral.wire.encoding import FORMATS
from coral.wire.kinds import (
    RowsField,
    fields_of_kind,
    is_string_index,
    resource_field_of,
    rows_fields,
    said,
)

TIME: Final = "time_ns"
INTERVAL: Final = "interval_ns"
SAMPLE_EVERY: Final = "sample_every"
ROW_COUNT: Final = "row_count"
AGENT, SESSION = "agent", "session"
PLACE: Final = (AGENT, SESSION, "service", "namespace", "workload", "pod", "container")
STACK: Final = "stack_id"
STACKS: Final = "cpu_stacks"

_NS_PER_MINUTE: Final = 60 * 10**9
_HIGH, _LOW, _SCOPE, _STACK = "_high", "_low", "scope_id", "stack"
_PROCESSES: Final = (options.MEANING_PID, options.MEANING_TID)


class Form(Enum):
    """How the values of a column come about."""

    TEXT = auto()
    WORD = auto()  # numbers that stand for words
    NUMBER = auto()
    TRUTH = auto()
    ADDRESS = auto()  # two numbers of 64 bits
    EACH_ROW = auto()  # what the batch has once
    FIRST_ROW = auto()
    STACK = auto()  # the number of a stack of the batch


class Role(Enum):
    """What rollups make of a column."""

    KEY = auto()
    SUM = auto()
    MOST = auto()
    LEAST = auto()  # of those that are not 0, which is no value
    DROPPED = auto()


@dataclass(frozen=True)
class Column:
    """A column of a table: its name there, and in a batch; its type in Arrow."""

    name: str
    source: str
    form: Form
    type: pa.DataType
    role: Role = Role.DROPPED
    word: Word | None = None
    words: tuple[str, ...] = ()
    """All words of the contract's enumeration, "" among them; none where that is not known."""

    @property
    def is_text(self) -> bool:
        """Whether its values are text."""
        return self.form in (Form.TEXT, Form.WORD, Form.ADDRESS)


@dataclass(frozen=True)
class Level:
    """A width of rollups, and what their tables' names end with."""

    suffix: str
    width_ns: int

    def name(self, table: str) -> str:
        """The name of the rollup of TABLE."""
        return f"{table}_{self.suffix}"


MINUTE: Final = Level("1m", _NS_PER_MINUTE)
HOUR: Final = Level("1h", 60 * _NS_PER_MINUTE)
LEVELS: Final = (MINUTE, HOUR)


@dataclass(frozen=True)
class TableLayout:
    """A table: its kind of collector; its columns beside the common ones, matrices apart by the
    name in the batch. `time_source` is the field of a single event with its time, "" of summaries;
    `resource_source` the one that says which resource of the batch a row is of."""

    name: str
    kind: Kind
    columns: tuple[Column, ...]
    matrices: Mapping[str, Matrix] = field(default_factory=dict)
    derived: tuple[Derived, ...] = ()
    time_source: str = ""
    resource_source: str = ""
    key_where: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)

    @property
    def is_rolled_up(self) -> bool:
        """Whether there are rollups of it: of summaries alone."""
        return not self.time_source

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns that the table always has, as a pyarrow.Schema. Later batches can bring
        further ones, which follow them: int64, where NULL means 0."""
        common = [(TIME, pa.int64())]
        if not self.time_source:
            common.append((INTERVAL, pa.int64()))
        common += [(name, pa.string()) for name in PLACE]
        if self.time_source:
            common.append((SAMPLE_EVERY, pa.uint32()))
        own = [(it.name, it.type) for it in self.columns]
        return pa.schema([*common, *own, *((name, pa.int64()) for name in self.added)])

    @cached_property
    def rollup_schema(self) -> pa.Schema:
        """The same of its rollups."""
        return pa.schema(
            [
                (TIME, pa.int64()),
                (INTERVAL, pa.int64()),
                *((name, pa.string()) for name in PLACE),
                *((it.name, it.type) for it in self.key_columns),
                (ROW_COUNT, pa.int64()),
                *((name, pa.int64()) for name in self.figures),
            ]
        )

    @cached_property
    def key_columns(self) -> tuple[Column, ...]:
        """What tells rows of a rollup apart beside the common columns."""
        return tuple(it for it in self.columns if it.role is Role.KEY)

    @property
    def keys(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(it.name for it in self.key_columns)

    @cached_property
    def figures(self) -> Mapping[str, Role]:
        """The figures of rollups that there always are. Columns that came later are sums."""
        own = {
            it.name: it.role for it in self.columns if it.role in (Role.SUM, Role.MOST, Role.LEAST)
        }
        return own | dict.fromkeys(self.added, Role.SUM)

    @cached_property
    def added(self) -> tuple[str, ...]:
        """The columns that are derived, and those of matrices."""
        named = (name for matrix in self.matrices.values() for name in matrix.expected)
        return (*(it.name for it in self.derived), *named)

    @property
    def histograms(self) -> Mapping[str, Histogram]:
        """Its histograms, by name."""
        found = (matrix.histogram for matrix in self.matrices.values())
        return {it.name: it for it in found if it}

    @property
    def sort_by(self) -> tuple[str, ...]:
        """The order that makes rows small and quick to find: summaries of one service and subject,
        single events of one service, by their time."""
        return ("service", *self.keys, "agent", TIME)


def _layouts() -> Iterator[TableLayout]:
    for rows in rows_fields().values():
        if rows.form == options.ROW_FORM_COLUMNS:
            yield _layout(rows, rows.same_as, "")
        elif rows.form == options.ROW_FORM_EVENTS:
            # The contract's events begin with their time.
            first = min(rows.message.fields, key=lambda it: it.number)
            yield _layout(rows, rows.name, first.name)


def _layout(rows: RowsField, name: str, time_source: str) -> TableLayout:
    words = WORDS.get(name, Words())
    hints = _summaries_of(rows.kind)
    columns, matrices = [], {}
    resource = resource_field_of(rows.message)
    skipped = {time_source, TIME, INTERVAL, resource, *PLACE, *words.left_out}
    for it in sorted(rows.message.fields, key=lambda it: it.number):
        if it.name in skipped:
            continue
        if said(it, options.matrix):
            matrices[it.name] = words.matrices.get(it.name) or Numbered(it.name, str, 0)
        elif column := _column(it, hints.get(it.name), words):
            columns.append(replace(column, role=Role.DROPPED) if time_source else column)
    return TableLayout(
        name,
        Kind(rows.kind),
        tuple(columns),
        matrices,
        words.derived,
        time_source,
        resource,
        words.key_where,
    )


def _summaries_of(kind: int) -> Mapping[str, FieldDescriptor]:
    """The fields of a kind's row messages by name: they have the types that numbers of fixed width
    lack."""
    messages: list[Descriptor] = [
        it.message for it in fields_of_kind(kind, options.ROW_FORM_SUMMARIES)
    ]
    return {it.name: it for message in reversed(messages) for it in message.fields}


def _column(it: Any, hint: FieldDescriptor | None, words: Words) -> Column | None:  # noqa: ANN401
    """The column of a field of fixed width; None where a table has none of it."""
    name = it.name
    once = name in words.each_row or name in words.first_row
    if name.endswith(_LOW) or name == _SCOPE or (said(it, options.per_batch) and not once):
        return None  # part of an address, or of the whole batch
    if name.endswith(_HIGH):
        text = f"{name.removesuffix(_HIGH)}_address"
        return Column(text, name, Form.ADDRESS, pa.string())
    if name in words.first_row:
        return Column(name, name, Form.FIRST_ROW, pa.int64(), Role.SUM)
    if name in words.each_row:
        return Column(name, name, Form.EACH_ROW, pa.int64(), _role(it, words))
    if name == _STACK:
        return Column(STACK, name, Form.STACK, pa.uint64(), Role.KEY)
    return _of_row(it, hint, words)


def _of_row(it: Any, hint: FieldDescriptor | None, words: Words) -> Column:  # noqa: ANN401
    """The column of a field that has one value for each row."""
    name = it.name
    key = _exceptions(name, Role.KEY, words)
    if is_string_index(it):
        return Column(name, name, Form.TEXT, pa.string(), key)
    word = words.words.get(name)
    words_of_enum: tuple[str, ...] = ()
    if word is None and hint and hint.enum_type:
        word = word_of(hint.enum_type)
        words_of_enum = tuple(word(value.number) for value in hint.enum_type.values)
    if word:
        return Column(name, name, Form.WORD, pa.string(), key, word, words_of_enum)
    if hint and hint.type == FieldDescriptor.TYPE_BOOL:
        return Column(name, name, Form.TRUTH, pa.bool_(), key)
    return Column(name, name, Form.NUMBER, _number_type(it), _role(it, words))


def _number_type(it: Any) -> pa.DataType:  # noqa: ANN401
    wire = FORMATS[it.type]
    if wire.kind == "f":
        return pa.float64()
    if wire.itemsize == 4:  # noqa: PLR2004
        return pa.uint32() if wire.kind == "u" else pa.int32()
    return pa.uint64() if it.name.endswith("_id") else pa.int64()


def _role(it: Any, words: Words) -> Role:  # noqa: ANN401
    """By the rules above, which the words except from."""
    meaning, wire = said(it, options.meaning), FORMATS[it.type]
    parts = it.name.split("_")
    if meaning in _PROCESSES or wire.kind != "u":
        rule = Role.DROPPED
    elif "min" in parts:
        rule = Role.LEAST
    elif "max" in parts or meaning == options.MEANING_DURATION:
        rule = Role.MOST
    else:
        rule = Role.KEY if wire.itemsize == 4 else Role.SUM  # noqa: PLR2004
    return _exceptions(it.name, rule, words)


def _exceptions(name: str, rule: Role, words: Words) -> Role:
    for role, names in (
        (Role.DROPPED, words.dropped),
        (Role.KEY, words.keys),
        (Role.SUM, words.sums),
        (Role.MOST, words.most),
        (Role.LEAST, words.least),
    ):
        if name in names:
            return role
    return rule


TABLES: Final[Mapping[str, TableLayout]] = {it.name: it for it in _layouts()}
"""The tables of raw rows, by name, but for `STACKS`."""

STACKS_SCHEMA: Final = pa.schema(
    [
        (STACK, pa.uint64()),
        (TIME, pa.int64()),
        ("functions", pa.list_(pa.string())),
        ("modules", pa.list_(pa.string())),
        ("build_ids", pa.list_(pa.string())),
        ("addresses", pa.list_(pa.uint64())),
        ("flags", pa.list_(pa.uint32())),
    ]
)
"""The table `STACKS`: the frames of stacks, the outermost first. `time_ns` is that of the first row
that had the stack since the colony last forgot it. A stack can be there several times, with other
addresses: those of functions with a name are examples."""


def schema_of(table: str) -> pa.Schema:
    """The pyarrow.Schema of TABLE: raw rows, a rollup, or `STACKS`. Raises KeyError."""
    if table == STACKS:
        return STACKS_SCHEMA
    base, level = base_of(table)
    return TABLES[base].rollup_schema if level else TABLES[base].schema


def base_of(table: str) -> tuple[str, Level | None]:
    """The table of raw rows that TABLE is or rolls up, and the level of the latter."""
    for level in LEVELS:
        if table.endswith(f"_{level.suffix}"):
            return table.removesuffix(f"_{level.suffix}"), level
    return table, None
