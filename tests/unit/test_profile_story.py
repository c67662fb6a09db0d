"""What a tap of `cpu_profile` shows: functions with self and total, and what was not seen."""

from __future__ import annotations

import re
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.cpu_profile.names import fitted, visible
from coral.views.cpu_profile.profile import NOT_KEPT, Frame, Profile
from coral.views.cpu_profile.provoke import PROVOCATION
from coral.views.cpu_profile.reading import records, take
from coral.views.cpu_profile.story import ProfileStory
from coral.views.cpu_profile.tree import call_tree, least_drawn, walk
from coral.wire.text import is_printable
from tests.drawing import drawn_lines, table
from tests.profiles import (
    BUILD_ID,
    GUESS,
    HOSTILE,
    KERNEL,
    NO_INFO,
    PERIOD_NS,
    START_NS,
    TOO_SHORT,
    UNNAMED,
    Stack,
    batch_of,
    profile_of,
    rows_of,
)

KERNEL_FRAME: Final = Frame("do_syscall_64", "[kernel]", 0x1000, "", KERNEL)
GUESSED: Final = Frame("middle", "/lib/libg.so.1", 0x77, "", GUESS)
STRIPPED: Final = Frame("shop+0x1234", "/usr/bin/shop", 0x1234, BUILD_ID, UNNAMED)
STACKS: Final = (
    Stack(["main", "work", "leaf"], 70),
    Stack(["main", "work", "work"], 20, thread="other", tid=79),
    Stack(["main", GUESSED, KERNEL_FRAME], 5),
    Stack(["lost", "leaf"], 3, end=TOO_SHORT),
    Stack(["lost", STRIPPED], 2, end=NO_INFO),
)
NAMES: Final = st.sampled_from(["main", "work", "leaf", "read", *HOSTILE])
PROFILES: Final = st.lists(
    st.tuples(st.lists(NAMES, max_size=6), st.integers(1, 50), st.sampled_from([1, TOO_SHORT, 7])),
    max_size=12,
).map(lambda rows: profile_of(*(Stack(names, count, end=end) for names, count, end in rows)))


def story_of(*batches: Batch) -> ProfileStory:
    story = ProfileStory()
    story.intervals.begin(START_NS)
    for batch in batches:
        story.add(batch)
    return story


def test_columns_and_rows_give_the_same_samples() -> None:
    of_columns, of_rows = Profile(), Profile()
    take(batch_of(*STACKS), of_columns)
    take(rows_of(*STACKS), of_rows)
    for profile in (of_columns, of_rows):
        assert (profile.samples, profile.cpu_ns) == (100, 100 * PERIOD_NS)
        assert profile.ends == {1: 95, TOO_SHORT: 3, NO_INFO: 2}
        assert (profile.cut, profile.processes) == (5, ["shop"])
    first, second, *_ = of_columns.stacks()
    assert first.frames[0] == Frame("main", "/usr/bin/shop", 0x1004, BUILD_ID)
    assert (second.origin.thread, second.origin.tid, second.origin.tgid) == ("other", 79, 77)
    assert [frame.function for frame in next(of_rows.stacks()).frames] == ["main", "work", "leaf"]


def test_a_client_of_another_agent_fills_in_labels_alone() -> None:
    labels = {"pid": "5", "tid": "x", "comm": "old"}
    row = pb.CpuProfileSample(stack=["main", ""], count=4, labels=labels)
    message = pb.EbpfEventBatch(kind=pb.EBPF_COLLECTOR_KIND_CPU_PROFILE, count=1, cpu_profile=[row])
    profile = Profile()
    take(Batch.parse(message.SerializeToString()), profile)
    ((origin, frames, count),) = profile.stacks()
    assert (origin.process, origin.tgid, origin.tid, count) == ("old", 5, 0, 4)
    assert [frame.function for frame in frames] == ["main", "[unknown]"]


