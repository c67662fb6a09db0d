"""Functions found in ELF files, against binutils and the dynamic linker."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coral.bpf.attaching.elf import ElfError, function_offsets

LIBC = re.search(r"(/\S*/libc\.so\.6)", Path("/proc/self/maps").read_text())


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def program(programs: Path) -> Path:
    return programs / "called"


def test_every_function_of_a_library_is_where_nm_and_readelf_say() -> None:
    assert LIBC
    library = Path(LIBC[1])
    text = subprocess.check_output(["readelf", "-lW", library], text=True)
    loads = [
        [int(number, 16) for number in re.findall(r"0x[0-9a-f]+", line)]
        for line in text.splitlines()
        if re.match(r"\s+LOAD\s.* R E ", line)
    ]
    expected: dict[str, set[int]] = defaultdict(set)
    for line in subprocess.check_output(["nm", "-D", library], text=True).splitlines():
        if found := re.fullmatch(r"([0-9a-f]+) [TtWw] ([^@]+).*", line):
            address = int(found[1], 16)
            offset, start = next((o, a) for o, a, _, n, *_ in loads if a <= address < a + n)
            expected[found[2]].add(address - start + offset)
    with opened(library) as fd:
        offsets = function_offsets(fd, list(expected))
    assert len(offsets) > 1000
    for name, places in offsets.items():
        assert set(places) == expected[name], name


def test_a_program_has_its_own_functions_but_not_those_it_only_calls(program: Path) -> None:
    with opened(program) as fd:
        found = function_offsets(fd, ["called_function", "main", "printf", "no_such_function"])
    assert found.keys() == {"called_function", "main"}
    data = program.read_bytes()
    listing = subprocess.check_output(["objdump", "-dw", program], text=True)
    first = re.search(r"<called_function>:\n\s*[0-9a-f]+:\s+((?:[0-9a-f]{2,8} )+)", listing)
    assert first
    (offset,) = found["called_function"]
    if os.uname().machine == "x86_64":  # elsewhere objdump prints words, not bytes
        assert data[offset:].startswith(bytes.fromhex(first[1]))


def test_a_stripped_program_has_none(program: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "stripped"
    subprocess.run(["strip", "-o", stripped, program], check=True)
    with opened(stripped) as fd:
        assert function_offsets(fd, ["called_function", "main"]) == {}


def test_a_name_may_share_the_end_of_another(tmp_path: Path) -> None:
    source, library = tmp_path / "it.c", tmp_path / "it.so"
    source.write_text("int SSL_read(void) { return 1; } int wolfSSL_read(void) { return 2; }")
    subprocess.run(["cc", "-shared", "-O2", "-Wl,-O2", source, "-o", library], check=True)
    with opened(library) as fd:
        found = function_offsets(fd, ["SSL_read", "wolfSSL_read"])
    assert {len(places) for places in found.values()} == {1}
    assert found["SSL_read"] != found["wolfSSL_read"]


def test_damage_is_told_wherever_it_is(program: Path, tmp_path: Path) -> None:
    """Every byte of the headers changed, and the file cut at many places: a result or an ElfError,
    never another error."""
    data = program.read_bytes()
    copy = tmp_path / "copy"

    def attempt(damaged: bytes) -> bool:
        copy.write_bytes(damaged)
        with opened(copy) as fd:
            try:
                function_offsets(fd, ["called_function"])
            except ElfError:
                return False
            return True

    assert attempt(data)
    for at in [*range(64), *range(len(data) - 64 * 40, len(data), 3)]:
        attempt(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    for at in range(0, len(data) - 1, 97):
        assert not attempt(data[:at])
    assert not attempt(b"#!/bin/sh\n" + bytes(100))
