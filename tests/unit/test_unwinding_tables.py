"""Unwind tables, compiled from real files, against binutils; damaged ones; and their cache."""

from __future__ import annotations

import platform
import random
import re
import struct
from functools import partial
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from coral.collectors.unwinding.coroutines import context_start
from coral.collectors.unwinding.eh_frame import compile_section
from coral.collectors.unwinding.rules import (
    CFA,
    CFA_OFFSET,
    FIRST_REGISTER,
    X86_64,
    Cfa,
    Rows,
    Saved,
    kind_of,
    saved,
)
from coral.collectors.unwinding.tables import Tables, compiled, packed, unpacked
from deploy.image.elf import needed
from tests.elves import opened
from tests.support import ROOT, built
from tests.unwind_tables import differences, section_of

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="files of x86-64")
SOURCE = ROOT / "tests/programs/unwound.c"
LIBC = re.search(r"(/\S*/libc\.so\.6)", Path("/proc/self/maps").read_text())
LIBRARIES = ["libc.so.6", "ld-linux-x86-64.so.2", "libstdc++.so.6", "libcrypto.so.3", "libm.so.6"]
BUILDS = {
    "gcc": ["gcc", "-O2", "-mavx2"],
    "gcc_small": ["gcc", "-Os"],
    "clang": ["clang", "-O2", "-fomit-frame-pointer"],
    "lld": ["clang", "-O3", "-fuse-ld=lld"],
    "stubs": ["gcc", "-O2", "-no-pie", "-fno-pie", "-Wl,-z,lazy"],
    "static": ["gcc", "-O2", "-static"],
}


def library(name: str) -> Path:
    assert LIBC
    path = Path(LIBC[1]).with_name(name)
    if not path.exists():
        pytest.skip(f"no {name}")
    return path


def rows_of(path: Path) -> Rows:
    return compile_section(*section_of(path), X86_64)


def equal(one: Rows, other: Rows) -> bool:
    return (
        np.array_equal(one.start, other.start)
        and np.array_equal(one.rule, other.rule)
        and np.array_equal(one.rules, other.rules)
    )


@pytest.mark.parametrize("name", LIBRARIES)
def test_rows_of_a_library_are_those_of_readelf(name: str) -> None:
    rows = rows_of(library(name))
    count, wrong = differences(library(name), rows)
    assert count > 200
    assert not wrong
    assert rows.damaged == 0


@pytest.mark.skipif(which("node") is None, reason="no node")
def test_rows_of_node_are_those_of_readelf() -> None:
    node = Path(str(which("node"))).resolve()
    # Debian's is small, and has nearly everything in a library.
    node = next((library(it) for it in needed(node) if it.startswith("libnode.so")), node)
    count, wrong = differences(node, rows_of(node))
    assert count > 100_000
    assert not wrong


@pytest.mark.parametrize("build", BUILDS)
def test_rows_of_a_program_are_those_of_readelf(build: str) -> None:
    if build == "lld" and which("ld.lld") is None:
        pytest.skip("no lld")

    def command(output: Path) -> list[str | Path]:
        return [*BUILDS[build], "-pthread", "-o", output, SOURCE]

    program = built(f"unwound.tables.{build}", [SOURCE], partial(command))
    count, wrong = differences(program, rows_of(program))
    assert count > 50
    assert not wrong


def test_a_large_table_keeps_the_rules_that_every_step_needs() -> None:
    section, address = section_of(library("libcrypto.so.3"))
    whole = compile_section(section, address, X86_64)
    fewer = compiled(section, address, X86_64)
    at = whole.start
    frame_pointer = FIRST_REGISTER + X86_64.tracked.index(X86_64.frame_pointer)
    for column in (CFA, CFA_OFFSET, frame_pointer, FIRST_REGISTER + len(X86_64.tracked) - 1):
        assert np.array_equal(whole.at(at)[:, column], fewer.at(at)[:, column])
    others = [FIRST_REGISTER + n for n, r in enumerate(X86_64.tracked[:-1]) if r != 6]
    covered = fewer.rules[:, CFA] >> 8 != Cfa.NONE
    assert (fewer.rules[covered][:, others] == saved(Saved.UNKNOWN)).all()
    assert len(fewer.start) < len(whole.start)