def test_batches_are_merged_by_stack() -> None:
    story = story_of(
        batch_of(*STACKS, lost=3, truncated=1), batch_of(STACKS[0], start_s=1, end_s=2, lost=4)
    )
    profile = story.profile
    assert (profile.samples, len(profile), profile.lost, profile.truncated) == (170, 5, 7, 1)
    merged = profile_of(*STACKS, lost=3, truncated=1)
    merged.merge(profile_of(STACKS[0], lost=4))
    assert list(merged.stacks()) == list(profile.stacks())
    assert (merged.samples, merged.cpu_ns, merged.lost, merged.ends) == (
        profile.samples, profile.cpu_ns, profile.lost, profile.ends,
    )  # fmt: skip


def test_total_counts_a_recursion_once_a_sample() -> None:
    found = {use.function.name: (use.own, use.total) for use in profile_of(*STACKS).uses.ordered()}
    assert found == {
        "leaf": (73, 73), "work": (20, 90), "do_syscall_64": (5, 5), "[shop]": (2, 2),
        "main": (0, 95), "lost": (0, 5), "middle": (0, 5),
    }  # fmt: skip


def test_frames_without_names_are_one_by_module_and_callers_stay_apart() -> None:
    at = [Frame(f"shop+{n:#x}", "/usr/bin/shop", n, BUILD_ID, UNNAMED) for n in range(16, 20)]
    profile = profile_of(
        Stack([at[0], at[1], at[2]], 5), Stack([at[0], at[1], at[3]], 4), Stack(["main", at[2]], 1)
    )
    found = {use.function.name: (use.own, use.total) for use in profile.uses.ordered()}
    assert found == {"[shop]": (10, 10), "main": (0, 1)}
    drawn = [(depth, node.function.name, node.total) for depth, _, node in walk(call_tree(profile))]
    assert drawn == [
        (0, "all", 10), (1, "shop+0x10", 9), (2, "shop+0x11", 9), (3, "[shop]", 9),
        (1, "main", 1), (2, "[shop]", 1),
    ]  # fmt: skip
    assert Frame("[no stack]", flags=UNNAMED).group.name == "[no stack]"
    assert Frame("[kernel]+0x1", "[kernel]", 1, "", KERNEL | UNNAMED).group.name == "[kernel]"


@given(PROFILES)
def test_self_and_totals_add_up(profile: Profile) -> None:
    found = profile.uses.ordered()
    assert sum(use.own for use in found) == profile.samples
    assert all(use.own <= use.total <= profile.samples for use in found)
    tree = call_tree(profile)
    nodes = list(walk(tree))
    assert tree.total == sum(node.own for _, _, node in nodes) == profile.samples
    below: list[int] = []
    for depth, left, node in nodes:
        assert node.total == node.own + sum(child.total for child in node.children.values())
        del below[depth:]
        assert not below or left + node.total <= below[-1]
        below.append(left + node.total)
    roots = {node.function.name for depth, _, node in nodes if depth == 1}
    assert ("[cut]" in roots) == bool(profile.cut)


def test_a_cut_stack_is_no_root() -> None:
    tree = call_tree(profile_of(*STACKS))
    assert {it.function.name: it.total for it in tree.children.values()} == {"main": 95, "[cut]": 5}
    (cut,) = (it for it in tree.children.values() if it.mark)
    assert [it.function.name for it in cut.children.values()] == ["lost"]
    two = call_tree(profile_of(STACKS[0], Stack(["x"], 2, process="db", end=TOO_SHORT)))
    assert {it.function.name: it.mark for it in two.children.values()} == {"shop": True, "db": True}


def test_deep_stacks_need_no_recursion_of_ours() -> None:
    profile = profile_of(Stack(["main", *["f"] * 5000, "leaf"], 3))
    assert max(depth for depth, _, _ in walk(call_tree(profile))) == 5002
    assert {use.function.name: use.total for use in profile.uses.ordered()} == {
        "main": 3,
        "f": 3,
        "leaf": 3,
    }


