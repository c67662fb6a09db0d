"""pprof's `profile.proto`, gzipped: `go tool pprof` and most stores of profiles read it.

The messages and their field numbers are those of
https://github.com/google/pprof/blob/main/proto/profile.proto; the few that are needed are encoded
here, so that no stubs of a second contract have to be generated. The format has no place for
guesses and cut stacks: samples have the labels `guessed` and `end`, and a cut stack begins with
`[cut]`.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping
from typing import Final

from coral.views.cpu_profile.profile import (
    CUT,
    NO_STACK,
    NOT_KEPT,
    Frame,
    Profile,
    Sampled,
    end_words,
)
from coral.views.cpu_profile.session import Facts, told
from coral.wire.encoding import WIRE_BYTES, WIRE_VARINT, varint

_SAMPLES: Final = ("samples", "count")
_TIME: Final = ("cpu", "nanoseconds")
_CYCLES: Final = ("cycles", "count")
_BELONGS_NOWHERE: Final = ("", CUT, NO_STACK, NOT_KEPT)


def pprof(profile: Profile, facts: Facts) -> bytes:
    """PROFILE as the bytes of a `.pb.gz` file; the same profile gives the same bytes."""
    tables = _Tables(profile)
    samples = [_sample(tables, stack, profile.period) for stack in profile.stacks()]
    comments = [tables.string(line) for line in (f"target: {facts.target}", *told(profile, facts))]
    main = _CYCLES if profile.in_cycles else _TIME
    types = [_message(1, _pair(tables, *each)) for each in (_SAMPLES, main)]
    parts = [
        *types,
        *(_message(2, each) for each in samples),
        *tables.encoded(),
        _number(9, facts.began_ns),
        _number(10, round(facts.seconds * 1e9)),
        _message(11, _pair(tables, *main)),
        _number(12, profile.period),
        _message(13, b"".join(map(varint, comments))),
        _number(14, tables.string(main[0])),
    ]
    # The strings come last: everything before adds to them.
    parts += [_message(6, text.encode(errors="replace")) for text in tables.strings]
    return gzip.compress(b"".join(parts), mtime=0)


class _Tables:
    """What samples point into. Numbers of strings begin with 0, which is the empty one; those of
    mappings, functions and locations with 1."""

    def __init__(self, profile: Profile) -> None:
        self.strings: dict[str, int] = {"": 0}
        self._mappings: dict[tuple[str, str], int] = {}
        self._limits: dict[int, int] = {}
        self._functions: dict[tuple[str, str], int] = {}
        self._locations: dict[tuple[str, str, str, int], int] = {}
        self._places: list[tuple[int, int, int]] = []  # mapping, address, function
        # pprof names a profile by its first mapping: that of most samples which is not the kernel.
        weights: dict[Frame, int] = {}
        for _, frames, count in profile.stacks():
            for frame in frames[:1]:
                weights[frame] = weights.get(frame, 0) + count
        for frame in sorted(weights, key=lambda it: (it.module.startswith("["), -weights[it])):
            self._mapping(frame.module, frame.build_id)

    def string(self, text: str) -> int:
        """The number of a string."""
        return self.strings.setdefault(text, len(self.strings))

    def location(self, frame: Frame) -> int:
        """The number of the place of a frame."""
        key = frame.function, frame.module, frame.build_id, frame.address
        number = self._locations.setdefault(key, len(self._locations) + 1)
        if number > len(self._places):
            mapping = self._mapping(frame.module, frame.build_id)
            self._limits[mapping] = max(self._limits.get(mapping, 0), frame.address + 1)
            function = self._functions.setdefault(key[:2], len(self._functions) + 1)
            self._places.append((mapping, frame.address, function))
        return number

    def _mapping(self, module: str, build_id: str) -> int:
        """The number of a mapping; 0 where there is none."""
        if module in _BELONGS_NOWHERE:
            return 0
        return self._mappings.setdefault((module, build_id), len(self._mappings) + 1)

    def encoded(self) -> Iterable[bytes]:
        """The messages of mappings, locations and functions.

        Addresses are as the symbols of a file count them, so each mapping begins at 0 of its file.
        All functions are named, or said to have no name: a reader need not look for names.
        """
        for (module, build_id), number in self._mappings.items():
            limit = self._limits.get(number, 0)
            names = _number(5, self.string(module)) + _number(6, self.string(build_id))
            yield _message(3, _number(1, number) + _number(3, limit) + names + _number(7, 1))
        for number, (mapping, address, function) in enumerate(self._places, 1):
            place = _number(1, number) + _number(2, mapping) + _number(3, address)
            yield _message(4, place + _message(4, _number(1, function)))
        for (name, _), number in self._functions.items():
            text = self.string(name)
            yield _message(5, _number(1, number) + _number(2, text) + _number(3, text))


def _sample(tables: _Tables, stack: Sampled, period: int) -> bytes:
    origin, frames, count = stack
    # The innermost frame comes first.
    whole = (*[Frame(CUT)] * origin.cut, *frames)[::-1]
    labels: Mapping[str, str | int] = {
        "thread": origin.thread,
        "process": origin.process,
        "tid": origin.tid,
        "pid": origin.tgid,
        "end": end_words(origin.end) if origin.cut else "",
        "guessed": "yes" if any(frame.guessed for frame in frames) else "",
    }
    locations = b"".join(varint(tables.location(frame)) for frame in whole)
    values = varint(count) + varint(count * period)
    texts = [_label(tables, name, value) for name, value in labels.items()]
    return _message(1, locations) + _message(2, values) + b"".join(texts)


def _label(tables: _Tables, name: str, value: str | int) -> bytes:
    """A label with a text or a number; nothing where the value is empty."""
    if not value:
        return b""
    key = _number(1, tables.string(name))
    if isinstance(value, int):
        return _message(3, key + _number(3, value))
    return _message(3, key + _number(2, tables.string(value)))


def _pair(tables: _Tables, name: str, unit: str) -> bytes:
    return _number(1, tables.string(name)) + _number(2, tables.string(unit))


def _number(field: int, value: int) -> bytes:
    """A field of a number; one that is 0 is left out."""
    return varint(field << 3 | WIRE_VARINT) + varint(value) if value else b""


def _message(field: int, body: bytes) -> bytes:
    """A field of bytes: a text, a message, packed numbers."""
    return varint(field << 3 | WIRE_BYTES) + varint(len(body)) + body
