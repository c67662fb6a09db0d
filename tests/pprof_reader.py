"""pprof's messages, as far as tests read them, from a description of their own: the encoder of the
project is not asked."""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_VARINT: Final = {"i": "TYPE_INT64", "u": "TYPE_UINT64", "b": "TYPE_BOOL"}
# https://github.com/google/pprof/blob/main/proto/profile.proto: number, name, type; `+` repeats.
_MESSAGES: Final = {
    "ValueType": "1 type i, 2 unit i",
    "Label": "1 key i, 2 str i, 3 num i, 4 num_unit i",
    "Sample": "1 location_id +u, 2 value +i, 3 label +Label",
    "Mapping": (
        "1 id u, 2 memory_start u, 3 memory_limit u, 4 file_offset u, 5 filename i, 6 build_id i, "
        "7 has_functions b, 8 has_filenames b, 9 has_line_numbers b, 10 has_inline_frames b"
    ),
    "Line": "1 function_id u, 2 line i, 3 column i",
    "Location": "1 id u, 2 mapping_id u, 3 address u, 4 line +Line, 5 is_folded b",
    "Function": "1 id u, 2 name i, 3 system_name i, 4 filename i, 5 start_line i",
    "Profile": (
        "1 sample_type +ValueType, 2 sample +Sample, 3 mapping +Mapping, 4 location +Location, "
        "5 function +Function, 6 string_table +s, 7 drop_frames i, 8 keep_frames i, "
        "9 time_nanos i, 10 duration_nanos i, 11 period_type ValueType, 12 period i, "
        "13 comment +i, 14 default_sample_type i"
    ),
}


@dataclass(frozen=True)
class Row:
    """A sample: frames outermost first, each with its module, build id and address."""

    frames: list[tuple[str, str, str, int]]
    values: list[int]
    labels: dict[str, str | int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [frame[0] for frame in self.frames]


@dataclass(frozen=True)
class Read:
    """A whole file."""

    message: Any
    types: list[tuple[str, str]]
    rows: list[Row]
    comments: list[str]


def read(content: bytes) -> Read:
    """Decodes a `.pb.gz`. Every number in it has to point to something."""
    profile = _type_of("Profile")()
    nowhere = _type_of("Mapping")()
    profile.ParseFromString(gzip.decompress(content))
    strings = list(profile.string_table)
    assert strings[0] == ""
    assert len(set(strings)) == len(strings)
    mappings = {it.id: it for it in profile.mapping}
    functions = {it.id: strings[it.name] for it in profile.function}
    locations = {it.id: it for it in profile.location}
    assert 0 not in {*mappings, *functions, *locations}

    def frame(number: int) -> tuple[str, str, str, int]:
        place = locations[number]
        mapping = mappings[place.mapping_id] if place.mapping_id else nowhere
        if mapping is not nowhere:
            assert mapping.memory_start <= place.address < mapping.memory_limit
        (line,) = place.line
        module, build_id = strings[mapping.filename], strings[mapping.build_id]
        return functions[line.function_id], module, build_id, place.address

    rows = [
        Row(
            [frame(number) for number in reversed(sample.location_id)],
            list(sample.value),
            {strings[it.key]: strings[it.str] if it.str else it.num for it in sample.label},
        )
        for sample in profile.sample
    ]
    types = [(strings[it.type], strings[it.unit]) for it in profile.sample_type]
    return Read(profile, types, rows, [strings[it] for it in profile.comment])


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(
        name="pprof_of_tests.proto", package="tests.pprof", syntax="proto3"
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for each in fields.split(", "):
            number, called, kind = each.split()
            one = message.field.add(name=called, number=int(number), label=kinds.LABEL_OPTIONAL)
            if kind.startswith("+"):
                one.label = kinds.LABEL_REPEATED
            kind = kind.removeprefix("+")
            if kind in _MESSAGES:
                one.type, one.type_name = kinds.TYPE_MESSAGE, f".tests.pprof.{kind}"
            else:
                one.type = getattr(kinds, _VARINT.get(kind, "TYPE_STRING"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _type_of(name: str) -> Any:
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"tests.pprof.{name}"))
