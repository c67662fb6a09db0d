"""Stacks as arrays: lists of different lengths, frames, rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coral.collectors.contract import Batch
from coral.collectors.cpu_profile.frames import FRAME, Memory, Places, UserStacks, mixed, resolve
from coral.collectors.cpu_profile.measures import ProfileMeasures
from coral.collectors.cpu_profile.naming import Code
from coral.collectors.cpu_profile.process_names import process_names
from coral.collectors.cpu_profile.ragged import Ragged, fingerprints, gather, joined_reversed
from coral.collectors.cpu_profile.samples import IN_KERNEL, Samples
from coral.collectors.cpu_profile.summaries import Profile, summaries
from coral.mesh.v1 import ebpf_pb2 as pb

CYCLES = 30_000_064
LISTS = st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=8)
SAMPLE = np.dtype(
    [
        ("time_ns", "u8"), ("tail", "u8"), ("tgid", "u4"), ("tid", "u4"), ("born", "u4"),
        ("execs", "u4"), ("flags", "u4"), ("kernel_frames", "u4"), ("stack_bytes", "u4"),
        ("comm", "S16"),
    ]
)  # fmt: skip


def ragged(lists: Sequence[Sequence[int]]) -> Ragged:
    flat = np.array([value for one in lists for value in one], np.uint64)
    return Ragged(flat, np.array([len(one) for one in lists], np.int64))


def lists_of(one: Ragged) -> list[list[int]]:
    starts = one.starts.tolist()
    return [
        one.flat[start : start + length].tolist()
        for start, length in zip(starts, one.lengths.tolist(), strict=True)
    ]


@given(LISTS)
def test_lists_are_taken_from_one_array_wherever_they_lie(lists: list[list[int]]) -> None:
    one = ragged(lists)
    order = np.arange(len(lists))[::-1]
    assert lists_of(one.take(order)) == lists[::-1]
    assert lists_of(gather(one.flat, one.starts, one.lengths)) == lists


@given(LISTS, st.data())
def test_two_lists_are_joined_from_end_to_beginning(lists: list[list[int]], data: Any) -> None:
    others = [data.draw(st.lists(st.integers(0, 5), max_size=4)) for _ in lists]
    joined = joined_reversed(ragged(lists), ragged(others))
    expected = [one[::-1] + other[::-1] for one, other in zip(lists, others, strict=True)]
    assert lists_of(joined) == expected


@given(LISTS)
def test_equal_lists_have_equal_fingerprints_and_others_do_not(lists: list[list[int]]) -> None:
    values = mixed(np.arange(6))
    found = fingerprints(ragged(lists), values, 0x9E3779B97F4A7C15).tolist()
    for one, its in zip(lists, found, strict=True):
        for other, theirs in zip(lists, found, strict=True):
            assert (one == other) == (its == theirs)


class Named:
    """Names addresses by their hundreds: `f1` from 100 to 199."""

    strings = ("", *(f"f{number}" for number in range(20)), "[kernel]", "program")

    def of_process(self, _: Any, places: Places) -> NDArray[Any]:
        return self._frames(places, "program", 0)

    def of_kernel(self, places: Places) -> NDArray[Any]:
        return self._frames(places, "[kernel]", pb.CPU_FRAME_FLAG_KERNEL)

    def _frames(self, places: Places, module: str, flags: int) -> NDArray[Any]:
        frames = np.zeros(len(places.addresses), FRAME)
        frames["function"] = places.addresses // 100 + 1
        frames["module"] = self.strings.index(module)
        frames["address"] = places.addresses // 100 * 100
        frames["flags"] = flags
        return frames


def profile(*stacks: tuple[int, Sequence[int], Sequence[int]]) -> Profile:
    """Samples of threads (tid, addresses of the kernel, of user space), innermost first."""
    structs = np.zeros(len(stacks), SAMPLE)
    structs["tgid"], structs["comm"] = 7, b"worker"
    structs["tid"] = [tid for tid, _, _ in stacks]
    kernel = ragged([kernel for _, kernel, _ in stacks])
    structs["tail"], structs["kernel_frames"] = kernel.starts, kernel.lengths
    structs["flags"] = np.where(kernel.lengths > 0, IN_KERNEL, 0)
    samples = Samples(structs, kernel.flat)
    addresses = ragged([user for _, _, user in stacks])
    user = UserStacks(
        addresses,
        addresses.places > 0,
        np.zeros(len(addresses.flat), bool),
        np.full(len(stacks), pb.CPU_STACK_END_BOTTOM, np.uint32),
        np.full(len(stacks), pb.CPU_UNWINDING_EH_FRAME, np.uint32),
    )
    namer: Any = Named()
    memory = Memory(np.zeros(len(stacks), np.intp), [namer])
    frames = resolve(samples, user, memory, namer)
    return Profile(samples, user, frames, namer.strings, np.full(len(stacks), b"program"))


def test_samples_of_one_stack_and_thread_are_one_row_outermost_frame_first() -> None:
    rows = summaries(
        profile((1, [], [100, 210, 399]), (1, [], [150, 250, 301]), (1, [1400], [150, 250, 301])),
        "shop",
        10,
    )
    first, second = rows.as_messages()
    assert isinstance(first, pb.CpuProfileSample)
    assert isinstance(second, pb.CpuProfileSample)
    assert (list(first.stack), first.count) == (["f3", "f2", "f1"], 2)
    assert (list(second.stack), second.count) == (["f3", "f2", "f1", "f14"], 1)
    assert (first.comm, first.process, first.tgid, first.tid) == ("worker", "program", 7, 1)
    assert dict(first.labels) == {
        "pid": "7", "tid": "1", "comm": "worker", "process": "program", "mode": "user",
        "end": "bottom",
    }  # fmt: skip
    assert second.labels["mode"] == "kernel"
    assert rows.columns["samples"].tolist() == [3]


def test_threads_have_rows_of_their_own_and_share_stacks() -> None:
    rows = summaries(profile((1, [], [100]), (2, [], [100]), (2, [], [100])), "shop", 10)
    assert rows.columns["count"].tolist() == [1, 2]
    assert rows.columns["stack"].tolist() == [0, 0]
    assert rows.columns["stack_length"].tolist() == [1]


def test_an_interval_without_samples_has_no_rows() -> None:
    rows = summaries(profile(), "shop", 10)
    assert len(rows) == 0
    assert rows.as_messages() == []


def test_a_sample_without_any_frame_is_still_a_sample() -> None:
    rows = summaries(profile((1, [], []), (1, [], [100])), "shop", 10)
    assert sorted(rows.columns["count"].tolist()) == [1, 1]
    assert sorted(len(row.stack) for row in rows.as_messages()) == [0, 1]  # type: ignore[attr-defined]


def test_a_part_of_the_rows_has_its_own_stacks_and_frames_and_a_part_of_the_account() -> None:
    rows = summaries(
        profile((1, [], [100, 300]), (1, [], [200, 300]), (2, [], [200, 300]), (2, [1400], [500])),
        "shop",
        10,
    )
    whole = [list(row.stack) for row in rows.as_messages()]  # type: ignore[attr-defined]
    assert whole == [["f3", "f1"], ["f3", "f2"], ["f3", "f2"], ["f5", "f14"]]
    rows.columns["samples_lost"][:] = 7
    first, rest = rows.take(np.array([0])), rows.take(np.array([False, True, True, False]))
    assert [list(row.stack) for row in first.as_messages()] == whole[:1]  # type: ignore[attr-defined]
    assert [list(row.stack) for row in rest.as_messages()] == whole[1:3]  # type: ignore[attr-defined]
    assert rest.columns["stack"].tolist() == [0, 0]
    assert len(rest.columns["frame_function"]) == 2
    figures = [(part.columns["samples"], part.columns["samples_lost"]) for part in (first, rest)]
    assert [(int(a[0]), int(b[0])) for a, b in figures] == [(1, 7), (2, 0)]
    nothing = rows.take(np.zeros(4, bool))
    assert (len(nothing), len(nothing.columns["frame_function"])) == (0, 0)


def test_rows_and_columns_have_cycles_and_no_time() -> None:
    rows = summaries(profile((1, [], [100])), "shop", 0, CYCLES)
    assert rows.columns["period_cycles"].tolist() == [CYCLES]
    assert rows.columns["period_ns"].tolist() == [0]
    (row,) = rows.as_messages()
    assert isinstance(row, pb.CpuProfileSample)
    assert (row.period_cycles, row.period_ns) == (CYCLES, 0)


def test_cycles_are_not_added_to_cpu_seconds() -> None:
    measures = ProfileMeasures(10)
    for period in ((0, CYCLES), (10_000_000, 0)):
        rows = summaries(profile((1, [], [100, 300]), (1, [], [200])), "shop", *period)
        measures.observe("shop", Batch(rows, 0, 1))
    measures.observe("other", Batch(summaries(profile((1, [], [100])), "", 0, 5), 0, 1))
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in measures.collect()
        for sample in family.samples
    }
    assert found["coral_profile_cpu_seconds_total", "shop"] == pytest.approx(0.02)
    assert found["coral_profile_cpu_cycles_total", "shop"] == 2 * CYCLES
    assert found["coral_profile_function_cpu_cycles_total", "shop", "f1"] == CYCLES
    assert found["coral_profile_function_cpu_seconds_total", "shop", "f1"] == pytest.approx(0.01)
    assert found["coral_profile_cpu_cycles_total", "other"] == 5
    assert ("coral_profile_cpu_seconds_total", "other") not in found


def test_cpu_time_is_counted_by_service_and_by_function() -> None:
    measures = ProfileMeasures(10)
    period_ns = 10_000_000
    rows = summaries(
        profile((1, [], [100, 300]), (1, [], [100, 300]), (1, [], [200]), (1, [], [])),
        "shop",
        period_ns,
    )
    measures.observe("shop", Batch(rows, 0, 1))
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in measures.collect()
        for sample in family.samples
    }
    assert found["coral_profile_cpu_seconds_total", "shop"] == pytest.approx(0.04)
    function = "coral_profile_function_cpu_seconds_total"
    assert found[function, "shop", "f1"] == pytest.approx(0.02)
    assert found[function, "shop", "f2"] == pytest.approx(0.01)
    assert found["coral_profile_samples_taken_total", "shop"] == 4
    assert found["coral_profile_samples_unwound_total", "shop", "eh_frame"] == 4


def test_functions_without_names_have_one_series_by_module() -> None:
    """Each of their samples may have an address of its own: there would soon be no series left."""
    measures = ProfileMeasures(4)
    stacks: list[tuple[int, list[int], list[int]]] = [
        (1, [], [100 * n, 1900]) for n in range(1, 18)
    ]
    rows = summaries(profile(*stacks, (1, [1400], [100])), "shop", 10_000_000)
    rows.columns["frame_flags"] |= pb.CPU_FRAME_FLAG_UNNAMED
    measures.observe("shop", Batch(rows, 0, 1))
    (functions,) = (it for it in measures.collect() if it.name.endswith("function_cpu_seconds"))
    found = {it.labels["function"]: it.value for it in functions.samples}
    assert found == {"[program]": pytest.approx(0.17), "[kernel]": pytest.approx(0.01)}


def test_functions_for_which_there_is_no_room_are_added_up() -> None:
    measures = ProfileMeasures(2)
    stacks: list[tuple[int, list[int], list[int]]] = [
        (1, [], [100 * n]) for n in (5, 5, 5, 6, 6, 7, 8)
    ]
    measures.observe("shop", Batch(summaries(profile(*stacks), "shop", 10**9), 0, 1))
    (functions,) = (it for it in measures.collect() if it.name.endswith("function_cpu_seconds"))
    found = {tuple(it.labels.values()): it.value for it in functions.samples}
    assert found == {("shop", "f5"): 3, ("shop", "f6"): 2, ("other", "other"): 2}


def test_an_account_has_what_was_lost_truncated_and_by_which_method() -> None:
    measures = ProfileMeasures(10)
    rows = summaries(profile((1, [], [100]), (2, [], [100]), (3, [], [100])), "shop", 10)
    rows.columns["samples_lost"][:], rows.columns["samples_truncated"][:] = 7, 2
    rows.columns["unwinding"][0] = pb.CPU_UNWINDING_FRAME_POINTERS
    for _ in range(2):
        measures.observe("shop", Batch(rows, 0, 1))
    found = {
        (sample.name.removeprefix("coral_profile_samples_"), *sample.labels.values()): sample.value
        for family in measures.collect()
        for sample in family.samples
        if "samples" in sample.name
    }
    assert found == {
        ("taken_total", "shop"): 6, ("lost_total", "shop"): 14, ("truncated_total", "shop"): 4,
        ("unwound_total", "shop", "none"): 0, ("unwound_total", "shop", "frame_pointers"): 2,
        ("unwound_total", "shop", "eh_frame"): 4,
    }  # fmt: skip


def test_the_size_of_caches_is_that_of_all_who_profile_now() -> None:
    first, second = Code(), Code()
    try:
        first.note_memory()
        caches = set(first.memory_bytes)
        assert caches == {"symbols", "kernel_symbols", "perf_maps", "names", "unwind_tables"}
        first.memory_bytes = {"symbols": 10, "names": 1}
        second.memory_bytes = {"symbols": 5}
        assert cache_bytes() == {"symbols": 15, "names": 1}
    finally:
        first.close()
        second.close()
    assert cache_bytes() == {}


def cache_bytes() -> dict[str, float]:
    (sizes,) = (it for it in ProfileMeasures(1).collect() if it.name == "coral_profile_cache_bytes")
    return {it.labels["cache"]: it.value for it in sizes.samples}


def test_a_process_has_the_name_that_it_had_as_each_program() -> None:
    structs = np.zeros(6, SAMPLE)
    structs["tgid"] = [7, 7, 7, 7, 7, 8]
    structs["tid"] = [7, 70, 7, 71, 7, 80]
    structs["execs"] = [1, 1, 1, 2, 3, 1]
    structs["comm"] = [b"sh", b"helper", b"renamed", b"thread", b"server", b"worker"]
    now = np.array([b"later"] * 5 + [b"daemon"], "S16")
    names = process_names(structs, now).tolist()
    assert names == [b"renamed", b"renamed", b"renamed", b"thread", b"server", b"daemon"]
    assert process_names(structs[5:], np.array([b""], "S16")).tolist() == [b"worker"]
    assert not len(process_names(structs[:0], now[:0]))


def test_programs_of_a_process_have_rows_of_their_own() -> None:
    it = profile((1, [], [100]), (1, [], [100]))
    it.samples.structs["execs"] = [1, 2]
    rows = summaries(it._replace(processes=np.array([b"sh", b"server"])), "shop", 10)
    assert rows.columns["count"].tolist() == [1, 1]
    assert [row.process for row in rows.as_messages() if isinstance(row, pb.CpuProfileSample)] == [
        "sh",
        "server",
    ]