def test_the_smallest_nodes_are_left_out() -> None:
    tree = call_tree(profile_of(*(Stack(["main", f"f{n}"], n) for n in range(1, 21))))
    assert least_drawn(tree, 22) == 1
    for most in (5, 10, 21):
        assert len(list(walk(tree, least_drawn(tree, most)))) == most


def test_stacks_are_kept_in_bounded_memory() -> None:
    profile = Profile(most_stacks=3)
    take(batch_of(*(Stack(["main", f"f{n}"], 2, tid=n) for n in range(10))), profile)
    assert (profile.samples, len(profile), profile.not_kept) == (20, 4, 14)
    assert sum(stack.samples for stack in profile.stacks()) == 20
    assert {it.function.name: it.total for it in profile.uses.ordered()}["f9"] == 2  # all the same
    assert [it.frames[0].function for it in profile.stacks()][-1] == NOT_KEPT


def test_frames_are_kept_in_bounded_memory() -> None:
    profile = Profile(most_frames=4)  # one of them stands for what is not kept
    take(batch_of(*(Stack(["main", f"f{n}"], 2) for n in range(10)), Stack(["main"], 3)), profile)
    assert (profile.samples, profile.not_kept, len(profile)) == (23, 16, 4)
    assert {it.function.name: it.own for it in profile.uses.ordered()} == {
        NOT_KEPT: 16, "main": 3, "f0": 2, "f1": 2,
    }  # fmt: skip


def test_the_totals_say_how_much_and_what_is_missing() -> None:
    lines = list(story_of(batch_of(*STACKS, lost=1, truncated=3, end_s=2)).end_lines())
    assert lines[:5] == [
        "100 samples, 1.01s of CPU time (0.51 CPUs), 5.0% in the kernel",
        (
            "5 samples (5.0%) without the outermost callers, shown under [cut]: 3 copy too short, "
            "2 no unwind information"
        ),
        "5 samples (5.0%) with frames that were guessed, marked ~",
        "3 samples had more stack than was copied",
        "",
    ]
    shown = table(lines[5:])
    assert list(shown) == ["73%", "20%", "5.0%", "2.0%", "0%"]
    assert shown["73%"] == {
        "SELF": "73%", "TOTAL": "73%", "SAMPLES": "73", "FUNCTION": "leaf", "MODULE": "shop",
    }  # fmt: skip
    assert shown["20%"]["TOTAL"] == "90%"
    assert (shown["5.0%"]["FUNCTION"], shown["5.0%"]["MODULE"]) == ("do_syscall_64 [k]", "[kernel]")
    assert any(re.fullmatch(r" +0% +5\.0% +0  ~ middle +libg\.so\.1", line) for line in lines)


def test_the_last_interval_stands_alone_in_a_pipe() -> None:
    story = story_of(batch_of(*STACKS), batch_of(Stack(["idle"], 4), start_s=1, end_s=2))
    lines = list(story.interval_lines())
    assert lines[0] == "4 samples, 40.4ms of CPU time (0.04 CPUs), 0% in the kernel"
    assert table(lines[1:])["100%"]["FUNCTION"] == "idle"
    # On a terminal all samples so far: one second has too few.
    assert "104 samples" in drawn_lines(story.interval_table(80, 20), 80)[0]


def test_a_profile_in_which_nothing_ran_says_so() -> None:
    story = story_of()
    story.intervals.reach(START_NS + 3 * 10**9)
    (line,) = drawn_lines(story.interval_table(80, 20), 80)
    assert line == "no sample yet, after 3s"
    words = "nothing ran: no sample was taken, so the target used next to no CPU time"
    assert list(story.end_lines()) == [words]
    assert drawn_lines(story.end_table(80), 80) == [words]


