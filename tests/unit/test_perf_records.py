"""The parser of perf buffers, on memory that the test lays out as the kernel does."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.bpf import BpfError
from coral.bpf.buffers.perf_buffer import SampleLayout, cpus_in, records_between

RING = 1 << 13
LOST, SAMPLE = 2, 9

misc = st.integers(0, 0xFFFF)
aligned = st.integers(0, 1 << 40).map(lambda words: words * 8)


def record(kind: int, misc: int, body: bytes) -> bytes:
    return struct.pack("=IHH", kind, misc, 8 + len(body)) + body


def sample(misc: int, data: bytes) -> bytes:
    raw_bytes = -(-(len(data) + 4) // 8) * 8 - 4  # perf counts the padding as data
    return record(SAMPLE, misc, struct.pack("=I", raw_bytes) + data.ljust(raw_bytes, b"\xff"))


@dataclass(frozen=True)
class Written:
    """The bytes that a kernel has written, and the records that a reader must return."""

    record_bytes: int
    written: list[bytes]
    samples: list[bytes]
    lost: int


@st.composite
def writings(draw: st.DrawFn) -> Written:
    record_bytes = draw(st.integers(1, 80))
    data = st.binary(min_size=record_bytes, max_size=record_bytes)
    kinds = draw(st.lists(st.sampled_from(["sample", "sample", "sample", "lost", "other"])))
    written, samples, lost = [], [], 0
    for kind in kinds:
        if kind == "sample":
            samples.append(draw(data))
            written.append(sample(draw(misc), samples[-1]))
        elif kind == "lost":
            count = draw(st.integers(0, 1 << 32))
            lost += count
            written.append(record(LOST, draw(misc), struct.pack("=QQ", 77, count)))
        else:
            other = draw(st.integers(0, 30).filter(lambda kind: kind not in (LOST, SAMPLE)))
            words = draw(st.integers(0, 5))
            written.append(
                record(other, draw(misc), draw(st.binary(min_size=8 * words))[: 8 * words])
            )
    return Written(record_bytes, written, samples, lost)


def in_ring(written: bytes, tail: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    memory = np.full(size, 0xA5, np.uint8)
    at = (tail + np.arange(len(written))) % size
    memory[at] = np.frombuffer(written, np.uint8)
    return memory


@given(writings(), aligned)
def test_records_come_in_order_and_losses_are_summed(it: Written, tail: int) -> None:
    written = b"".join(it.written)
    size = max(
        64, 1 << max(len(written) - 1, 0).bit_length()
    )  # the smallest that holds it, which is then full
    found, lost = records_between(
        in_ring(written, tail, size), tail, tail + len(written), SampleLayout(it.record_bytes)
    )
    assert [bytes(one) for run in found for one in run.tolist()] == it.samples
    assert lost == it.lost


@given(st.integers(1, 64), st.integers(0, 127), aligned)
def test_a_record_of_another_size_is_an_error_wherever_it_lies(
    record_bytes: int, position: int, tail: int
) -> None:
    right, wrong = sample(1, bytes(record_bytes)), sample(1, bytes(record_bytes + 8))
    written = right * position + wrong + right
    memory = in_ring(written, tail, 1 << 14)
    with pytest.raises(BpfError, match=f"in a perf buffer of records of {record_bytes}"):
        records_between(memory, tail, tail + len(written), SampleLayout(record_bytes))


@pytest.mark.parametrize("size", [0, 4, 12, 24, 0xFFF8])
def test_what_no_kernel_writes_is_an_error_and_no_endless_loop(size: int) -> None:
    written = struct.pack("=IHH", 3, 0, size) + bytes(8)
    with pytest.raises(BpfError, match="damaged"):
        records_between(in_ring(written, 0, RING), 0, len(written), SampleLayout(16))


def test_a_run_of_records_is_read_in_place() -> None:
    written = sample(1, b"12345678") * 100
    memory = in_ring(written, RING - 1000, RING)
    found, _ = records_between(memory, RING - 1000, RING - 1000 + len(written), SampleLayout(8))
    assert [len(run) for run in found] == [41, 1, 58]  # up to the end of the ring, across, after
    assert [np.shares_memory(run, memory) for run in found] == [True, False, True]


def test_the_kernels_list_of_cpus() -> None:
    assert cpus_in("0-3,5,7-8\n") == [0, 1, 2, 3, 5, 7, 8]
    assert cpus_in("0\n") == [0]
    assert cpus_in("\n") == []
