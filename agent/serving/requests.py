"""From the bytes of a request to a message whose every value the contract knows.

Handlers parse by themselves: gRPC answers UNKNOWN where its deserialiser raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeVar

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from coral.agent.errors import InvalidRequestError

_NUL: Final = "\0"
# Of a list, such as the processes of a filter: it is looked through for each batch, on the event
# loop.
MOST_ITEMS: Final = 1024

Request = TypeVar("Request", bound=Message)


def parse(message: type[Request], wire: bytes) -> Request:
    """WIRE as a MESSAGE. Raises `InvalidRequestError` for bytes that are none, for texts with a NUL
    in them, which no name in the kernel can have, and for numbers that an enum does not have."""
    try:
        request = message.FromString(wire)
    except DecodeError as error:
        raise InvalidRequestError(
            f"request: these {len(wire)} bytes are not a {message.DESCRIPTOR.full_name}: {error}"
        ) from error
    _check(request, "")
    return request


def _check(message: Message, prefix: str) -> None:
    for field, value in message.ListFields():
        name = prefix + field.name
        if field.message_type and field.message_type.GetOptions().map_entry:
            for key, text in value.items():
                _check_text(f"{name}: the key", key)
                _check_text(f'{name}["{key}"]', text)
        elif field.is_repeated and len(value) > MOST_ITEMS:
            raise InvalidRequestError(
                f"{name}: {len(value):,} items are not accepted; give at most {MOST_ITEMS:,}"
            )
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            _check(value, f"{name}.")
        elif field.type == FieldDescriptor.TYPE_STRING:
            for text in [value] if isinstance(value, str) else value:
                _check_text(name, text)
        elif field.enum_type and value not in field.enum_type.values_by_number:
            raise InvalidRequestError.not_one_of(name, value, _choices(field.enum_type))


def _check_text(name: str, text: str) -> None:
    if _NUL in text:
        raise InvalidRequestError(f"{name}: {text!r} is not accepted; give text without NUL")


def _choices(enum: EnumDescriptor) -> Iterator[tuple[str, int]]:
    for value in enum.values:
        if not value.name.endswith("_UNSPECIFIED"):
            yield value.name, value.number