@pytest.mark.parametrize("width", [30, 80, 120])
def test_tables_fit_with_any_name(width: int) -> None:
    stacks = [Stack(["main", name], 5 + n) for n, name in enumerate(HOSTILE)]
    story = story_of(batch_of(*STACKS, *stacks, lost=12))
    for shown in (story.interval_table(width, 15), story.end_table(width)):
        lines = drawn_lines(shown, width)
        assert all(cell_len(line) <= width and is_printable(line) for line in lines)
    assert len(drawn_lines(story.interval_table(80, 15), 80)) <= 15


def test_eighty_columns_have_a_bar_for_each_function() -> None:
    lines = drawn_lines(story_of(batch_of(*STACKS)).end_table(80), 80)
    at = next(n for n, line in enumerate(lines) if "FUNCTION" in line)
    bars = [re.sub(r"[^█▉▊▋▌▍▎▏░]", "", line) for line in lines[at + 1 :]]
    leaf, work, *_ = bars
    # Of 16 cells for the greatest total, which is 95: 73 itself; 20 itself of 90.
    assert (leaf, work) == ("█" * 12 + "▎", "███▍" + "░" * 11)
    assert all("leaf" in line or n for n, line in enumerate(lines[at + 1 :]))


def test_rest_of_the_functions_is_added_up() -> None:
    story = story_of(batch_of(*(Stack(["main", f"f{n:02}"], 100 - n) for n in range(60))))
    lines = drawn_lines(story.interval_table(80, 12), 80)
    assert len(lines) == 12
    assert re.match(r" *\d+% .*and 52 more$", lines[-1])


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        ("push_back", 20, "push_back"),
        ("std::vector<int>::push_back(int const&)", 40, "std::vector<int>::push_back(int const&)"),
        ("std::vector<int>::push_back(int const&)", 30, "std::vector<int>::push_back"),
        ("std::vector<int, std::allocator<int> >::push_back(int)", 30, "std::vector<…>::push_back"),
        ("(anonymous namespace)::work(int)", 30, "(anonymous namespace)::work"),
        ("Fn::operator()(int, int, int, int)", 20, "Fn::operator()"),
        ("bool operator< <int>(A<int> const&)", 24, "bool operator< <int>"),
        ("<alloc::vec::Vec<T> as core::Drop>::drop", 22, "<alloc::ve…Drop>::drop"),
        ("a" * 50, 10, "aaaa…aaaaa"),
    ],
)
def test_long_names_keep_what_tells_them_apart(name: str, width: int, short: str) -> None:
    assert fitted(name, width) == short


@given(st.text(max_size=40), st.integers(1, 40))
def test_a_fitted_name_fits(name: str, width: int) -> None:
    assert cell_len(fitted(name, width)) <= width
    assert is_printable(visible(name))


def test_rows_are_plain_data_with_their_stacks() -> None:
    rows = list(records(batch_of(*STACKS)))
    assert [row["count"] for row in rows] == [70, 20, 5, 3, 2]
    assert rows[2]["stack"] == [
        {"function": "main", "module": "/usr/bin/shop", "address": "0x1004", "build_id": BUILD_ID},
        {
            "function": "middle", "module": "/lib/libg.so.1", "address": "0x77", "build_id": "",
            "guessed": True,
        },
        {
            "function": "do_syscall_64", "module": "[kernel]", "address": "0x1000", "build_id": "",
            "kernel": True,
        },
    ]  # fmt: skip
    assert (rows[3]["end"], rows[3]["pid"], rows[3]["tid"]) == ("copy_too_short", 77, 78)
    assert (rows[0]["seq"], rows[1]["seq"], rows[0]["period_ns"]) == (1, 2, PERIOD_NS)


def test_rows_say_what_a_sample_stands_for_in_either_form() -> None:
    for batch in (batch_of(*STACKS), rows_of(*STACKS)):
        assert {row["period_ns"] for row in records(batch)} == {PERIOD_NS}


def test_the_doctor_counts_samples_of_the_program_itself() -> None:
    kernel = Stack(["main", KERNEL_FRAME], 9)
    assert PROVOCATION.count(batch_of(*STACKS, kernel, Stack([], 4))) == 95
    assert not PROVOCATION.exact
