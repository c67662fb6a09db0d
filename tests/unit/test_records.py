"""Records of several kinds and sizes, in memory that the test lays out as a ring buffer's."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coral.bpf import BpfError
from coral.bpf.buffers import records
from coral.bpf.buffers.records import Finder, RecordKind, drain_whole, merged
from coral.bpf.buffers.ring import FRAMING

BUSY, DISCARDED = 1 << 31, 1 << 30


def kind_of(name: str, number: int, size: int) -> RecordKind:
    head = [("kind", "<u4"), ("length", "<u4")]
    return RecordKind(name, number, np.dtype([*head, ("rest", f"V{size - 8}")]))


def record(kind: RecordKind, number: int) -> bytes:
    rest = (number.to_bytes(8, "little") * (kind.size // 8 + 1))[: kind.size - 8]
    return kind.head.to_bytes(8, "little") + rest


def frame(data: bytes, flags: int = 0) -> bytes:
    padding = bytes(-len(data) % 8)
    return struct.pack("<II", len(data) | flags, 7) + data + padding


def in_memory(written: bytes) -> NDArray[np.uint64]:
    """The bytes between others, as in a ring, which begin behind 8 bytes."""
    return np.frombuffer(b"\xa5" * 8 + written + b"\xa5" * 16, np.uint64)


@dataclass(frozen=True)
class Written:
    """The frames of a ring, the records that a reader must return by kind, and how many frames come
    before the first that is not complete."""

    kinds: list[RecordKind]
    frames: list[bytes]
    records: list[tuple[str, bytes] | None]
    complete: int


@st.composite
def writings(draw: st.DrawFn) -> Written:
    sizes = draw(st.lists(st.integers(8, 90), min_size=1, max_size=4))
    kinds = [kind_of(f"kind_{n}", n + 1, size) for n, size in enumerate(sizes)]
    choices = draw(
        st.lists(
            st.tuples(
                st.integers(0, len(kinds) - 1), st.integers(1, 30), st.sampled_from([0] * 5 + [1])
            ),
            max_size=30,
        )
    )
    frames: list[bytes] = []
    expected: list[tuple[str, bytes] | None] = []
    for which, times, discarded in choices:
        for _ in range(times):
            data = record(kinds[which], len(frames))
            frames.append(frame(data, DISCARDED * discarded))
            expected.append(None if discarded else (kinds[which].name, data))
    complete = len(frames)
    cut: bool = draw(st.booleans())
    if frames and cut:
        complete = draw(st.integers(0, len(frames) - 1))
        length, rest = frames[complete][:4], frames[complete][4:]
        frames[complete] = struct.pack("<I", int.from_bytes(length, "little") | BUSY) + rest
    return Written(kinds, frames, expected, complete)


@pytest.mark.parametrize("block_words", [4, 64, 1 << 14])
@given(it=writings(), share=st.floats(0, 1))
def test_every_record_comes_once_in_order_by_kind(
    block_words: int, it: Written, share: float
) -> None:
    written = b"".join(it.frames)
    most = int(len(written) * share) // 8  # the reader takes whole frames of these words
    ends = np.cumsum([0, *map(len, it.frames)]) // 8
    whole = min(int(ends.searchsorted(most, side="right")) - 1, it.complete)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(records, "_BLOCK_WORDS", block_words)
        found = Finder(FRAMING, it.kinds, lambda: None).find(in_memory(written), 8, most)
    assert found.words == ends[whole]
    assert found.last == ends[max(whole - 1, 0)]
    read = merged(it.kinds, found.records)
    for kind in it.kinds:
        wanted = [r[1] for r in it.records[:whole] if r and r[0] == kind.name]
        assert read[kind.name].dtype == kind.dtype
        assert [one.tobytes() for one in read[kind.name]] == wanted
    discarded = [int(ends[n]) for n in range(whole) if it.records[n] is None]
    assert found.others.tolist() == discarded


@pytest.mark.parametrize("before", [0, 1, 20])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (struct.pack("<IIQ", 3, 16, 0), "kind 3 with 16 bytes, in 16 .* call .16., other .24."),
        (struct.pack("<IIQ", 1, 24, 0), "kind 1 with 24 bytes, in 16 "),
        (struct.pack("<IIQQ", 1, 16, 0, 0), "kind 1 with 16 bytes, in 24 "),
        (struct.pack("<IIQ", 2, 24, 0), "kind 2 with 24 bytes, in 16 "),
        (struct.pack("<I", 1), "kind 1 with 0 bytes, in 8 "),
        (b"", "kind 0 with 0 bytes, in 0 "),
    ],
)
def test_a_record_of_another_kind_or_length_is_an_error_with_numbers(
    before: int, data: bytes, message: str
) -> None:
    kinds = [kind_of("call", 1, 16), kind_of("other", 2, 24)]
    right = frame(record(kinds[0], 1))
    for after in (b"", right):
        memory = in_memory(right * before + frame(data) + after)
        words = before * 3 + len(frame(data) + after) // 8
        with pytest.raises(BpfError, match=message):
            Finder(FRAMING, kinds, lambda: None).find(memory, 8, words)


def test_a_row_of_one_kind_is_one_copy() -> None:
    kinds = [kind_of("call", 1, 56), kind_of("other", 2, 56)]
    written = b"".join(frame(record(kinds[0], n)) for n in range(1_000))
    memory = in_memory(written)
    found = Finder(FRAMING, kinds, lambda: None).find(memory, 8, len(written) // 8)
    (row,) = found.records
    assert row[0] is kinds[0]
    assert len(row[1]) == 1_000
    assert row[1].flags.c_contiguous
    assert not np.shares_memory(row[1], memory)


def test_records_are_sorted_by_the_field_of_their_kind() -> None:
    dtype = np.dtype([("kind", "<u4"), ("length", "<u4"), ("time_ns", "<u8")])
    kinds = [RecordKind("call", 1, dtype, "time_ns"), RecordKind("other", 2, dtype)]
    parts = [
        (kind, np.array([(n, 16, at) for at in times], dtype).view("V16"))
        for n, kind in ((1, kinds[0]), (2, kinds[1]))
        for times in ([3, 5], [4, 4], [1])
    ]
    read = merged(kinds, parts, sort=True)
    assert read["call"]["time_ns"].tolist() == [1, 3, 4, 4, 5]
    assert read["other"]["time_ns"].tolist() == [3, 5, 4, 4, 1]
    with pytest.raises(KeyError, match="no_such_field"):
        RecordKind("call", 1, dtype, "no_such_field")


class Producing:
    """A reader whose programs never stop writing."""

    capacity_bytes = 1 << 20

    def __init__(self) -> None:
        self.pending_bytes, self.drains = 1 << 20, 0

    def drain(self, most_bytes: int = records.MOST_BYTES) -> records.Records:
        assert most_bytes == 1 << 18
        self.drains += 1
        return {"call": np.arange(3) + 3 * self.drains}


def test_everything_is_drained_in_parts_and_to_an_end() -> None:
    reader = Producing()
    read = drain_whole(reader, 1 << 18)
    assert reader.drains == 5
    assert read["call"].tolist() == list(range(3, 18))
