"""The ground floor without descriptors: no figure is made up, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from coral import bpf
from coral.bpf import BpfError, BpfObject, HashMap, LoadError, RingReader, climb
from coral.bpf.libbpf import call
from coral.bpf.rung import HOOKS

pytestmark = pytest.mark.usefixtures("nothing_left")

HASH = 1


@pytest.fixture
def watching() -> Iterator[BpfObject]:
    rung = climb(bpf.probe(), HOOKS)
    with rung.object(
        "syscall_stats",
        programs=("coral_enter",),
        preallocated=("stats", "members"),
    ) as it:
        yield it


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Within the block, this process cannot open anything."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_descriptors_memory_is_what_it_was_and_programs_still_have_figures(
    watching: BpfObject,
) -> None:
    before = watching.map_memory_bytes
    assert before > 4096
    programs = set(watching.program_stats())
    assert len(programs) >= 1
    with no_descriptors():
        assert watching.map_memory_bytes == before
        assert set(watching.program_stats()) == programs


def test_a_ring_that_cannot_be_opened_leaves_no_mapping(watching: BpfObject) -> None:
    kinds = watching.record_kinds({"syscall_call": None})
    with no_descriptors(), pytest.raises(LoadError, match="making map rings: EMFILE"):
        watching.ring("rings", kinds, ring_bytes=4096)
    # Two pages that cannot be mapped behind the first one that can.
    with (
        watching.make_inner("rings", 4096) as ring,
        pytest.raises(OSError, match="Invalid argument"),
    ):
        RingReader(ring.fd, 1 << 30, kinds)
    assert "bpf-map" not in Path("/proc/self/maps").read_text()


def test_an_object_that_finds_no_descriptors_says_so() -> None:
    with (
        no_descriptors(),
        pytest.raises(LoadError, match=r"opening syscall_stats\.bpf\.o: EMFILE") as refused,
        BpfObject("syscall_stats", programs=()),
    ):
        pass
    assert refused.value.errno == errno.EMFILE
    assert "LimitNOFILE" in str(refused.value)


@pytest.mark.parametrize("batches", [True, False])
def test_a_map_that_cannot_be_read_is_an_error_and_not_empty(*, batches: bool) -> None:
    fd = call("bpf_map_create", HASH, b"coral_test", 4, 4, 8, None)
    assert fd > 0
    numbers = np.dtype(np.uint32)
    points = HashMap("points", fd, HASH, numbers, numbers, batches=batches)
    points.write(1, 2)
    assert points.read()[1].tolist() == [2]
    os.close(fd)
    with pytest.raises(BpfError, match="reading map points: EBADF"):
        points.read()
