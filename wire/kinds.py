"""The kinds of collectors and their rows, as the contract itself describes them.

Everything here is read from the options of the .proto files, so that no other code lists kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from coral.mesh.v1 import ebpf_pb2 as pb
from coral.mesh.v1 import options_pb2 as options

_PREFIX: Final = "EBPF_COLLECTOR_KIND_"


def kind_name(kind: int) -> str:
    """`syscall_stats` and its like: the kind's name as users write it; a number where the contract
    has no such kind."""
    names = pb.EbpfCollectorKind.DESCRIPTOR.values_by_number
    return names[kind].name.removeprefix(_PREFIX).lower() if kind in names else str(kind)


def kind_of(name: str) -> int:
    """The kind that NAME names. Raises ValueError."""
    return pb.EbpfCollectorKind.Value(_PREFIX + name.upper())


def said(field: Any, extension: object) -> Any:  # noqa: ANN401  of its own type
    """What the contract says of FIELD in one of its options."""
    extensions: Any = field.GetOptions().Extensions
    return extensions[extension]


@dataclass(frozen=True, slots=True)
class RowsField:
    """A field of EbpfEventBatch that carries rows, or columns, of one kind."""

    name: str
    number: int
    kind: int
    form: int  # options.RowForm
    message: Descriptor
    same_as: str  # for columns: the field that carries the same rows as messages


@cache
def rows_fields() -> Mapping[str, RowsField]:
    """Every field of EbpfEventBatch that carries rows, by name."""
    found = {}
    for field in pb.EbpfEventBatch.DESCRIPTOR.fields:
        rows: options.Rows = said(field, options.rows)
        if rows.form and field.message_type:
            found[field.name] = RowsField(
                field.name,
                field.number,
                kind_of(rows.kind),
                rows.form,
                cast("Descriptor", field.message_type),
                rows.same_as,
            )
    return found


@cache
def fields_of_kind(kind: int, form: int) -> tuple[RowsField, ...]:
    """The fields that carry rows of KIND in FORM (an options.RowForm)."""
    return tuple(it for it in rows_fields().values() if it.kind == kind and it.form == form)


@cache
def field_of(message: Descriptor) -> RowsField:
    """The field that carries rows of the type MESSAGE. Raises KeyError."""
    for field in rows_fields().values():
        if field.message.full_name == message.full_name:
            return field
    raise KeyError(message.full_name)


@cache
def event_field_of(message: Descriptor) -> str:
    """The field of EbpfEvent's payload that carries a row of the type MESSAGE. Raises KeyError."""
    for field in pb.EbpfEvent.DESCRIPTOR.oneofs_by_name["payload"].fields:
        if field.message_type and field.message_type.full_name == message.full_name:
            return field.name
    raise KeyError(message.full_name)


@cache
def fields_meaning(message: Descriptor, meaning: int) -> tuple[FieldDescriptor, ...]:
    """The fields of MESSAGE, a type of rows or of columns, with that options.Meaning."""
    return tuple(field for field in message.fields if said(field, options.meaning) == meaning)


def is_string_index(field: Any) -> bool:  # noqa: ANN401  either of protobuf's descriptors
    """Whether the values of FIELD point into the `strings` of their batch."""
    return bool(said(field, options.string_index))


@cache
def resource_field_of(message: Descriptor) -> str:
    """The field of MESSAGE, a type of rows or of columns, that points into the `resources` of the
    batch; empty where it has none."""
    return next((it.name for it in message.fields if said(it, options.resource_index)), "")
