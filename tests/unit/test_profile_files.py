"""What `coral tap --cpu-profile -o FILE` writes: folded text, pprof, speedscope, and pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.views.contract import Session
from coral.views.cpu_profile import VIEW
from coral.views.cpu_profile.assets import asset
from coral.views.cpu_profile.folded import folded, word
from coral.views.cpu_profile.html import page
from coral.views.cpu_profile.names import visible
from coral.views.cpu_profile.pprof import pprof
from coral.views.cpu_profile.profile import Frame, Profile
from coral.views.cpu_profile.session import Facts
from coral.views.cpu_profile.speedscope import speedscope
from coral.views.cpu_profile.story import ProfileStory
from coral.views.cpu_profile.svg import picture
from coral.wire.text import is_printable
from tests.pprof_reader import read
from tests.profiles import (
    BUILD_ID,
    GUESS,
    HOSTILE,
    KERNEL,
    NO_INFO,
    PERIOD_NS,
    START_NS,
    TOO_SHORT,
    Stack,
    batch_of,
    profile_of,
)

FACTS: Final = Facts("shop", START_NS, 2.5, "expired", 3, {"subscriber_queue": 2})
KERNEL_FRAME: Final = Frame("do_syscall_64", "[kernel]", 0x1000, "", KERNEL)
GUESSED: Final = Frame("middle", "/lib/libg.so.1", 0x77, "ab" * 10, GUESS)
STACKS: Final = (
    Stack(["main", "work", "leaf"], 70),
    Stack(["main", "work", "work"], 20, thread="other", tid=79),
    Stack(["main", GUESSED, KERNEL_FRAME], 5),
    Stack(["lost", "leaf"], 3, end=TOO_SHORT),
    Stack([], 2, end=NO_INFO),
)
NAMES: Final = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
PROFILES: Final = st.lists(
    st.tuples(st.lists(NAMES, max_size=5), st.integers(1, 50), st.sampled_from([1, TOO_SHORT])),
    max_size=12,
).map(lambda rows: profile_of(*(Stack(names, count, end=end) for names, count, end in rows)))


def test_folded_text_has_a_line_for_each_stack() -> None:
    assert folded(profile_of(*STACKS)).splitlines() == [
        "[cut];[no␣stack] 2",
        "[cut];lost;leaf 3",
        "main;middle;do_syscall_64_[k] 5",
        "main;work;leaf 70",
        "main;work;work 20",
    ]


def test_several_processes_are_told_apart() -> None:
    profile = profile_of(
        Stack(["main"], 2, process="shop", end=TOO_SHORT), Stack(["main"], 3, process="db 1")
    )
    assert folded(profile).splitlines() == ["db␣1;main 3", "shop;[cut];main 2"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_one_word_and_one_frame(name: str) -> None:
    (line,) = folded(profile_of(Stack(["main", name, "leaf"], 7))).splitlines()
    stack, count = line.split()
    assert (count, stack.count(";")) == ("7", 2)
    assert stack == f"main;{word(name)};leaf"
    assert is_printable(stack)


@given(NAMES, NAMES)
def test_words_of_different_names_differ(one: str, other: str) -> None:
    assert (word(one) == word(other)) == (one.replace(" ", "␣") == other.replace(" ", "␣"))


@given(PROFILES)
def test_folded_text_has_every_sample(profile: Profile) -> None:
    lines = folded(profile).splitlines()
    assert sum(int(line.split()[1]) for line in lines) == profile.samples
    assert all(len(line.split()) == 2 for line in lines)
    assert len({line.split()[0] for line in lines}) == len(lines)


def test_pprof_has_mappings_build_ids_names_and_both_values() -> None:
    profile = profile_of(*STACKS)
    found = read(pprof(profile, FACTS))
    assert found.types == [("samples", "count"), ("cpu", "nanoseconds")]
    assert found.message.period == PERIOD_NS
    assert (found.message.time_nanos, found.message.duration_nanos) == (START_NS, 2_500_000_000)
    first, _, third, fourth, fifth = found.rows
    shop = "/usr/bin/shop", BUILD_ID
    assert first.frames == [
        ("main", *shop, 0x1004),
        ("work", *shop, 0x1004),
        ("leaf", *shop, 0x1004),
    ]
    assert first.values == [70, 70 * PERIOD_NS]
    assert first.labels == {"thread": "worker", "process": "shop", "tid": 78, "pid": 77}
    assert third.frames[1:] == [
        ("middle", "/lib/libg.so.1", "ab" * 10, 0x77), ("do_syscall_64", "[kernel]", "", 0x1000),
    ]  # fmt: skip
    assert third.labels["guessed"] == "yes"
    assert (fourth.names, fourth.labels["end"]) == (["[cut]", "lost", "leaf"], "copy too short")
    assert fifth.names == ["[cut]", "[no stack]"]
    names = {found.message.string_table[it.filename] for it in found.message.mapping[:1]}
    assert names == {"/usr/bin/shop"}  # pprof names a profile by its first mapping
    assert all(it.has_functions for it in found.message.mapping)
    assert found.comments[0] == "target: shop"
    assert "2 rows of samples lost on the way (subscriber_queue)" in found.comments


@pytest.mark.parametrize("name", HOSTILE)
def test_pprof_has_names_as_they_are(name: str) -> None:
    (row,) = read(pprof(profile_of(Stack(["main", name])), FACTS)).rows
    assert row.names == ["main", name]


@given(PROFILES)
def test_pprof_adds_up(profile: Profile) -> None:
    rows = read(pprof(profile, FACTS)).rows
    assert sum(row.values[0] for row in rows) == profile.samples
    assert sum(row.values[1] for row in rows) == profile.cpu_ns
    assert pprof(profile, FACTS) == pprof(profile, FACTS)


def go() -> str | None:
    versions = sorted(Path("/usr/lib").glob("go-*/bin/go"))
    return shutil.which("go") or (str(versions[-1]) if versions else None)


@pytest.mark.skipif(not go(), reason="there is no go here")
def test_go_tool_pprof_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "shop.pb.gz"
    path.write_bytes(pprof(profile_of(*STACKS, *(Stack([name], 1) for name in HOSTILE)), FACTS))
    command = [str(go()), "tool", "pprof", "-sample_index=samples", "-top", "-cum", str(path)]
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=home).stdout
    assert "File: shop\nBuild ID: " + BUILD_ID in out
    shown = {line.split()[-1]: line.split()[:4:3] for line in out.splitlines()}
    assert shown["main"] == ["0", "95"]
    assert shown["work"] == ["20", "90"]  # recursion counts once a sample
    assert shown["leaf"] == ["73", "73"]


def checked_speedscope(profile: Profile) -> Any:
    """The file as JSON, if it is as https://www.speedscope.app/file-format-schema.json says."""
    file = json.loads(speedscope(profile, FACTS))
    assert file["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    frames = file["shared"]["frames"]
    for frame in frames:
        assert set(frame) <= {"name", "file", "line", "col"}
        assert isinstance(frame["name"], str)
    assert file["profiles"]
    for each in file["profiles"]:
        assert set(each) == {
            "type", "name", "unit", "startValue", "endValue", "samples", "weights",
        }  # fmt: skip
        assert (each["type"], each["unit"], each["startValue"]) == ("sampled", "nanoseconds", 0)
        assert len(each["samples"]) == len(each["weights"])
        assert each["endValue"] == sum(each["weights"])
        assert all(0 <= at < len(frames) for stack in each["samples"] for at in stack)
    assert 0 <= file["activeProfileIndex"] < len(file["profiles"])
    return file


def test_speedscope_has_all_threads_and_each() -> None:
    file = checked_speedscope(profile_of(*STACKS))
    names = [frame["name"] for frame in file["shared"]["frames"]]
    everything, worker, other = file["profiles"]
    assert [it["name"] for it in (everything, worker, other)] == [
        "all threads", "worker/78", "other/79",
    ]  # fmt: skip
    assert everything["endValue"] == 100 * PERIOD_NS
    assert (worker["endValue"], other["endValue"]) == (80 * PERIOD_NS, 20 * PERIOD_NS)
    stacks = {
        ";".join(names[at] for at in stack): weight
        for stack, weight in zip(everything["samples"], everything["weights"], strict=True)
    }
    assert stacks["main;~ middle;do_syscall_64"] == 5 * PERIOD_NS
    assert stacks["[cut];lost;leaf"] == 3 * PERIOD_NS
    checked_speedscope(Profile())


@given(PROFILES)
def test_speedscope_adds_up(profile: Profile) -> None:
    file = checked_speedscope(profile)
    assert file["profiles"][0]["endValue"] == profile.cpu_ns


class _Elements(HTMLParser):
    """The elements of a page, by name, and what its scripts hold."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.counts: Counter[str] = Counter()
        self.scripts: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


@given(st.lists(st.one_of(NAMES, st.sampled_from(HOSTILE)), min_size=1, max_size=4))
def test_names_change_no_element_of_a_page(names: list[str]) -> None:
    plain, hostile = _Elements(), _Elements()
    plain.feed(page(profile_of(Stack(["a" for _ in names])), Facts("a")))
    stack = Stack(names, thread=names[0], process=names[0])
    hostile.feed(page(profile_of(stack), Facts(names[0], end=names[-1])))
    assert (hostile.counts - Counter({"li": 9})) == (plain.counts - Counter({"li": 9}))
    data = json.loads(hostile.scripts[0])
    assert {visible(name) for name in names} <= {each[0] for each in data["functions"]}
    assert hostile.addresses == []


@given(st.lists(st.one_of(NAMES, st.sampled_from(HOSTILE)), min_size=1, max_size=4))
def test_names_change_no_element_of_a_picture(names: list[str]) -> None:
    stack = Stack(names, thread=names[0], process=names[0])
    root = ElementTree.fromstring(picture(profile_of(stack), Facts(names[0], end=names[-1])))
    tags = Counter(element.tag.rpartition("}")[2] for element in root.iter())
    frames = len(names) + 1
    assert (tags["g"], tags["rect"], tags["script"]) == (frames, frames + 1, 1)
    titles = [it.text or "" for it in root.iter("{http://www.w3.org/2000/svg}title")]
    assert [title.split("\n")[0] for title in titles[2:]] == list(map(visible, names))


def test_files_name_no_address_outside() -> None:
    for text in (page(profile_of(*STACKS), FACTS), picture(profile_of(*STACKS), FACTS)):
        found = set(re.findall(r"https?://[^\"' >]+", text))
        assert found <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}


def test_frames_that_are_too_many_are_left_out_and_told() -> None:
    stacks = [Stack(["main", f"f{n}"], n + 1) for n in range(50)]
    for render in (page, picture):
        assert "left out" not in render(profile_of(*stacks), FACTS)
        text = render(profile_of(*stacks), FACTS, 12)
        assert "frames of fewer than 41 samples are left out" in text
    assert picture(profile_of(*stacks), FACTS, 12).count('<g class="f ') == 12


def test_black_text_can_be_read_on_every_colour() -> None:
    for name in ("flame.css", "flame_svg.css"):
        colours = re.findall(
            r"\.f\.[ukn](?: rect)? {[^}]*(?:background|fill): #(\w{6})", asset(name)
        )
        assert len(colours) == 3
        for colour in colours:
            assert (luminance(colour) + 0.05) / (luminance("111111") + 0.05) > 7


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-relative-luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_format_is_made_from_a_story() -> None:
    story = ProfileStory()
    story.intervals.begin(START_NS)
    story.add(batch_of(*STACKS))
    session = Session("shop", "stopped", {"kernel_buffer": 5, "map_full": 1, "rate_limit": 7})
    content = {it.suffix: it.content(story, session) for it in VIEW.files}
    assert set(content) == {".html", ".svg", ".folded", ".pb.gz", ".speedscope.json"}
    assert b"ended: stopped" in content[".html"]
    assert b"6 samples lost in the kernel" in content[".svg"]
    assert b"7 rows of samples lost on the way (rate_limit)" in content[".svg"]
    assert read(content[".pb.gz"]).message.duration_nanos == 10**9
    assert all(content.values())


@pytest.mark.parametrize("script", ["flame.js", "flame_svg.js"])
def test_scripts_can_stand_in_a_file(script: str) -> None:
    assert "]]>" not in asset(script)
    assert "</" not in asset(script)
