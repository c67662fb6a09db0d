"""The parser of perf buffers, on memory that the test lays out as the kernel does."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coral.bpf import BpfError
from coral.bpf.buffers import perf_buffer
from coral.bpf.buffers.perf_buffer import FRAMING, cpus_in, records_between
from coral.bpf.buffers.records import Finder, RecordKind, merged

RING = 1 << 13
LOST, SAMPLE = 2, 9

misc = st.integers(0, 0xFFFF)
aligned = st.integers(0, 1 << 40).map(lambda words: words * 8)


def record(kind: int, misc: int, body: bytes) -> bytes:
    return struct.pack("=IHH", kind, misc, 8 + len(body)) + body


def sample(misc: int, data: bytes) -> bytes:
    raw_bytes = -(-(len(data) + 4) // 8) * 8 - 4  # perf counts the padding as data
    return record(SAMPLE, misc, struct.pack("=I", raw_bytes) + data.ljust(raw_bytes, b"\xff"))


def kind_of(size: int) -> RecordKind:
    head = [("kind", "<u4"), ("length", "<u4")]
    return RecordKind(f"of_{size}", size, np.dtype([*head, ("rest", f"V{size - 8}")]))


def finder_of(kinds: list[RecordKind]) -> Finder:
    return Finder(FRAMING, kinds, lambda: None)


def of_kind(kind: RecordKind, rest: bytes) -> bytes:
    return kind.head.to_bytes(8, "little") + rest


@dataclass(frozen=True)
class Written:
    """The bytes that a kernel has written, and the records that a reader must return."""

    kinds: list[RecordKind]
    written: list[bytes]
    samples: list[tuple[int, bytes] | None]
    losses: list[int]


@st.composite
def writings(draw: st.DrawFn) -> Written:
    sizes = draw(st.lists(st.integers(8, 80), min_size=1, max_size=3, unique=True))
    kinds = [kind_of(size) for size in sizes]
    choices = draw(st.lists(st.sampled_from(["sample", "sample", "sample", "lost", "other"])))
    written: list[bytes] = []
    samples: list[tuple[int, bytes] | None] = []
    losses = []
    for choice in choices:
        samples.append(None)
        losses.append(0)
        if choice == "sample":
            which = draw(st.integers(0, len(kinds) - 1))
            rest = sizes[which] - 8
            data = of_kind(kinds[which], draw(st.binary(min_size=rest, max_size=rest)))
            samples[-1] = (which, data)
            written.append(sample(draw(misc), data))
        elif choice == "lost":
            losses[-1] = draw(st.integers(0, 1 << 32))
            written.append(record(LOST, draw(misc), struct.pack("=QQ", 77, losses[-1])))
        else:
            other = draw(st.integers(0, 30).filter(lambda kind: kind not in (LOST, SAMPLE)))
            words = draw(st.integers(0, 5))
            written.append(
                record(other, draw(misc), draw(st.binary(min_size=8 * words))[: 8 * words])
            )
    return Written(kinds, written, samples, losses)


def in_ring(written: bytes, tail: int, size: int) -> NDArray[np.uint8]:
    memory = np.full(size, 0xA5, np.uint8)
    at = (tail + np.arange(len(written))) % size
    memory[at] = np.frombuffer(written, np.uint8)
    return memory


@given(it=writings(), tail=aligned, part=st.booleans())
def test_records_come_in_order_and_losses_are_summed(*, it: Written, tail: int, part: bool) -> None:
    written = b"".join(it.written)
    size = max(
        64, 1 << max(len(written) - 1, 0).bit_length()
    )  # the smallest that holds it, which is then full
    memory = in_ring(written, tail, size)
    head, whole = tail + len(written), len(it.written)
    with pytest.MonkeyPatch.context() as patched:
        if part:
            patched.setattr(perf_buffer, "_MOST_SIZE", 127)
            ends = np.cumsum([0, *map(len, it.written)])
            whole = int(ends.searchsorted(128, side="right")) - 1
        found, lost, end = records_between(
            memory, tail, head, finder_of(it.kinds), 1 if part else None
        )
    assert end == tail + sum(map(len, it.written[:whole]))
    read = merged(it.kinds, found)
    for which, kind in enumerate(it.kinds):
        wanted = [one[1] for one in it.samples[:whole] if one and one[0] == which]
        assert [bytes(one) for one in read[kind.name].view(kind.plain).tolist()] == wanted
    assert lost == sum(it.losses[:whole])


@given(st.integers(8, 64), st.integers(0, 127), aligned)
def test_a_record_of_another_size_is_an_error_wherever_it_lies(
    record_bytes: int, position: int, tail: int
) -> None:
    kind = kind_of(record_bytes)
    right = sample(1, of_kind(kind, bytes(record_bytes - 8)))
    wrong = sample(1, of_kind(kind, bytes(record_bytes)))
    written = right * position + wrong + right
    memory = in_ring(written, tail, 1 << 14)
    with pytest.raises(BpfError, match=rf"where there may be of_{record_bytes} .{record_bytes}."):
        records_between(memory, tail, tail + len(written), finder_of([kind]))


@pytest.mark.parametrize("size", [0, 4, 12, 24, 0xFFF8])
@pytest.mark.parametrize("before", [0, 3])
def test_what_no_kernel_writes_is_an_error_and_no_endless_loop(size: int, before: int) -> None:
    kind = kind_of(16)
    written = sample(1, of_kind(kind, bytes(8))) * before
    written += struct.pack("=IHH", 3, 0, size) + bytes(8)
    with pytest.raises(BpfError, match=f"damaged: {size} bytes of 16 left"):
        records_between(in_ring(written, 0, RING), 0, len(written), finder_of([kind]))


def test_the_kernels_list_of_cpus() -> None:
    assert cpus_in("0-3,5,7-8\n") == [0, 1, 2, 3, 5, 7, 8]
    assert cpus_in("0\n") == [0]
    assert cpus_in("\n") == []
