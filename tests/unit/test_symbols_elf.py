"""ELF files as the profile reads them: against readelf, and damaged in every way."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.bpf.attaching.elf import ElfError
from coral.collectors.symbols.debug import debug_file_of
from coral.collectors.symbols.elf import NOWHERE, ElfFile, build_id_in, open_bytes
from coral.collectors.symbols.table import TableBuilder
from tests.elves import names_at, opened, stored

LIBC = re.search(r"(/\S*/libc\.so\.6)", Path("/proc/self/maps").read_text())
SOURCE = """
    int other(int x) { return x + 1; }
    __attribute__((weak)) int hot(int x) { return other(x) * 3; }
    int main(int argc, char **argv) { (void)argv; return hot(argc); }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("elf")
    (directory / "it.c").write_text(SOURCE)
    flags = ["-O1", "-gz=zlib", "-g", "-Wl,--build-id=sha1"]
    subprocess.run(["cc", *flags, "it.c", "-o", "it"], cwd=directory, check=True)
    return directory / "it"


@pytest.mark.parametrize("path", [LIBC[1] if LIBC else "", sys.executable])
def test_headers_sections_and_the_build_id_are_as_readelf_says(path: str) -> None:
    text = subprocess.check_output(["readelf", "-SlnW", path], text=True)
    with opened(Path(path)) as elf:
        found = re.search(r"Build ID: ([0-9a-f]+)", text)
        assert elf.build_id.hex() == (found[1] if found else "")
        sections = re.findall(
            r"\[ *\d+\] (\.\S+) +(\S+) +([0-9a-f]+) ([0-9a-f]+) ([0-9a-f]+)", text
        )
        assert len(sections) > 20
        for name, kind, address, offset, size in sections:
            header = elf.header_of(name)
            assert (header["address"], header["offset"]) == (int(address, 16), int(offset, 16))
            assert header["bytes"] == int(size, 16)
            if kind == "NOBITS":
                assert elf.section(name) is None
        loads = re.findall(r"LOAD +0x([0-9a-f]+) 0x([0-9a-f]+) \S+ 0x([0-9a-f]+) 0x(\S+)", text)
        columns = ("offset", "address", "bytes", "memory")
        for load, numbers in zip(elf.loads, loads, strict=True):
            assert [int(load[name]) for name in columns] == [int(n, 16) for n in numbers]


def test_a_compressed_section_is_decompressed(program: Path) -> None:
    with opened(program) as elf:
        section = elf.section(".debug_str")
        assert section
        assert b"argc\0" in section
        assert elf.section(".no_such_section") is None


def test_offsets_and_addresses_belong_to_the_segment_in_which_they_lie(tmp_path: Path) -> None:
    (tmp_path / "it.c").write_text(
        '__attribute__((section(".far"))) int far(int x) { return x; }' + SOURCE
    )
    flags = ["-O1", "-no-pie", "-Wl,--section-start=.far=0x7654000"]
    subprocess.run(["cc", *flags, "it.c", "-o", "it"], cwd=tmp_path, check=True)
    with opened(tmp_path / "it") as elf:
        for load in elf.loads:
            first, last = int(load["offset"]), int(load["offset"] + load["bytes"]) - 1
            at = np.array([first, last], np.uint64)
            expected = at - load["offset"] + load["address"]
            assert elf.addresses(at).tolist() == expected.tolist()
            assert elf.offsets(expected).tolist() == at.tolist()
        differences = {int(load["address"] - load["offset"]) for load in elf.loads}
        assert len(differences) > 1
        nowhere = np.array([1 << 40, NOWHERE], np.uint64)
        assert elf.addresses(nowhere).tolist() == elf.offsets(nowhere).tolist() == [NOWHERE] * 2