def test_without_section_headers_the_table_is_found_by_its_segment(tmp_path: Path) -> None:
    stripped = tmp_path / "stripped"
    content = bytearray(library("libstdc++.so.6").read_bytes())
    struct.pack_into("<Q", content, 0x28, 0)
    struct.pack_into("<H", content, 0x3C, 0)
    stripped.write_bytes(content)
    tables = Tables()
    with opened(stripped) as without, opened(library("libstdc++.so.6")) as elf:
        found, expected = tables.of(without), tables.of(elf)
    assert found is not None
    assert expected is not None
    assert tables.compiled == 2
    assert equal(found, expected)


def test_what_a_coroutine_returns_to_is_outermost_and_nothing_else_is() -> None:
    whole = rows_of(library("libc.so.6"))
    with opened(library("libc.so.6")) as elf:
        start = context_start(elf)
        rows = Tables().of(elf)
    assert rows is not None
    assert start is not None
    column = FIRST_REGISTER + len(X86_64.tracked) - 1
    inside = np.array([start - 1, start, start + 25], np.uint64)
    assert (kind_of(rows.at(inside)[:, column]) == Saved.UNDEFINED).all()
    others = np.concatenate([whole.start, np.array([start - 2, start + 26], np.uint64)])
    others = others[(others < start - 1) | (others > start + 25)]
    assert np.array_equal(rows.at(others)[:, column], whole.at(others)[:, column])
    assert (rows.start[1:] > rows.start[:-1]).all()


def test_a_file_that_makes_no_coroutines_has_none() -> None:
    with opened(library("libm.so.6")) as elf:
        assert context_start(elf) is None


def test_a_damaged_function_is_left_out_and_the_others_stay() -> None:
    section, address = section_of(library("libm.so.6"))
    sound = compile_section(section, address, X86_64)
    damaged = bytearray(section)
    entries = []
    place = 0
    while (length := struct.unpack_from("<I", section, place)[0]) and place < len(section) - 8:
        entries.append((place, length))
        place += 4 + length
    place, length = max(entries, key=lambda entry: entry[1])
    damaged[place + 4 + 13 : place + 4 + length] = b"\x3f" * (length - 13)
    rows = compile_section(bytes(damaged), address, X86_64)
    assert (rows.entries, rows.damaged) == (sound.entries, 1)
    different = (rows.at(sound.start) != sound.at(sound.start)).any(axis=1)
    assert 0 < different.sum() < 100
    assert (rows.at(sound.start[different])[:, CFA] >> 8 == Cfa.NONE).all()


