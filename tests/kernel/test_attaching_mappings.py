"""Mappings of code, against /proc/PID/maps and files that the tests make."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coral.bpf.attaching.each_cpu import online_cpus
from coral.bpf.attaching.mappings import MappedCode, MappingReader
from tests.support import Puppet

pytestmark = pytest.mark.usefixtures("nothing_left", "no_descriptors_left")

PAGE = resource.getpagesize()
MAP_LINE = re.compile(r"(\w+)-(\w+) (r-x)p (\w+) (\w+):(\w+) (\d+) +(/\S*|\[\w+\])?$", re.MULTILINE)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    source, output = tmp_path / "it.c", tmp_path / "libit.so"
    source.write_text("int it(void) { return 7; }")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", output], check=True)
    return output


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as one:
        one.do("import ctypes, mmap")
        yield one


def code_of(pid: int) -> set[tuple[int, int, int, int, int, str]]:
    """The executable mappings of files, as /proc says."""
    found = set()
    for line in MAP_LINE.finditer(Path(f"/proc/{pid}/maps").read_text()):
        start, end, _, offset, major, minor, inode, path = line.groups()
        if inode != "0":
            device = os.makedev(int(major, 16), int(minor, 16))
            begin = int(start, 16)
            found.add((begin, int(end, 16) - begin, int(offset, 16), device, int(inode), path))
    return found


def as_in_proc(mapped: MappedCode) -> tuple[int, int, int, int, int, str]:
    return mapped[2:]


def test_a_library_that_a_process_opens_is_told_as_proc_tells_it(
    puppet: Puppet, library: Path
) -> None:
    with MappingReader() as reader:
        before, began_ns = code_of(puppet.pid), time.monotonic_ns()
        puppet.do(f"ctypes.CDLL({str(library)!r})")
        (mapped,) = reader.drain(lambda: {puppet.pid})
        assert {as_in_proc(mapped)} == code_of(puppet.pid) - before
        assert mapped.tgid == puppet.pid
        assert mapped.path == str(library)
        assert (mapped.device, mapped.inode) == (library.stat().st_dev, library.stat().st_ino)
        assert began_ns < mapped.time_ns < time.monotonic_ns()
        assert reader.drain(lambda: {puppet.pid}) == []
        assert reader.lost == 0


def test_a_new_programs_own_code_and_its_linkers_are_told_in_order(programs: Path) -> None:
    """It is born after the reader was asked for: `watched` is called late enough to know it."""
    with MappingReader() as reader:
        process = subprocess.Popen([programs / "called", "0"], stdin=subprocess.PIPE)
        try:
            process.communicate(b"x")
            mapped = [one for one in reader.drain(lambda: {process.pid}) if one.inode]
        finally:
            process.wait()
    names = [Path(one.path).name for one in mapped]
    assert names[0] == "called"
    assert names[1].startswith("ld-linux-")
    assert "libc.so.6" in names[2:]
    assert [one.time_ns for one in mapped] == sorted(one.time_ns for one in mapped)


def test_other_processes_are_left_out_and_data_is_no_code(puppet: Puppet, library: Path) -> None:
    with MappingReader() as reader, Puppet() as other:
        reader.drain(lambda: ())
        other.do("import ctypes")
        other.do(f"ctypes.CDLL({str(library)!r})")
        puppet.do(f"f = open({str(library)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1)")
        assert reader.drain(lambda: {puppet.pid}) == []


def test_memory_that_becomes_executable_is_told(puppet: Puppet) -> None:
    with MappingReader() as reader:
        puppet.do(f"m = mmap.mmap(-1, 2 * {PAGE}, prot=3, flags=mmap.MAP_PRIVATE)")
        assert reader.drain(lambda: {puppet.pid}) == []
        address = int(puppet.ask("ctypes.addressof(ctypes.c_char.from_buffer(m))"))
        puppet.do("libc = ctypes.CDLL(None)")
        puppet.do(f"libc.mprotect(ctypes.c_void_p({address}), {PAGE}, 5)")
        (mapped,) = reader.drain(lambda: {puppet.pid})
        assert (mapped.start, mapped.length, mapped.inode) == (address, PAGE, 0)


def test_reports_that_do_not_fit_are_counted(puppet: Puppet) -> None:
    cpu = online_cpus()[0]
    os.sched_setaffinity(puppet.pid, {cpu})
    map_it = f"mmap.mmap(-1, {PAGE}, prot=5, flags=mmap.MAP_PRIVATE).close()"
    with MappingReader(PAGE) as reader:
        puppet.do(f"for _ in range(1000): {map_it}")
        kept = len(reader.drain(lambda: {puppet.pid}))
        assert 0 < kept < PAGE // 72
        puppet.do(map_it)
        assert len(reader.drain(lambda: {puppet.pid})) == 1
        # Others may map code on this CPU, too.
        assert kept + reader.lost >= 1000
        assert reader.lost < 1000 + 100


def test_what_was_told_on_a_cpu_that_went_away_is_not_lost(puppet: Puppet, library: Path) -> None:
    cpus = online_cpus()
    online = set(cpus)
    os.sched_setaffinity(puppet.pid, {cpus[-1]})
    with MappingReader(online=lambda: online) as reader:
        puppet.do(f"ctypes.CDLL({str(library)!r})")
        online = set(cpus[:-1]) or set(cpus)
        reader.follow()
        (mapped,) = reader.drain(lambda: {puppet.pid})
        assert mapped.path == str(library)
