"""Perf maps, the kernel's list of functions, and the process that demangles."""

from __future__ import annotations

import os
import random
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.collectors.symbols import fields, perf_map
from coral.collectors.symbols.demangle import Demangler
from coral.collectors.symbols.kernel import KernelSymbols
from coral.collectors.symbols.perf_map import PerfMap
from tests.support import wait_until


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The perf map of this process, which is looked at each time."""
    monkeypatch.setattr(perf_map, "_SHORTEST_REST_S", 0.0)
    monkeypatch.setattr(perf_map, "_REST_FACTOR", 0)
    monkeypatch.setattr(perf_map, "_LOOK_EVERY_S", 0.0)
    path = Path(f"/tmp/perf-{os.getpid()}.map")
    path.write_text("")
    yield path
    path.unlink(missing_ok=True)


def names(it: PerfMap, *addresses: int) -> list[str]:
    found = it.find(np.array(addresses, np.uint64)).tolist()
    return [it.name(number).decode() if number >= 0 else "" for number in found]


def test_a_line_that_is_not_complete_waits_for_its_end(told: Path) -> None:
    it = PerfMap(os.getpid())
    told.write_text("1000 10 one\n2000 20 tw")
    assert names(it, 0x1000, 0x2000) == ["one", ""]
    with told.open("a") as file:
        file.write("o words\n0x3000 0x8 three\n")
    assert names(it, 0x1000, 0x201F, 0x2020, 0x3007) == ["one", "two words", "", "three"]
    assert len(it) == 3
    it.close()


def test_the_last_told_of_overlapping_functions_counts(told: Path) -> None:
    """Against a simple reading of the same lines, as the file grows."""
    chance = random.Random(13)
    it = PerfMap(os.getpid())
    owner: dict[int, str] = {}
    for step in range(60):
        with told.open("a") as file:
            for n in range(chance.choice((1, 3, 40))):
                start, size = chance.randrange(2000), chance.randrange(60)
                file.write(f"{start:x} {size:x} f{step}.{n}\n")
                owner.update(dict.fromkeys(range(start, start + size), f"f{step}.{n}"))
        assert names(it, *range(2100)) == [owner.get(address, "") for address in range(2100)]
    it.close()


def test_a_sample_has_the_name_of_its_time(told: Path) -> None:
    told.write_text("1000 10 first\n2000 10 other\n")
    it = PerfMap(os.getpid())
    assert names(it, 0x1000) == ["first"]
    before = time.monotonic_ns()
    assert names(it, 0x1000) == ["first"]
    with told.open("a") as file:
        file.write("1000 20 second\n")
    now = time.monotonic_ns()
    addresses = np.array([0x1000, 0x1000, 0x1010, 0x2000], np.uint64)
    found = it.find(addresses, np.array([before, now, before, before], np.uint64)).tolist()
    assert [it.name(number) for number in found] == [b"first", b"second", b"second", b"other"]
    it.close()


def test_what_is_read_before_names_are_asked_for_has_its_time(told: Path) -> None:
    """Samples of both are named after the address was used again."""
    told.write_text("1000 10 first\n")
    it = PerfMap(os.getpid())
    times = np.array([time.monotonic_ns(), 0], np.uint64)
    it.catch_up()
    with told.open("a") as file:
        file.write("1000 10 second\n")
    it.catch_up()
    times[1] = time.monotonic_ns()
    found = it.find(np.array([0x1000, 0x1000], np.uint64), times)
    assert [it.name(number) for number in found.tolist()] == [b"first", b"second"]
    it.close()


def test_a_file_that_is_cut_rewritten_or_replaced_is_read_anew(told: Path) -> None:
    it = PerfMap(os.getpid())
    told.write_text("1000 10 first\n2000 10 second\n")
    assert names(it, 0x1000, 0x2000) == ["first", "second"]
    told.write_text("1000 10 third\n")
    assert names(it, 0x1000, 0x2000) == ["third", ""]
    told.write_text("1000 10 fourth and longer\n3000 10 fifth\n")  # in place, and longer
    assert names(it, 0x1000, 0x3000) == ["fourth and longer", "fifth"]
    other = told.with_suffix(".new")
    other.write_text("1000 10 sixth\n")
    other.rename(told)
    assert names(it, 0x1000, 0x3000) == ["sixth", ""]
    told.unlink()
    assert names(it, 0x1000) == ["sixth"]
    it.close()


def test_a_file_that_was_looked_at_is_read_after_the_end_of_its_process() -> None:
    code = "import os; open(f'/tmp/perf-{os.getpid()}.map', 'w').write('1000 10 one\\n'); input()"
    with subprocess.Popen([sys.executable, "-I", "-c", code], stdin=subprocess.PIPE) as process:
        path = Path(f"/tmp/perf-{process.pid}.map")
        looked, not_looked = PerfMap(process.pid), PerfMap(process.pid)
        wait_until(lambda: path.exists() and path.read_text() != "")
        assert looked.look()
        process.communicate(b"\n")
    try:
        assert names(looked, 0x1000) == ["one"]
        assert names(not_looked, 0x1000) == [""]
    finally:
        looked.close()
        path.unlink()


def test_lines_that_are_none_are_skipped(told: Path) -> None:
    it = PerfMap(os.getpid())
    told.write_bytes(
        b"\n \n1000\n1000 10\n1000 10 \n xyz\nzz 10 bad\n1000 zz bad\n1000 0 empty\n"
        b"11112222333344445 1 long\nffffffffffffffff 10 high\n1000 ffffffffffffffff wide\n"
        b"ABCDEF 10 upper\n2000 10 \xff\xfe\n"
    )
    assert names(it, 0x1000, 0xABCDEF) == ["", "upper"]
    assert len(it) == 2
    it.close()


@given(st.binary(max_size=200))
def test_any_file_is_read_without_an_error(content: bytes) -> None:
    it = PerfMap(os.getpid())
    for part in (content[:70], content[70:]):
        it._take(part)
    assert len(it.find(np.array([0, 1, 1 << 40], np.uint64))) == 3


def test_no_more_functions_are_kept_than_allowed(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perf_map, "_MOST_FUNCTIONS", 100)
    told.write_text("".join(f"{n * 16:x} 10 f{n}\n" for n in range(1000)))
    it = PerfMap(os.getpid())
    assert names(it, 99 * 16, 100 * 16) == ["f99", ""]
    assert "only the first 100 functions" in it.why_not
    it.close()


def test_a_file_of_a_terabyte_is_read_up_to_a_bound(told: Path) -> None:
    """It takes no room on the disk, and reading it whole would take an hour."""
    told.write_text("1000 10 first\n")
    os.truncate(told, 1 << 40)
    it = PerfMap(os.getpid())
    while not it.why_not or it.position < perf_map.LARGEST_BYTES:
        before = it.position
        assert names(it, 0x1000) == ["first"]
        assert 0 < it.position - before <= perf_map.MOST_READ_BYTES
    assert it.why_not == "only the first 256 MB of the perf map are read"
    assert names(it, 0x1000) == ["first"]
    assert it.position == perf_map.LARGEST_BYTES
    it.close()


def test_functions_that_are_read_later_may_have_been_told_before(
    told: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only part of the file is read at a time: what it did not say yet is not what is new."""
    monkeypatch.setattr(perf_map, "MOST_READ_BYTES", 12)
    told.write_text("1000 10 old\n1000 10 new\n")
    it = PerfMap(os.getpid())
    assert names(it, 0x1000) == ["old"]
    now = np.array([time.monotonic_ns()], np.uint64)
    assert names(it, 0x1000) == ["new"]
    assert it.name(int(it.find(np.array([0x1000], np.uint64), now)[0])) == b"new"
    it.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: gives a file away")
