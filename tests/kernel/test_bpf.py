"""The ground floor on the real kernel: objects, layouts, maps in bulk, the ring drain, errors."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from build_hook import clang_command
from coral.bpf import BpfError, BpfObject, LoadError, RingReader, probe
from coral.bpf.buffers.maps import sum_over_cpus
from tests.support import compiled

pytestmark = pytest.mark.usefixtures("nothing_left")

PROGRAM = "ring_enter"


@pytest.fixture(scope="module")
def ring_object() -> Path:
    return compiled("ring")


@pytest.fixture(scope="module")
def squares_object() -> Path:
    return compiled("elements")


@pytest.fixture
def loaded_object(ring_object: Path) -> Iterator[BpfObject]:
    with BpfObject(ring_object, programs=(PROGRAM,), options={"wanted_tgid": os.getpid()}) as it:
        yield it


def ring_of(it: BpfObject) -> RingReader:
    return it.ring("rings", it.record_kinds({"record": None}), ring_bytes=4096)


def call_getppid(times: int) -> None:
    for _ in range(times):
        os.getppid()


def test_a_records_layout_is_the_c_structs(loaded_object: BpfObject) -> None:
    dtype = loaded_object.btf.struct_dtype("record")
    assert dtype.itemsize == 48
    assert dtype.fields is not None
    layout = {name: (field[0], field[1]) for name, field in dtype.fields.items()}
    point = np.dtype([("x", "<i2"), ("y", "<i2")])
    assert layout == {
        "head": (np.dtype([("kind", "<u4"), ("length", "<u4")]), 0),
        "seq": (np.dtype("u8"), 8),
        "tgid": (np.dtype("u4"), 16),
        "negative": (np.dtype("i4"), 20),
        "name": (np.dtype("S8"), 24),
        "points": (np.dtype((point, (2,))), 32),
        "flag": (np.dtype("?"), 40),
        "bytes": (np.dtype(("u1", (3,))), 41),
        "colour": (np.dtype("u4"), 44),
    }


def test_records_arrive_whole_and_in_order(loaded_object: BpfObject) -> None:
    with ring_of(loaded_object) as ring:
        loaded_object.attach()
        call_getppid(10)
        records = ring.drain()["record"]
        assert records["seq"].tolist() == list(range(10))
        assert set(records["tgid"].tolist()) == {os.getpid()}
        first = records[0]
        assert first["negative"] == -7
        assert first["name"] == b"coral"
        assert first["points"].tolist() == [(1, -2), (3, -4)]
        assert first["flag"] == True  # noqa: E712  a numpy bool
        assert first["colour"] == 1
        assert len(ring.drain()["record"]) == 0


def test_a_ring_that_wraps_loses_nothing_while_it_is_drained(loaded_object: BpfObject) -> None:
    with ring_of(loaded_object) as ring:
        loaded_object.attach()
        seen = []
        for _ in range(100):  # 4,800 bytes per round do not fit: it wraps every second round
            call_getppid(50)
            seen += ring.drain()["record"]["seq"].tolist()
        assert seen == list(range(5_000))
        assert loaded_object.read_variable("lost") == 0


def test_what_a_full_ring_refuses_is_counted_to_the_record(loaded_object: BpfObject) -> None:
    with ring_of(loaded_object) as ring:
        loaded_object.attach()
        made = 2 * ring.capacity_bytes // 56
        call_getppid(made)
        kept = ring.drain()["record"]["seq"].tolist()
        lost = int(loaded_object.read_variable("lost"))
        assert len(kept) == ring.capacity_bytes // 56
        assert len(kept) + lost == made
        assert kept == list(range(len(kept)))


def test_discarded_records_are_left_out(ring_object: Path) -> None:
    options = {"wanted_tgid": os.getpid(), "discard_each": 3}
    with BpfObject(ring_object, programs=(PROGRAM,), options=options) as it:
        ring = ring_of(it)
        it.attach()
        call_getppid(30)
        assert ring.drain()["record"]["seq"].tolist() == [n for n in range(30) if n % 3]


def test_a_closed_ring_is_empty(loaded_object: BpfObject) -> None:
    with ring_of(loaded_object) as ring:
        loaded_object.attach()
        call_getppid(10)
    assert ring.drain()["record"]["seq"].tolist() == []


async def test_a_ring_wakes_the_event_loop(loaded_object: BpfObject) -> None:
    ring = ring_of(loaded_object)
    loaded_object.attach()
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(ring.fd, readable.set)
    try:
        call_getppid(1)
        async with asyncio.timeout(5):
            await readable.wait()
    finally:
        asyncio.get_running_loop().remove_reader(ring.fd)
    assert len(ring.drain()["record"]) == 1


@pytest.mark.parametrize("batches", [True, False])
def test_a_map_is_read_whole_in_batches_and_key_by_key(
    loaded_object: BpfObject, *, batches: bool
) -> None:
    points = loaded_object.map("points")
    points.batches = batches
    assert len(points.read()[0]) == 0
    for key in range(5_000):
        points.write(key, (key % 100, -1))
    keys, values = points.read()
    order = np.argsort(keys)
    assert keys[order].tolist() == list(range(5_000))
    assert values["x"][order].tolist() == [key % 100 for key in range(5_000)]
    points.delete(np.arange(4_000, dtype=np.uint32))
    points.delete([9_999])
    assert sorted(points.read()[0].tolist()) == list(range(4_000, 5_000))
    assert points.read_one(4_000) is not None
    assert points.read_one(1) is None


@pytest.mark.parametrize("batches", [True, False])
def test_reading_and_deleting_empties_a_map(loaded_object: BpfObject, *, batches: bool) -> None:
    points = loaded_object.map("points")
    points.batches = batches
    for key in range(300):
        points.write(key, (1, 2))
    assert sorted(points.read_and_delete()[0].tolist()) == list(range(300))
    assert len(points.read()[0]) == 0


def test_a_full_map_says_so(loaded_object: BpfObject) -> None:
    points = loaded_object.map("points")
    for key in range(20_000):
        points.write(key, (0, 0))
    with pytest.raises(BpfError, match="writing map points: E2BIG"):
        points.write(20_000, (0, 0))


def test_per_cpu_values_are_summed_over_cpus(loaded_object: BpfObject) -> None:
    counts = loaded_object.map("counts")
    keys, values = counts.read()
    assert counts.per_cpu
    assert values.shape == (0, len(os.sched_getaffinity(0)))
    made = np.zeros((2, 3), [("n", np.uint32)])
    made["n"] = [[1, 2, 3], [10, 20, 30]]
    assert sum_over_cpus(made, "n").tolist() == [6, 60]
    assert len(keys) == 0


def kernel_release() -> tuple[int, ...]:
    return tuple(int(number) for number in os.uname().release.split(".")[:2])


def test_the_kernel_says_what_an_object_costs(loaded_object: BpfObject) -> None:
    assert loaded_object.map_memory_bytes > 20_000 * 8
    told = loaded_object.program_stats()[PROGRAM].verified_instructions
    assert told > 10 or (told == 0 and kernel_release() < (5, 16))  # older kernels do not report it


def test_an_unknown_program_option_or_map_is_named(ring_object: Path) -> None:
    with pytest.raises(KeyError, match="no_such_program"):
        BpfObject(ring_object, programs=("no_such_program",)).__enter__()
    with pytest.raises(KeyError, match="no_such_option"):
        BpfObject(ring_object, programs=(PROGRAM,), options={"no_such_option": 1}).__enter__()
    with (
        pytest.raises(KeyError, match="no_such_map"),
        BpfObject(ring_object, programs=(PROGRAM,), map_entries={"no_such_map": 1}),
    ):
        pass


def test_a_missing_or_damaged_object_is_a_load_error(tmp_path: Path, ring_object: Path) -> None:
    with (
        pytest.raises(LoadError, match=r"opening none.bpf.o: ENOENT"),
        BpfObject(tmp_path / "none.bpf.o", programs=()),
    ):
        pass
    damaged = tmp_path / "damaged.bpf.o"
    damaged.write_bytes(ring_object.read_bytes()[:600])
    with pytest.raises(LoadError, match=r"damaged.bpf.o"), BpfObject(damaged, programs=(PROGRAM,)):
        pass


def test_what_the_verifier_refuses_comes_with_its_last_lines(tmp_path: Path) -> None:
    source = tmp_path / "bad.bpf.c"
    source.write_text(
        '#include "include/kernel.bpf.h"\n'
        'SEC("raw_tp/sys_enter") int bad(void *ctx) { return **(int **)((char *)ctx + 8); }\n'
        'char LICENSE[] SEC("license") = "GPL";\n'
    )
    output = tmp_path / "bad.bpf.o"
    subprocess.run(clang_command(source, output), check=True)
    with (
        pytest.raises(LoadError, match=r"(?s)loading bad.bpf.o: EACCES.*R1 invalid mem access"),
        BpfObject(output, programs=("bad",)),
    ):
        pass


@pytest.mark.parametrize("batches", [True, False], ids=["batches", "key by key"])
@pytest.mark.parametrize(("count", "runs"), [(0, 0), (1, 1), (4, 1), (5, 2), (12, 3)])
def test_elements_are_read_by_a_program(
    count: int, runs: int, batches: bool, squares_object: Path
) -> None:
    if reason := probe()["syscall_program"].reason:
        pytest.skip(reason)
    with BpfObject(squares_object, programs=(), walks=("squares_run",), batches=batches) as it:
        numbers = it.map("numbers")
        for number in range(1, count + 1):
            numbers.write(number, number)
        reader = it.element_reader("squares_run", "square", keys=numbers, records="squares")
        with closing(reader):
            for _ in range(2):  # nothing of the first reading is left in the second
                squares = {number: number**2 for number in range(1, count + 1) if number != 7}
                read = reader.read()
                assert len(read) == len(squares)
                assert dict(read.tolist()) == squares
        assert it.read_variable("runs") == 2 * runs
