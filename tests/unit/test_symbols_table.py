"""Symbol tables, against readelf, nm, objdump and gdb."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coral.collectors.symbols import intervals, plt
from coral.collectors.symbols.table import LONGEST_NAME_BYTES
from tests.elves import functions_of, names_at, opened, stored, table_of

LIBC = re.search(r"(/\S*/libc\.so\.6)", Path("/proc/self/maps").read_text())

C = """
    #include <stdio.h>
    #include <stdlib.h>
    #include <unistd.h>
    __attribute__((noinline, cold)) void rare(int x) { fprintf(stderr, "%d", x); }
    __attribute__((noinline)) static int local(int x) { return x * 3; }
    __attribute__((noinline)) int split_work(int x)
    {
        if (__builtin_expect(x == 1234567, 0)) { rare(x); abort(); }
        return local(x) + 1;
    }
    int plain(int x) { return x + 1; }
    extern int __plain(int x) __attribute__((alias("plain")));
    extern int _plain_too(int x) __attribute__((alias("plain")));
    extern int plain_weak(int x) __attribute__((alias("plain"), weak));
    static int first(int x) { return x + 5; }
    static void *resolve(void) { return first; }
    int chosen(int x) __attribute__((ifunc("resolve")));
    __asm__(".text\\n"
        "without_size: nop\\nnop\\nnop\\nret\\n"
        ".globl with_size\\n.type with_size,@function\\n"
        "with_size: nop\\ninner_label: nop\\nret\\n.size with_size,.-with_size\\n"
        ".skip 64,0x90\\n");
    int main(int argc, char **argv)
    {
        (void)argv;
        printf("%d %d\\n", split_work(argc), plain(argc) + chosen(argc) + (int)getpid());
        return 0;
    }
"""
CXX = """
    #include <map>
    #include <string>
    #include <vector>
    namespace shop { template <typename T> struct Basket {
        std::map<std::string, std::vector<T>> items;
        __attribute__((noinline)) Basket() {}
        __attribute__((noinline)) void put(const std::string &k, T t) { items[k].push_back(t); }
        virtual ~Basket() {}
    }; }
    int main(int argc, char **) {
        shop::Basket<int> a; shop::Basket<std::string> b;
        a.put("x", argc); b.put("y", "z"); return a.items.size() + b.items.size() == 0;
    }