def test_the_perf_map_of_another_user_is_not_believed(told: Path) -> None:
    told.write_text("1000 10 evil\n")
    os.chown(told, 12345, 12345)
    it = PerfMap(os.getpid())
    assert names(it, 0x1000) == [""]
    assert "another user" in it.why_not


def test_the_perf_map_of_an_earlier_process_with_this_id_is_not_taken(told: Path) -> None:
    told.write_text("1000 10 stale\n")
    os.utime(told, (0, psutil.Process().create_time() - 60))
    it = PerfMap(os.getpid())
    assert names(it, 0x1000) == [""]
    told.write_text("1000 10 fresh\n")
    assert names(it, 0x1000) == ["fresh"]
    it.close()


def test_hexadecimal_numbers_are_read_as_python_does() -> None:
    chance = random.Random(13)
    words = [
        "".join(chance.choice(string.hexdigits) for _ in range(chance.randrange(1, 17)))
        for _ in range(500)
    ]
    words += ["0x" + word[:14] for word in words] + ["", "0x", "g", "12g", "f" * 17]
    text = np.frombuffer("\n".join([*words, ""]).encode(), np.uint8)
    numbers, good = fields.hex_numbers(text, *fields.lines(text))
    for word, number, is_good in zip(words, numbers.tolist(), good.tolist(), strict=True):
        try:
            expected: int | None = int(word, 16) if len(word.removeprefix("0x")) <= 16 else None
        except ValueError:
            expected = None
        assert (number if is_good else None) == expected, word


KALLSYMS = """\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81000000 T _stext
ffffffff81000100 t helper
ffffffff81000100 T do_it
ffffffff81000180 W weakly
ffffffff81000200 T _etext
ffffffff82000000 D data
ffffffffc0001000 t in_module\t[ext4]
ffffffffc0001100 t last_in_module\t[ext4]
ffffffffc0900000 t in_other\t[nf_tables]
ffffffffc0a00000 t bpf_prog_0123456789abcdef_mine\t[bpf]
"""