@pytest.mark.parametrize("seed", range(8))
def test_damage_of_any_kind_raises_nothing(seed: int) -> None:
    section, address = section_of(library("ld-linux-x86-64.so.2"))
    chance = random.Random(seed)
    for _ in range(40):
        damaged = bytearray(section)
        for _ in range(chance.choice([1, 10, 300])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.3:
            del damaged[chance.randrange(len(damaged)) :]
        rows = compile_section(
            bytes(damaged), chance.choice([address, 0, 2**47, 2**63]), X86_64,
            has_end=chance.random() < 0.5,
        )  # fmt: skip
        assert rows.start[0] == 0
        assert (np.diff(rows.start.astype(np.int64)) > 0).all()
        assert rows.rule.max() < len(rows.rules)
        assert rows.damaged <= rows.entries


@pytest.mark.parametrize("section", [b"", b"\0", b"\0" * 64, b"\xff" * 64, bytes(range(256)) * 9])
def test_what_is_no_table_has_no_rows(section: bytes) -> None:
    rows = compile_section(section, 0x1000, X86_64)
    assert (rows.rules[:, CFA] >> 8 == Cfa.NONE).all()


def common_and(*instructions: bytes) -> bytes:
    """A section of a common entry as compilers write it, and of functions of 256 bytes with
    INSTRUCTIONS, from the address 0x2000 on; to be loaded at 0x1000."""
    common = struct.pack("<IB", 0, 1) + b"zR\0\x01\x78\x10\x01\x1b" + b"\x0c\x07\x08\x90\x01"
    section = struct.pack("<I", len(common)) + common
    for n, program in enumerate(instructions):
        place = len(section)
        body = struct.pack("<I", place + 4)
        body += struct.pack("<iI", 0x2000 + 0x100 * n - (0x1000 + place + 8), 0x100) + b"\0"
        section += struct.pack("<I", len(body) + len(program)) + body + program
    return section


def test_a_table_that_would_fill_the_memory_is_cut() -> None:
    # Each of its bytes is a row, each row a rule of its own.
    turns = b"".join(b"\x41\x0e" + bytes([n & 0x7F | 0x80, n >> 7 & 0x7F]) for n in range(4_000))
    section = common_and(*[turns] * 100)
    rows = compile_section(section, 0x1000, X86_64)
    assert rows.entries == 100
    assert rows.damaged == 0
    assert rows.nbytes < 1 << 20
    assert len(rows.start) <= 100 * 0x100 + 2

    many = b"".join(struct.pack("<I", 4) + b"\x01\0\0\0" for _ in range(1 << 21))
    assert compile_section(many, 0x1000, X86_64).entries == 1 << 20


def test_remembered_states_nest() -> None:
    program = b"".join([
        b"\x0a\x41\x0e\x10",  # remember; 1 byte on: CFA = sp + 16
        b"\x0a\x41\x0e\x20\x86\x04",  # remember; CFA = sp + 32, rbp at CFA - 32
        b"\x41\x0b",  # the inner state again
        b"\x41\x0b",  # the outer one
    ])  # fmt: skip
    rows = compile_section(common_and(program), 0x1000, X86_64)
    found = rows.at(np.arange(0x2000, 0x2005, dtype=np.uint64))
    assert found[:, CFA_OFFSET].tolist() == [8, 16, 32, 16, 8]
    frame_pointer = kind_of(found[:, FIRST_REGISTER + 1])
    assert frame_pointer.tolist() == [0, 0, Saved.AT_CFA, 0, 0]
    assert rows.damaged == 0


def test_a_state_that_was_never_remembered_is_damage() -> None:
    rows = compile_section(common_and(b"\x41\x0b", b"\x41\x0e\x10"), 0x1000, X86_64)
    assert (rows.entries, rows.damaged) == (2, 1)
    assert (rows.at(np.array([0x2001], np.uint64))[:, CFA] >> 8 == Cfa.NONE).all()
    assert rows.at(np.array([0x2101], np.uint64))[0, CFA_OFFSET] == 16


def test_a_table_comes_from_the_disk_the_second_time(tmp_path: Path) -> None:
    with opened(library("libstdc++.so.6")) as elf:
        first, second = Tables(tmp_path), Tables(tmp_path)
        made, read = first.of(elf), second.of(elf)
        assert made is not None
        assert read is not None
        assert equal(made, read)
        assert (first.compiled, first.read, second.compiled, second.read) == (1, 0, 0, 1)
        assert second.of(elf) is read


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "grown"])
def test_a_damaged_file_of_the_cache_is_made_again(tmp_path: Path, damage: str) -> None:
    with opened(library("libm.so.6")) as elf:
        expected = Tables(tmp_path).of(elf)
        (file,) = tmp_path.iterdir()
        content = file.read_bytes()
        middle = len(content) // 2
        file.write_bytes(
            {
                "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
                "short": content[:middle],
                "empty": b"",
                "grown": content + b"\0",
            }[damage]
        )
        tables = Tables(tmp_path)
        found = tables.of(elf)
    assert expected is not None
    assert found is not None
    assert equal(found, expected)
    assert (tables.rebuilt, tables.compiled) == (1, 1)
    assert file.read_bytes() == content


def test_the_cache_keeps_to_its_size(tmp_path: Path) -> None:
    tables = Tables(tmp_path, memory_bytes=300_000, disk_bytes=500_000)
    for name in LIBRARIES:
        with opened(library(name)) as elf:
            assert tables.of(elf) is not None
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 500_000
    assert tables.nbytes <= 1_500_000  # the last one stays, however large


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    tables = Tables(tmp_path / "missing")
    with opened(library("libm.so.6")) as elf:
        assert tables.of(elf) is not None


def test_rows_are_the_same_after_packing() -> None:
    rows = rows_of(library("libm.so.6"))
    again = unpacked(packed(rows), rows.rules.shape[1])
    assert again is not None
    assert equal(rows, again)
    assert (again.entries, again.damaged) == (rows.entries, rows.damaged)
    assert unpacked(packed(rows), rows.rules.shape[1] + 1) is None
