"""Rows as plain data: messages with the names of the .proto, single events with their texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import EnumDescriptor
from google.protobuf.message import Message

from coral.client import Batch
from coral.views.addresses import address_text
from coral.wire.kinds import resource_field_of, rows_fields


def event_rows(batch: Batch, *texts: str) -> Iterator[dict[str, Any]]:
    """Each single event, with its addresses as texts, and the strings to which its fields TEXTS
    point."""
    events = batch.events
    if not len(events):
        return
    names = events.dtype.names or ()
    resource = resource_field_of(rows_fields()[batch.rows].message) if batch.rows else ""
    at = {name: number for number, name in enumerate(names)}
    # What each field becomes, and where in a row its value lies, and the lower half of an address.
    plan = [
        (f"{name.removesuffix('_high')}_address", at[name], at[name.replace("_high", "_low")])
        if name.endswith("_high")
        else (name, at[name], -1)
        for name in names
        if not name.endswith("_low") and name != resource
    ]
    scope = at.get("scope_id", -1)
    strings = {name: batch.strings[events[name]].tolist() for name in texts}
    for number, values in enumerate(events.tolist()):
        event = {
            name: values[place]
            if low < 0
            else address_text(values[place], values[low], values[scope] if scope >= 0 else 0)
            for name, place, low in plan
        }
        for name, words in strings.items():
            event[name] = words[number]
        yield event


def plain(message: Message) -> dict[str, Any]:
    """A message with all its fields: numbers as numbers, enums by their short names. Without the
    number of its resource: see `pods.attributed`."""
    resource = resource_field_of(message.DESCRIPTOR)
    fields = (field for field in message.DESCRIPTOR.fields if field.name != resource)
    return {field.name: _plain(message, field) for field in fields}


def _plain(message: Message, field: Any) -> Any:  # noqa: ANN401
    value = getattr(message, field.name)
    if field.message_type and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.message_type:
        return plain(value)
    if field.enum_type:
        return short_name(field.enum_type, value)
    return list(value) if field.is_repeated else value


def short_name(enum: EnumDescriptor, number: int) -> str:
    """A value's name in lower case, without what all of its enum begin with."""
    names = enum.values_by_number
    if number not in names:
        return str(number)
    first = enum.values[0].name
    prefix = first[: first.rindex("_") + 1]
    return names[number].name.removeprefix(prefix).lower()