def test_functions_of_the_kernel_and_its_modules_are_told_apart(tmp_path: Path) -> None:
    listed = tmp_path / "kallsyms"
    listed.write_text(KALLSYMS)
    kernel = KernelSymbols(listed)
    expected = {
        0xFFFFFFFF81000100: ("do_it", "[kernel]"),
        0xFFFFFFFF8100017F: ("do_it", "[kernel]"),
        0xFFFFFFFF81000180: ("weakly", "[kernel]"),
        0xFFFFFFFF81000200: None,
        0xFFFFFFFF82000000: None,
        0xFFFFFFFFC00010FF: ("in_module", "[ext4]"),
        0xFFFFFFFFC0001100: ("last_in_module", "[ext4]"),
        0xFFFFFFFFC0003000: None,
        0xFFFFFFFFC0900000: ("in_other", "[nf_tables]"),
        0xFFFFFFFFC0A00010: ("bpf_prog_0123456789abcdef_mine", "[bpf]"),
        0xFFFFFFFFC0B00000: None,
    }
    found = kernel.find(np.array(list(expected), np.uint64)).tolist()
    assert [kernel.function(n) if n >= 0 else None for n in found] == list(expected.values())
    assert kernel.relative(np.array([0xFFFFFFFF81000180], np.uint64)).tolist() == [0x180]
    assert not kernel.why_not


def test_hidden_addresses_are_told(tmp_path: Path) -> None:
    listed = tmp_path / "kallsyms"
    listed.write_text("0000000000000000 T _text\n0000000000000000 T do_it\n")
    kernel = KernelSymbols(listed)
    assert kernel.find(np.array([0xFFFFFFFF81000100], np.uint64)).tolist() == [-1]
    assert "CAP_SYSLOG" in kernel.why_not
    missing = KernelSymbols(tmp_path / "none")
    assert missing.find(np.array([1], np.uint64)).tolist() == [-1]
    assert "cannot be read" in missing.why_not


@pytest.fixture
def demangler() -> Iterator[Demangler]:
    demangler = Demangler()
    assert not demangler.why_not
    yield demangler
    demangler.close()


def test_names_of_cpp_rust_and_swift_are_demangled(demangler: Demangler) -> None:
    expected = {
        b"main": "main",
        b"_Z3foov": "foo()",
        b"_ZNSt6vectorIiSaIiEE9push_backERKi": (
            "std::vector<int, std::allocator<int>>::push_back(int const&)"
        ),
        b"_ZN4core3fmt9Formatter3pad17h0123456789abcdefE": "core::fmt::Formatter::pad",
        b"_RNvCs1234_7mycrate3run": "mycrate::run",
        b"$s4main3fooyyF": "main.foo() -> ()",
        b"_ZN9brokenmangle\"&'%s": "_ZN9brokenmangle\"&'%s",
        b"_Znothing": "_Znothing",
        b"_ZN3foo3barEv.cold": "foo::bar() (.cold)",
        b"caf\xc3\xa9": "café",
        b"\xff": "\ufffd",
        b"f": "f",
        b"": "",
    }
    assert demangler.demangled(list(expected)) == list(expected.values())


def bomb(levels: int) -> bytes:
    """250 letters that stand for a name of 2^LEVELS: each argument is twice the one before."""
    digits = string.digits + string.ascii_uppercase
    name = "_Z1f1aIiiE"
    for level in range(levels):
        number = digits[level] if level < 36 else f"1{digits[level - 36]}"
        name += f"S_IS{number}_S{number}_E"
    return name.encode()


def test_a_name_that_ends_the_process_stays_and_others_are_demangled(demangler: Demangler) -> None:
    deep = b"_ZN1a" + b"I1a" * 600 + b"E" * 601
    wanted = [b"_Z3foov", bomb(40), b"_Z3barv", b"_Z1f" + b"P" * 2000 + b"i", deep, b"_Z3bazv"]
    begun = time.monotonic()
    found = demangler.demangled(wanted)
    assert [found[0], found[2], found[5]] == ["foo()", "bar()", "baz()"]
    assert found[1] == bomb(40).decode()
    assert demangler.refused >= 1
    assert time.monotonic() - begun < 30
    assert demangler.demangled([b"_Z3foov"]) == ["foo()"]


def test_many_names_that_end_it_end_the_demangling(
    demangler: Demangler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coral.collectors.symbols.demangle._MOST_DEATHS", 2)
    monkeypatch.setattr("coral.collectors.symbols.demangle._ANSWER_S", 0.2)
    found = demangler.demangled([bomb(40), bomb(41), bomb(42), b"_Z3foov"])
    assert found[:3] == [bomb(40).decode(), bomb(41).decode(), bomb(42).decode()]
    assert "2 of them have ended the process" in demangler.why_not
    assert demangler.demangled([b"_Z3foov"]) == ["_Z3foov"]
    assert demangler._process is None


SILENT: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
failed = libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None)
failed = failed or libc.mount(b"coral-test", b"/tmp", b"fuse", 0, options)
print(ctypes.get_errno() if failed else "ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, and FUSE: mounts"
)
def test_a_file_system_that_never_answers_does_not_stop_the_agent() -> None:
    """A process has mounted one over /tmp, where its perf map would be."""
    process = subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", SILENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        if (answer := process.stdout.readline()) != "ready\n":
            pytest.skip(f"FUSE cannot be mounted: {answer}")
        it = PerfMap(process.pid)
        assert names(it, 0x1000) == [""]
        assert "could let the agent wait for ever" in it.why_not
    finally:
        process.kill()
        process.communicate()