"""
RUST = """
    #[inline(never)] fn inner<T: std::fmt::Debug>(x: T) -> usize { format!("{:?}", x).len() }
    struct Shop; impl Shop { #[inline(never)] fn sell(&self, n: u64) -> usize { inner(n) } }
    fn main() { println!("{}", Shop.sell(3) + inner("x")); }
"""


def build(directory: Path, source: str, compiler: str, *flags: str) -> Path:
    name = {"g++": "it.cc", "rustc": "it.rs"}.get(compiler, "it.c")
    (directory / name).write_text(source)
    subprocess.run([compiler, *flags, name, "-o", "it"], cwd=directory, check=True)
    return directory / "it"


def agrees(path: Path, *options: str) -> int:
    """Checks that each function of a file has one of its own names at its first byte, and at its
    last one. Returns how many there are."""
    expected = functions_of(path, *options)
    with table_of(path) as table:
        found = names_at(table, list(expected))
    wrong = {
        hex(address): (name, names)
        for (address, names), name in zip(expected.items(), found, strict=True)
        if name not in names
    }
    assert not wrong
    return len(expected)


@pytest.mark.parametrize(
    "flags",
    [
        ("-O2",),
        ("-O2", "-no-pie"),
        ("-O2", "-static"),
        ("-O2", "-Wl,-z,noseparate-code"),
        ("-O2", "-Wl,-z,relro,-z,now"),
        ("-O2", "-fcf-protection=full", "-Wl,-z,ibtplt"),
        ("-O2", "-shared", "-fPIC"),
    ],
)
def test_every_function_has_its_name(tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = build(tmp_path, C, "gcc", *flags)
    assert agrees(path) > 10
    with table_of(path) as table:
        functions = names_and_addresses(path)
        assert "split_work.cold" in functions
        inside = [functions[name] + 1 for name in ("split_work.cold", "split_work", "local")]
        assert names_at(table, inside) == ["split_work.cold", "split_work", "local"]


def names_and_addresses(path: Path) -> dict[str, int]:
    text = subprocess.check_output(["nm", path], text=True)
    return {
        name: int(address, 16)
        for address, name in re.findall(r"^(\w+) \w (\S+)$", text, re.MULTILINE)
    }


def test_cpp_and_rust_agree_too(tmp_path: Path) -> None:
    assert agrees(build(tmp_path, CXX, "g++", "-O1")) > 20
    if shutil.which("rustc"):
        assert agrees(build(tmp_path, RUST, "rustc", "-O")) > 300


def test_every_function_of_the_c_library_has_one_of_its_names() -> None:
    assert LIBC
    assert agrees(Path(LIBC[1]), "--dyn-syms") > 1500


def test_of_several_names_the_best_is_taken_and_always_the_same(tmp_path: Path) -> None:
    path = build(tmp_path, C, "gcc", "-O2")
    at = names_and_addresses(path)
    assert at["plain"] == at["__plain"] == at["_plain_too"] == at["plain_weak"]
    with table_of(path) as table:
        assert names_at(table, [at["plain"], at["chosen"]]) == ["plain", "chosen"]
    assert LIBC
    with opened(Path(LIBC[1])), table_of(Path(LIBC[1])) as table:
        symbols = subprocess.check_output(["nm", "-D", LIBC[1]], text=True)
        for name in ("malloc", "read", "write", "getppid", "qsort"):
            found = re.search(rf"^(\w+) \w {name}@", symbols, re.MULTILINE)
            assert found
            assert names_at(table, [int(found[1], 16)]) == [name]


def test_labels_without_a_size_end_where_something_else_begins(tmp_path: Path) -> None:
    path = build(tmp_path, C, "gcc", "-O2")
    at = names_and_addresses(path)
    with table_of(path) as table:
        sized = at["with_size"]
        assert names_at(table, [at["without_size"], at["without_size"] + 3]) == ["without_size"] * 2
        assert names_at(table, [sized, at["inner_label"], sized + 2]) == ["with_size"] * 3
        assert names_at(table, [sized + 3, sized + 60]) == ["", ""]


def test_what_no_symbol_contains_has_no_neighbours_name(tmp_path: Path) -> None:
    path = build(tmp_path, C, "gcc", "-O2")
    at = names_and_addresses(path)
    hidden = ["--strip-symbol=local", "--strip-symbol=plain", "--strip-symbol=__plain"]
    hidden += ["--strip-symbol=_plain_too", "--strip-symbol=plain_weak"]
    subprocess.run(["objcopy", *hidden, path], check=True)
    with table_of(path) as table:
        assert names_at(table, [at["local"], at["plain"], at["split_work"]]) == [
            "",
            "",
            "split_work",
        ]
    subprocess.run(["strip", path], check=True)
    with table_of(path) as table:
        assert names_at(table, [at["local"], at["split_work"], at["main"]]) == ["", "", ""]


@pytest.mark.parametrize(
    "flags",
    [
        ("-Wl,-z,lazy",),
        ("-Wl,-z,now", "-fno-plt"),
        ("-fcf-protection=full", "-Wl,-z,ibtplt"),
        ("-fcf-protection=none", "-no-pie"),
    ],
)
def test_stubs_are_named_after_the_function_they_call(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    path = build(tmp_path, C, "gcc", "-O2", *flags)
    listing = subprocess.check_output(["objdump", "-d", path], text=True)
    stubs = re.findall(r"^(\w+) <(\w+@plt)>:$", listing, re.MULTILINE)
    with table_of(path) as table:
        addresses = [int(address, 16) for address, _ in stubs]
        assert names_at(table, addresses) == [name for _, name in stubs]
        assert names_at(table, [address + 5 for address in addresses]) == [n for _, n in stubs]
    assert "-fno-plt" in flags or len(stubs) > 2


def test_stubs_of_arm64_are_decoded() -> None:
    """`adrp x16, page; ldr x17, [x16, #n]; add; br x17`, as assembled at 0x400000 by clang."""
    words = [0xA9BF7BF0, 0xF00000F0, 0xF947FE11, 0x913FE210, 0xD61F0220, *[0xD503201F] * 3]
    words += [0x90000110, 0xF9400611, 0x91002210, 0xD61F0220]  # page + 0x20000, 8
    words += [0xF0FFFFF0, 0xF9400A11, 0x91004210, 0xD61F0220]  # page - 0x1000, 16
    into, places = plt._loads(np.array(words, np.uint32).tobytes(), 0x400000)
    assert into.tolist() == [4, 0x20, 0x30]
    assert places.tolist() == [0x41FFF8, 0x420008, 0x3FF010]


def test_versions_are_no_part_of_a_name(tmp_path: Path) -> None:
    source = """
        int new_one(int x) { return x; }
        int old_one(int x) { return x + 1; }
        __asm__(".symver new_one,pick@@SHOP_2.0");
        __asm__(".symver old_one,pick@SHOP_1.0");
    """
    (tmp_path / "it.map").write_text("SHOP_1.0 { pick; }; SHOP_2.0 { pick; } SHOP_1.0;")
    flags = ["-shared", "-fPIC", "-O1", "-Wl,--version-script=it.map"]
    path = build(tmp_path, source, "gcc", *flags)
    at = names_and_addresses(path)
    with table_of(path) as table:
        names = names_at(table, [at["pick@@SHOP_2.0"], at["pick@SHOP_1.0"]])
    assert set(names) <= {"pick", "new_one", "old_one"}
    subprocess.run(["strip", "--strip-unneeded", path], check=True)
    with table_of(path) as table:
        assert names_at(table, [at["pick@@SHOP_2.0"]]) == ["pick"]


def test_names_are_those_that_gdb_gives(tmp_path: Path) -> None:
    """At random addresses of all sections of code; gdb gives stubs, and code without a symbol, in
    other words."""
    path = build(tmp_path, C, "gcc", "-O2", "-static")
    chance = random.Random(13)
    with opened(path) as elf, table_of(path) as table:
        text = elf.header_of(".text")
        first, size = int(text["address"]), int(text["bytes"])
        addresses = [first + chance.randrange(size) for _ in range(500)]
        ours = names_at(table, addresses)
    commands = tmp_path / "commands"
    commands.write_text(
        "set print demangle off\n" + "".join(f"info symbol {address}\n" for address in addresses)
    )
    answers = subprocess.check_output(["gdb", "-batch", "-nx", "-x", commands, path], text=True)
    theirs = [
        re.sub(r" \+ \d+ in .*| in section .*", "", answer) for answer in answers.splitlines()
    ]
    functions = functions_of(path)
    same_place = {name: address for address, names in functions.items() for name in names}
    different = [
        (hex(address), mine, its)
        for address, mine, its in zip(addresses, ours, theirs, strict=True)
        if mine.rstrip("0123456789.") != its.rstrip("0123456789.")
        and not (mine and same_place.get(mine) == same_place.get(its))
    ]
    # gdb names the padding behind a function after it.
    ends = {int(a, 16) + int(n, 16) for a, n in sizes_of(path)}
    different = [one for one in different if one[1] or not behind(int(one[0], 16), ends)]
    assert not different


def sizes_of(path: Path) -> list[tuple[str, str]]:
    text = subprocess.check_output(["nm", "-S", path], text=True)
    return re.findall(r"^(\w+) (\w+) [tTwWi] \S+$", text, re.MULTILINE)


def behind(address: int, ends: set[int]) -> bool:
    return any(end <= address < end + 64 for end in range(address - 64, address + 1) if end in ends)


def test_symbols_of_a_stripped_file_come_from_its_debug_information(tmp_path: Path) -> None:
    path = build(tmp_path, C, "gcc", "-O2", "-g", "-Wl,--build-id=sha1")
    at = names_and_addresses(path)
    wanted = [at["local"] + 1, at["split_work"] + 1]
    debug = tmp_path / ".debug/it.debug"
    debug.parent.mkdir()
    subprocess.run(["objcopy", "--only-keep-debug", path, debug], check=True)
    subprocess.run(["strip", path], check=True)
    with stored(path) as found:
        assert names_at(found.table, wanted) == ["", ""]
    subprocess.run(["objcopy", f"--add-gnu-debuglink={debug}", path], check=True)
    with stored(path) as found:
        assert names_at(found.table, wanted) == ["local", "split_work"]
        assert names_at(found.table, [at["main"] + 1]) == ["main"]
        assert any("it.debug" in origin for origin in found.table.origins)
    # That of another build is not taken.
    other = tmp_path / "other"
    other.mkdir()
    subprocess.run(
        ["objcopy", "--only-keep-debug", build(other, C, "gcc", "-O1"), debug], check=True
    )
    with stored(path) as found:
        assert names_at(found.table, wanted) == ["", ""]


def test_without_a_build_id_the_checksum_decides(tmp_path: Path) -> None:
    path = build(tmp_path, C, "gcc", "-O2", "-g", "-Wl,--build-id=none")
    at = names_and_addresses(path)
    debug = tmp_path / "it.debug"
    subprocess.run(["objcopy", "--only-keep-debug", path, debug], check=True)
    subprocess.run(["strip", path], check=True)
    subprocess.run(["objcopy", f"--add-gnu-debuglink={debug}", path], check=True)
    with stored(path) as found:
        assert names_at(found.table, [at["local"]]) == ["local"]
    debug.write_bytes(debug.read_bytes() + b"\0")
    with stored(path) as found:
        assert names_at(found.table, [at["local"]]) == [""]


def test_symbols_are_found_in_compressed_debug_data(tmp_path: Path) -> None:
    path = build(tmp_path, C, "gcc", "-O2")
    at = names_and_addresses(path)
    subprocess.run(["objcopy", "-S", "--keep-symbol=local", path, tmp_path / "mini"], check=True)
    subprocess.run(["xz", tmp_path / "mini"], check=True)
    section = f".gnu_debugdata={tmp_path}/mini.xz"
    subprocess.run(["strip", path], check=True)
    subprocess.run(["objcopy", f"--add-section={section}", path], check=True)
    with stored(path) as found:
        assert names_at(found.table, [at["local"] + 1, at["split_work"]]) == ["local", ""]
        assert ".gnu_debugdata" in found.table.origins


def test_a_name_of_any_length_is_bounded(tmp_path: Path) -> None:
    long = "n" * 10_000
    path = build(
        tmp_path, f"int {long}(void) {{ return 1; }} int main(void) {{ return {long}(); }}", "gcc"
    )
    with table_of(path) as table:
        (name,) = names_at(table, [names_and_addresses(path)[long]])
    assert name == "n" * LONGEST_NAME_BYTES


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=30)


@given(RANGES)
def test_of_ranges_that_overlap_the_last_one_has_an_address(ranges: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in ranges], np.uint64)
    ends = np.array([start + size for start, size in ranges], np.uint64)
    found = intervals.disjoint(starts, ends)
    assert (found.starts[1:] >= found.ends[:-1]).all()
    at = intervals.find(found.starts, found.ends, np.arange(110, dtype=np.uint64))
    for address in range(110):
        owners = [n for n, (start, size) in enumerate(ranges) if start <= address < start + size]
        owner = int(found.owners[at[address]]) if at[address] >= 0 else None
        assert owner == (owners[-1] if owners else None)