def test_the_bias_of_a_mapping_is_that_of_its_segment() -> None:
    """As the dynamic linker has mapped the C library here."""
    assert LIBC
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if LIBC[1] in line]
    with opened(Path(LIBC[1])) as elf:
        first = int(lines[0].split("-")[0], 16) - int(elf.loads[0]["address"])
        for line in lines:
            bounds, rights, offset, *_ = line.split()
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            if "x" in rights:
                assert elf.bias(start, end, int(offset, 16)) == first
            elif rights == "r--p":
                assert elf.bias(start, end, int(offset, 16), executable=False) == first
        assert elf.bias(0, 4096, 1 << 40) is None


def read_all_of(content: bytes) -> None:
    """All that the agent reads of an ELF file; raises ElfError alone."""
    fd = open_bytes(content, "test")
    try:
        elf = ElfFile(fd)
        assert isinstance(elf.build_id, bytes)
        numbers = np.array([0, 1, 4096, 1 << 40, NOWHERE], np.uint64)
        elf.addresses(numbers)
        elf.offsets(numbers)
        elf.bias(0, 1 << 20, 0)
        if found := debug_file_of(elf, "/no/such/file", os.getpid()):
            os.close(found.elf.fd)
        for read in (
            lambda: elf.section(".text"),
            lambda: TableBuilder(elf).add_section(elf, ".symtab"),
            lambda: TableBuilder(elf).add_section(elf, ".dynsym"),
            lambda: TableBuilder(elf).add_stubs(),
        ):
            try:
                read()
            except ElfError:
                continue
        builder = TableBuilder(elf)
        builder.add_section(elf, ".symtab")
        builder.add_stubs()
        table = builder.build()
        for number in range(min(len(table), 50)):
            table.name(number)
        assert len(table.find(numbers)) == len(numbers)
    except ElfError:
        pass
    finally:
        os.close(fd)


def test_a_file_cut_anywhere_is_an_error_or_is_read(program: Path) -> None:
    whole = program.read_bytes()
    read_all_of(whole)
    for size in [*range(200), *range(200, len(whole), 97)]:
        read_all_of(whole[:size])


def test_a_file_with_any_bytes_changed_is_an_error_or_is_read(program: Path) -> None:
    chance = random.Random(13)
    whole = program.read_bytes()
    with opened(program) as elf:
        tables = [(0, 64), *((int(h["offset"]), 64 << 3) for h in elf.segments)]
        tables += [(int(h["offset"]), int(h["bytes"])) for h in elf.sections if h["bytes"]]
        headers = len(whole) - len(elf.sections) * 64
    tables += [(headers, len(whole) - headers)] * len(tables)
    for _ in range(1500):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8, 40))):
            at, size = chance.choice(tables)
            damaged[min(at + chance.randrange(max(size, 1)), len(whole) - 1)] = chance.choice(
                (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
            )
        read_all_of(bytes(damaged))


def test_a_damaged_file_is_named_without_an_error(program: Path, tmp_path: Path) -> None:
    chance = random.Random(14)
    whole = program.read_bytes()
    for _ in range(150):
        damaged = bytearray(whole[: chance.choice((len(whole), chance.randrange(64, len(whole))))])
        for _ in range(chance.choice((1, 10, 1000))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        with stored(tmp_path / "damaged") as found:
            names_at(found.table, [0, 0x1000, 0x1139, 0x1150, 1 << 50])


@given(st.binary(max_size=300))
def test_random_bytes_are_no_elf_file(content: bytes) -> None:
    read_all_of(content)
    read_all_of(b"\x7fELF\x02\x01" + content)
    assert isinstance(build_id_in(content), bytes)


def test_what_is_no_elf_file_of_64_bits_is_refused(program: Path) -> None:
    for content in (
        b"",
        b"#!/bin/sh\n",
        b"\x7fELF\x01\x01" + bytes(100),
        program.read_bytes()[:40],
    ):
        fd = open_bytes(content, "test")
        with pytest.raises(ElfError):
            ElfFile(fd)
        os.close(fd)
