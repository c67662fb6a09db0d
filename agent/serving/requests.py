"""From the bytes of a request to a message whose every value the contract knows.

Handlers parse by themselves: gRPC answers UNKNOWN where its deserialiser raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeVar

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from coral.agent.errors import InvalidRequestError, LimitError
from coral.wire.text import is_printable

# Of a request in all: `agent.serving.server` has gRPC refuse what is much longer than this.
MOST_BYTES: Final = 64 << 10
_NUL: Final = "\0"
# Of a text that names something: a service, a command, a collector. The agent repeats it in lists,
# in its log and in metrics. Values of a collector's options are the collector's to check.
MOST_TEXT_BYTES: Final = 128
_MOST_ENTRIES: Final = 64  # of a map; no collector has so many options
# Of a list, such as the processes of a filter: it is looked through for each batch, on the event
# loop.
MOST_ITEMS: Final = 1024

Request = TypeVar("Request", bound=Message)


def parse(message: type[Request], wire: bytes) -> Request:
    """WIRE as a MESSAGE. Raises `LimitError` for a request that is too long, `InvalidRequestError`
    for bytes that are not a MESSAGE, for too many items, for texts that are too long or not
    printable, and for numbers that an enum does not have."""
    if len(wire) > MOST_BYTES:
        raise LimitError(
            f"request: {len(wire):,} bytes are more than {MOST_BYTES:,}, this agent's limit for a "
            "request",
            "size of a request",
        )
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
            _check_count(name, len(value), "entries", _MOST_ENTRIES)
            for key, text in value.items():
                _check_name(f"{name}: the key", key)
                _check_no_nul(f'{name}["{key}"]', text)
        elif field.is_repeated:
            _check_count(name, len(value), "items", MOST_ITEMS)
            if field.type == FieldDescriptor.TYPE_STRING:
                for text in value:
                    _check_name(name, text)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            _check(value, f"{name}.")
        elif field.type == FieldDescriptor.TYPE_STRING:
            _check_name(name, value)
        elif field.enum_type and value not in field.enum_type.values_by_number:
            raise InvalidRequestError.not_one_of(name, value, _choices(field.enum_type))


def _check_count(name: str, count: int, things: str, most: int) -> None:
    if count > most:
        raise InvalidRequestError(
            f"{name}: {count:,} {things} are not accepted; give at most {most:,}"
        )


def _check_name(name: str, text: str) -> None:
    _check_no_nul(name, text)
    size_bytes = len(text.encode())
    if size_bytes > MOST_TEXT_BYTES:
        raise InvalidRequestError(
            f"{name}: {size_bytes:,} bytes are not accepted; give at most {MOST_TEXT_BYTES}"
        )
    if not is_printable(text):
        raise InvalidRequestError(f"{name}: {text!r} is not accepted; give printable text")


def _check_no_nul(name: str, text: str) -> None:
    if _NUL in text:
        raise InvalidRequestError(f"{name}: {text!r} is not accepted; give text without NUL")


def _choices(enum: EnumDescriptor) -> Iterator[tuple[str, int]]:
    for value in enum.values:
        if not value.name.endswith("_UNSPECIFIED"):
            yield value.name, value.number
