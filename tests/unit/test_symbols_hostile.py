"""Files and processes made to harm the agent: they have names or not, at a bounded cost."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from coral.bpf.attaching.elf import SECTION, SEGMENT
from coral.collectors.symbols import names
from coral.collectors.symbols.elf import EM_AARCH64
from coral.collectors.symbols.files import FileKind, MappedFiles, Mounts
from coral.collectors.symbols.map_lines import lines_of
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.symbols.moved_text import original_of
from coral.collectors.symbols.names import Symbolizer
from coral.collectors.symbols.perf_map import PerfMap
from coral.collectors.symbols.store import _digest_of
from coral.collectors.symbols.table import TableBuilder
from coral.collectors.unwinding.eh_frame import compile_section
from coral.collectors.unwinding.rules import X86_64
from tests.elves import functions_of, names_at, opened, stored

SOURCE: Final = """
    #include <stdio.h>
    __asm__(".text\\n.type no_size,@function\\nno_size: nop\\nret\\n");
    int same(int x) { return x + 1; }
    extern int alias(int x) __attribute__((alias("same")));
    int main(void) { puts("x"); return same(2); }
"""
EH_FRAME_HEADER: Final = 0x6474_E550
TOP: Final = (1 << 64) - 8


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "it.c").write_text(SOURCE)
    subprocess.run(["cc", "-O1", "-no-pie", "it.c", "-o", "it"], cwd=directory, check=True)
    return directory / "it"


class Patched:
    """A copy of a program of which headers are changed."""

    def __init__(self, program: Path, path: Path) -> None:
        self.path = path
        self.content = bytearray(program.read_bytes())
        fields = struct.unpack_from("<QQ", self.content, 32)
        self._segments_at, self._sections_at = fields
        with opened(program) as elf:
            self._segments = elf.segments["type"].tolist()
            wanted = (".symtab", ".strtab", ".dynstr", ".plt", ".eh_frame")
            self._sections = {
                name: elf.sections.tolist().index(elf.header_of(name).item()) for name in wanted
            }

    def machine(self, number: int) -> None:
        struct.pack_into("<H", self.content, 18, number)

    def segment(self, kind: int, field: str, value: int) -> None:
        at = self._segments_at + self._segments.index(kind) * SEGMENT.itemsize
        self._put(at, SEGMENT, field, value)

    def section(self, name: str, field: str, value: int) -> None:
        at = self._sections_at + self._sections[name] * SECTION.itemsize
        self._put(at, SECTION, field, value)

    def _put(self, at: int, dtype: np.dtype[np.void], field: str, value: int) -> None:
        assert dtype.fields
        kind, offset = dtype.fields[field][:2]
        self.content[at + offset : at + offset + kind.itemsize] = value.to_bytes(
            kind.itemsize, "little"
        )

    def write(self, size: int = 0) -> Path:
        """SIZE makes the file larger than it is, by zeros that take no room."""
        self.path.write_bytes(self.content)
        if size:
            os.truncate(self.path, size)
        return self.path


@pytest.fixture
def patched(program: Path, tmp_path: Path) -> Patched:
    return Patched(program, tmp_path / "patched")


@pytest.mark.parametrize("size", range(13))
def test_a_header_of_unwind_tables_may_have_any_size(patched: Patched, size: int) -> None:
    patched.segment(EH_FRAME_HEADER, "bytes", size)
    path = patched.write()
    (address,) = [at for at, names in functions_of(path).items() if "same" in names]
    with stored(path) as found:
        assert names_at(found.table, [address]) == ["same"]


def test_stubs_may_lie_at_the_end_of_all_addresses(patched: Patched) -> None:
    patched.machine(EM_AARCH64)
    patched.section(".plt", "address", TOP)
    with stored(patched.write()) as found:
        assert len(found.table) > 0


def test_names_may_be_said_to_lie_anywhere(patched: Patched) -> None:
    patched.section(".dynstr", "offset", (1 << 64) - 4096)
    with stored(patched.write()) as found:
        names = [found.table.name(number) for number in range(len(found.table))]
    assert b"same" in names
    assert b"" in names  # stubs


def test_a_table_of_names_that_is_empty_costs_its_size_and_no_more(patched: Patched) -> None:
    at, size = len(patched.content), 64 << 20
    patched.section(".strtab", "offset", at)
    patched.section(".strtab", "bytes", size)
    with opened(patched.write(at + size)) as elf:
        tracemalloc.start()
        builder = TableBuilder(elf)
        builder.add_section(elf, ".symtab")
        builder.build()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 * size


def test_a_table_of_any_size_is_not_read_to_be_compared(patched: Patched) -> None:
    patched.section(".symtab", "bytes", 1 << 42)
    with opened(patched.write(1 << 43)) as elf:
        assert _digest_of(elf) == b""


def test_a_number_of_any_length_in_an_unwind_table_is_damage(program: Path) -> None:
    with opened(program) as elf:
        section = elf.section(".eh_frame")
        address = int(elf.header_of(".eh_frame")["address"])
    assert section
    sound = compile_section(section, address, X86_64)
    for size in (64, 12 << 10, 8 << 20):
        # An entry whose code alignment never ends, before the others.
        entry = struct.pack("<IB2s", 0, 1, b"\0") + b"\xff" * size
        hostile = struct.pack("<I", len(entry)) + entry
        found = compile_section(hostile + section, address - len(hostile), X86_64)
        assert len(found.start) == len(sound.start)
        assert found.damaged == sound.damaged


def test_text_that_a_file_claims_to_have_far_away_is_not_that_of_memory(
    patched: Patched,
) -> None:
    """Anonymous code between two mappings of a file is compared with it: where it says."""
    page = mmap.PAGESIZE
    patched.content[56:58] = (2).to_bytes(2, "little")  # segments
    patched.content[32:40] = (64).to_bytes(8, "little")
    for number, (offset, address) in enumerate(((0, 0), ((1 << 64) - page, page))):
        header = (1, 5, offset, address, address, page, page, page)
        struct.pack_into("<IIQQQQQQ", patched.content, 64 + number * 56, *header)
    path = patched.write()
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    name = f"{device} {status.st_ino} {path}"
    text = (
        f"10000-11000 r-xp 00000000 {name}\n11000-12000 r-xp 00000000 00:00 0\n"
        f"12000-13000 r-xp 00002000 {name}\n"
    )
    before, moved, after = lines_of(os.getpid(), text.encode(), 10)
    files = MappedFiles()
    with path.open("rb") as file, mmap.mmap(file.fileno(), page, prot=mmap.PROT_READ) as mapped:
        start = np.frombuffer(mapped, np.uint8).ctypes.data
        seen = before.seen._replace(start=start, end=start + page)
        mounts = Mounts(os.getpid())
        assert files.get(seen, mounts).elf
        assert original_of(moved, (before, replace(after, seen=seen)), files, mounts) is None
    files.close()


def test_a_file_that_took_the_place_of_another_does_not_pass_for_it(
    program: Path, tmp_path: Path
) -> None:
    """A process swaps what it has mapped between a look at its maps and the opening."""
    for name in ("libc.so", "swapped"):
        (tmp_path / name).write_bytes(program.read_bytes())
    status = (tmp_path / "libc.so").stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with (tmp_path / "swapped").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        lines = lines_of(os.getpid(), Path("/proc/self/maps").read_bytes(), 1 << 16)
        (line,) = [line for line in lines if line.seen.path == str(tmp_path / "swapped")]
        files = MappedFiles()
        mounts = Mounts(os.getpid())
        wrong = line.seen._replace(
            device=device, inode=status.st_ino, path=str(tmp_path / "libc.so")
        )
        assert files.get(wrong, mounts).why_not == "another file is there now"
        assert len(files) == 0
        assert files.get(line.seen, mounts).elf
        files.close()
        mapped.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def perf_map() -> Iterator[Path]:
    path = Path(f"/tmp/perf-{os.getpid()}.map")
    yield path
    path.unlink(missing_ok=True)


def test_a_perf_map_that_is_a_link_is_not_followed(perf_map: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("1000 100 compiled\n")
    perf_map.symlink_to(tmp_path / "elsewhere")
    found = PerfMap(os.getpid())
    assert found.find(np.array([0x1010], np.uint64)).tolist() == [-1]
    assert found.why_not == "the perf map is a link, or in one: links are not followed"
    found.close()


def test_a_process_that_executes_again_and_again_keeps_few_files_open(perf_map: Path) -> None:
    perf_map.write_text("1000 100 compiled\n")
    symbolizer = Symbolizer()
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC) as code:
        address = np.array([np.frombuffer(code, np.uint8).ctypes.data], np.uint64)
        perf_map.write_text(f"{int(address[0]):x} 100 compiled\n")

        def look(number: int) -> str:
            times = np.array([number], np.uint64)
            named = symbolizer.names(os.getpid(), address, np.zeros(1, np.bool_), times)
            return symbolizer.strings[named.functions[0]]

        assert look(1) == "compiled"
        before = open_files()
        for number in range(100):
            symbolizer.executed(os.getpid(), 10 + number)
            look(10 + number)
        assert open_files() <= before + 8
        assert symbolizer.stats.perf_map_functions <= 8
        assert look(200) == "compiled"
    symbolizer.close()


def test_perf_maps_of_all_processes_are_bounded_together(
    perf_map: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "".join(f"{at << 8:x} 100 compiled_{at}\n" for at in range(20_000))
    perf_map.write_text(lines)
    monkeypatch.setattr(names, "_LARGEST_PERF_MAPS_BYTES", 3 << 20)
    symbolizer = Symbolizer()
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC) as code:
        address = np.array([np.frombuffer(code, np.uint8).ctypes.data], np.uint64)
        for born in range(20):  # the same process as 20, each with a map of 1 MB
            symbolizer.names(os.getpid(), address, np.zeros(1, np.bool_), born=born)
        assert symbolizer.stats.perf_map_bytes < 5 << 20
        assert "perf maps of other processes take all the memory for them" in symbolizer.why_not()
        symbolizer.trim()
        assert symbolizer.stats.perf_map_bytes <= 2 << 20
        symbolizer.names(os.getpid(), address, np.zeros(1, np.bool_), born=20)
        assert symbolizer.stats.perf_map_functions >= 20_000
    symbolizer.close()


DAMAGES_ITS_VDSO: Final = """
import mmap, sys
(line,) = [line for line in open("/proc/self/maps") if line.endswith("[vdso]\\n")]
with open("/proc/self/mem", "r+b", buffering=0) as memory:
    memory.seek(int(line.split("-")[0], 16))
    memory.write(b"none")
kept = []
while True:
    print(flush=True)
    if not sys.stdin.readline():
        break
    kept.append(mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC))
    kept.append(mmap.mmap(-1, 4096, prot=mmap.PROT_READ))
"""


def test_a_damaged_vdso_is_known_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", DAMAGES_ITS_VDSO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        if not process.stdout.readline():
            pytest.skip("this kernel lets no process write to its vdso")
        files = MappedFiles()
        maps = ProcessMaps(process.pid, files)
        for _ in range(5):
            process.stdin.write("\n")
            process.stdin.flush()
            process.stdout.readline()
            assert maps.refresh()
        vdsos = [file for file in maps.files if file.kind is FileKind.VDSO]
        assert len(vdsos) == 1
        assert vdsos[0].elf is None
        files.close()
        process.stdin.close()
