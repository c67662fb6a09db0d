"""Names for addresses of real processes: whatever became of their files and of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from coral.bpf.attaching.mappings import MappedCode
from coral.collectors.symbols import names as names_module
from coral.collectors.symbols.files import MappedFiles, Mounts, Sighting, read_whole
from coral.collectors.symbols.maps import ProcessMaps
from coral.collectors.symbols.names import UNKNOWN, Symbolizer
from tests.support import ROOT, built, wait_until

SOURCE: Final = ROOT / "tests/programs/profile/places.c"
FUNCTIONS: Final = ("static_function", "global_function", "moved_function", "after_moved", "main")


def place(name: str, *flags: str) -> Path:
    command = ("cc", "-O1", "-Wall", "-Werror", *flags, str(SOURCE), "-o")
    return built(name, [SOURCE], lambda output: [*command, output])


class Places:
    """tests/programs/profile/places.c, running."""

    def __init__(self, *command: str | Path, fd: int = -1) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[fd] if fd >= 0 else [],
        )
        self.pid = self._process.pid
        self.at = self._read()

    def _read(self) -> dict[str, int]:
        assert self._process.stdout
        found: dict[str, int] = {}
        for line in self._process.stdout:
            name, _, address = line.strip().partition(" ")
            if name in ("ready", "done"):
                return found
            found[name] = int(address, 16)
        raise AssertionError(f"ended: {self._process.wait()}")

    def tell(self, line: str) -> dict[str, int]:
        """Writes a line; returns what it prints then."""
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
        Path(f"/tmp/perf-{self.pid}.map").unlink(missing_ok=True)


@pytest.fixture
def start() -> Iterator[Callable[..., Places]]:
    started: list[Places] = []

    def begin(*command: str | Path, fd: int = -1) -> Places:
        started.append(Places(*command, fd=fd))
        return started[-1]

    yield begin
    for one in started:
        one.end()


@pytest.fixture
def symbolizer() -> Iterator[Symbolizer]:
    symbolizer = Symbolizer()
    yield symbolizer
    symbolizer.close()


def named(
    symbolizer: Symbolizer,
    pid: int,
    addresses: list[int],
    *,
    is_return: bool = False,
    times_ns: list[int] | None = None,
) -> list[str]:
    found = symbolizer.names(
        pid,
        np.array(addresses, np.uint64),
        np.full(len(addresses), is_return),
        None if times_ns is None else np.array(times_ns, np.uint64),
    )
    return [symbolizer.strings[number] for number in found.functions]


def own_functions(places: Places) -> list[int]:
    return [places.at[name] for name in FUNCTIONS]


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-no-pie", "-fno-pie"),
        ("-static",),
        ("-static-pie",),
        ("-Wl,-z,noseparate-code",),
        ("-Wl,--build-id=none",),
        pytest.param(
            ("-fuse-ld=gold",),
            marks=pytest.mark.skipif(not shutil.which("ld.gold"), reason="needs gold"),
        ),
        pytest.param(
            ("-fuse-ld=lld",),
            marks=pytest.mark.skipif(not shutil.which("ld.lld"), reason="needs lld"),
        ),
    ],
)
def test_functions_of_a_process_have_their_names(
    start: Callable[..., Places], symbolizer: Symbolizer, flags: tuple[str, ...]
) -> None:
    places = start(place("places" + "".join(flags).replace(",", ""), *flags))
    assert named(symbolizer, places.pid, own_functions(places)) == list(FUNCTIONS)
    assert named(symbolizer, places.pid, [places.at["main"]], is_return=True) != ["main"]
    assert named(symbolizer, places.pid, [places.at["main"] + 1], is_return=True) == ["main"]
    if not any(flag.startswith("-static") for flag in flags):
        assert named(symbolizer, places.pid, [places.at["getppid"]]) == ["getppid"]


def test_a_file_of_two_texts_is_named_by_segment(
    start: Callable[..., Places], symbolizer: Symbolizer, tmp_path: Path
) -> None:
    source = tmp_path / "two.c"
    marked = SOURCE.read_text().replace(
        "int after_moved(", '__attribute__((section(".far"))) int after_moved('
    )
    source.write_text(marked)
    flags = ["-O1", "-no-pie", "-fno-pie", "-Wl,--section-start=.far=0x7654000"]
    subprocess.run(["cc", *flags, source, "-o", tmp_path / "two"], check=True)
    places = start(tmp_path / "two")
    assert places.at["after_moved"] >= 0x7654000
    assert named(symbolizer, places.pid, own_functions(places)) == list(FUNCTIONS)


def test_addresses_are_those_in_the_file(
    start: Callable[..., Places], symbolizer: Symbolizer
) -> None:
    program = place("places")
    places = start(program)
    listing = subprocess.check_output(["nm", program], text=True)
    address = next(int(line[:16], 16) for line in listing.splitlines() if line.endswith(" T main"))
    found = symbolizer.names(
        places.pid, np.array([places.at["main"] + 3], np.uint64), np.zeros(1, np.bool_)
    )
    notes = subprocess.check_output(["readelf", "-n", program], text=True)
    assert found.addresses[0] == address + 3
    assert symbolizer.strings[found.modules[0]] == "places"
    assert f"Build ID: {symbolizer.strings[found.build_ids[0]]}" in notes
    assert not found.is_unnamed[0]


def test_a_stripped_program_has_its_name_and_the_address(
    start: Callable[..., Places], symbolizer: Symbolizer, tmp_path: Path
) -> None:
    stripped = tmp_path / "stripped"
    subprocess.run(["strip", "-o", stripped, place("places")], check=True)
    places = start(stripped)
    found = symbolizer.names(
        places.pid, np.array(own_functions(places), np.uint64), np.zeros(5, np.bool_)
    )
    assert found.is_unnamed.all()
    for function, address in zip(found.functions, found.addresses, strict=True):
        assert symbolizer.strings[function] == f"stripped+0x{address:x}"


def test_a_deleted_and_a_replaced_program_keep_their_names(
    start: Callable[..., Places], symbolizer: Symbolizer, tmp_path: Path
) -> None:
    deleted, replaced = tmp_path / "deleted", tmp_path / "replaced"
    shutil.copy(place("places"), deleted)
    shutil.copy(place("places"), replaced)
    first, second = start(deleted), start(replaced)
    deleted.unlink()
    impostor = tmp_path / "impostor"
    shutil.copy("/bin/true", impostor)
    impostor.rename(replaced)
    for places in (first, second):
        assert named(symbolizer, places.pid, own_functions(places)) == list(FUNCTIONS)


def test_a_program_in_memory_alone_has_names(
    start: Callable[..., Places], symbolizer: Symbolizer
) -> None:
    fd = os.memfd_create("coral-test")
    try:
        os.write(fd, place("places").read_bytes())
        places = start(f"/proc/self/fd/{fd}", fd=fd)
    finally:
        os.close(fd)
    assert named(symbolizer, places.pid, own_functions(places)) == list(FUNCTIONS)
    found = symbolizer.maps(places.pid)
    assert "/memfd:coral-test" in [file.name for file in found.files]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")
def test_a_program_of_a_container_is_found_through_its_root(
    start: Callable[..., Places], symbolizer: Symbolizer, tmp_path: Path
) -> None:
    """Its path leads outside to another program. Its perf map is where it sees it, under the id
    that it has there."""
    program, inside = place("places-static", "-static"), tmp_path / "root"
    (inside / "bin").mkdir(parents=True)
    shutil.copy("/bin/true", inside / "bin/prog")
    script = (
        f"mount -t tmpfs coral-test {inside} && mkdir {inside}/bin {inside}/tmp && "
        f"cp {program} {inside}/bin/prog && exec chroot {inside} /bin/prog jit"
    )
    places = start("unshare", "--mount", "--pid", "--fork", "sh", "-ec", script)
    children = Path(f"/proc/{places.pid}/task/{places.pid}/children")
    pid = int(children.read_text().split()[0])
    assert places.at["pid"] == 1
    assert named(symbolizer, pid, own_functions(places)) == list(FUNCTIONS)
    assert named(symbolizer, pid, [places.at["code"]]) == ["first compiled"]
    os.kill(pid, 9)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts")
def test_debug_information_is_found_by_build_id_in_the_containers_root(
    start: Callable[..., Places], symbolizer: Symbolizer, tmp_path: Path
) -> None:
    program, inside = place("places-static", "-static"), tmp_path / "root"
    notes = subprocess.check_output(["readelf", "-n", program], text=True)
    build_id = notes.partition("Build ID: ")[2].split()[0]
    debug = f"{inside}/usr/lib/debug/.build-id/{build_id[:2]}"
    inside.mkdir()
    script = (
        f"mount -t tmpfs coral-test {inside} && mkdir -p {debug} && "
        f"strip -o {inside}/prog {program} && "
        f"objcopy --only-keep-debug {program} {debug}/{build_id[2:]}.debug && "
        f"exec chroot {inside} /prog"
    )
    places = start("unshare", "--mount", "sh", "-ec", script)
    assert named(symbolizer, places.pid, own_functions(places)) == list(FUNCTIONS)


def test_without_the_capability_for_map_files_the_path_is_taken_if_it_is_the_file(
    start: Callable[..., Places], tmp_path: Path
) -> None:
    """What opening does then; that of the program itself never needs it."""
    program = tmp_path / "prog"
    shutil.copy(place("places"), program)
    places = start(program)
    files = MappedFiles()
    maps = ProcessMaps(places.pid, files)
    library = next(file for file in maps.files if file.module == "libc.so.6")
    status = Path(library.name).stat()
    number = maps.files.index(library)
    where = int(np.flatnonzero(maps.file_indexes == number)[0])
    nowhere = {"start": int(maps.starts[where]) + 4096, "end": int(maps.ends[where])}
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    right = Sighting(
        tgid=places.pid, device=device, inode=status.st_ino, path=library.name, **nowhere
    )
    others = MappedFiles()
    mounts = Mounts(places.pid)
    assert others.get(right, mounts).elf
    other = others.get(right._replace(inode=status.st_ino + 1), mounts)
    assert other.elf is None
    assert other.why_not == "another file is there now"
    gone = others.get(right._replace(inode=1, path=f"{library.name} (deleted)"), mounts)
    assert "CAP_CHECKPOINT_RESTORE" in gone.why_not
    own = program.stat()
    device = f"{os.major(own.st_dev):02x}:{os.minor(own.st_dev):02x}"
    program.unlink()
    deleted = right._replace(device=device, inode=own.st_ino, path=f"{program} (deleted)")
    assert others.get(deleted, mounts).elf
    others.close()
    files.close()


def test_moved_text_is_named_if_it_is_the_files(
    start: Callable[..., Places], symbolizer: Symbolizer
) -> None:
    for flags in (("-no-pie", "-fno-pie"), ()):
        program = place("places" + "".join(flags), *flags)
        places, overwritten = start(program, "move"), start(program, "overwrite")
        assert named(symbolizer, places.pid, own_functions(places)) == list(FUNCTIONS)
        maps = symbolizer.maps(places.pid)
        assert int(maps.is_moved.sum()) == 1
        found = named(symbolizer, overwritten.pid, own_functions(overwritten))
        assert found == [*FUNCTIONS[:2], "[anonymous]+0x0", *FUNCTIONS[3:]]


def test_names_outlive_the_process(start: Callable[..., Places], symbolizer: Symbolizer) -> None:
    places = start(place("places"), "jit")
    symbolizer.maps(places.pid)
    addresses = [*own_functions(places), places.at["getppid"], places.at["code"]]
    seen = named(symbolizer, places.pid, [places.at["code"]])  # its perf map is open
    places.end()
    expected = [*FUNCTIONS, "getppid", "first compiled"]
    assert seen == ["first compiled"]
    assert named(symbolizer, places.pid, addresses) == expected
    assert symbolizer.maps(places.pid).has_ended or not symbolizer.maps(places.pid).refresh()
    # One that nobody has seen in time has no names.
    gone = Symbolizer()
    assert named(gone, places.pid, addresses) == [UNKNOWN] * len(addresses)
    gone.close()


def test_maps_are_read_whole_or_not_at_all() -> None:
    """Of a process that ends while they are read, the kernel has no more to give."""
    fork = "import os\nfor _ in range(500):\n pid = os.fork()\n if not pid: os._exit(0)\n"
    fork += " print(pid, flush=True)\n input()\n os.waitpid(pid, 0)"
    command = [sys.executable, "-I", "-S", "-c", fork]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin
        assert parent.stdout
        for line in parent.stdout:
            while text := read_whole(int(line), "maps"):
                assert b"[stack]" in text
            parent.stdin.write(b"\n")
            parent.stdin.flush()


def test_samples_from_before_an_exec_have_the_names_of_then(
    start: Callable[..., Places], symbolizer: Symbolizer, tmp_path: Path
) -> None:
    """Both programs are at the same addresses, with other functions there."""
    other = tmp_path / "other.c"
    swapped = SOURCE.read_text().replace("moved_function", "swapped_function")
    other.write_text(swapped)
    flags = ["-O1", "-no-pie", "-fno-pie"]
    subprocess.run(["cc", *flags, other, "-o", tmp_path / "other"], check=True)
    places = start(place("places-no-pie-fno-pie", "-no-pie", "-fno-pie"), "jit")
    address, code = places.at["moved_function"], places.at["code"]
    assert named(symbolizer, places.pid, [address, code]) == ["moved_function", "first compiled"]
    before = time.monotonic_ns()
    now = places.tell(f"exec {tmp_path / 'other'}")
    assert now["swapped_function"] == address
    symbolizer.executed(places.pid, before + 1)
    after = time.monotonic_ns()
    both = named(symbolizer, places.pid, [address, address], times_ns=[before, after])
    assert both == ["moved_function", "swapped_function"]
    assert named(symbolizer, places.pid, [address]) == ["swapped_function"]
    assert named(symbolizer, places.pid, [code], times_ns=[before]) == ["first compiled"]
    library = named(symbolizer, places.pid, [places.at["getppid"]], times_ns=[before])
    assert library == ["getppid"]


def test_an_exec_that_nobody_told_is_noticed(
    start: Callable[..., Places], symbolizer: Symbolizer
) -> None:
    places = start(place("places"))
    assert named(symbolizer, places.pid, own_functions(places)) == list(FUNCTIONS)
    old, before = places.at["main"], time.monotonic_ns()
    now = places.tell(f"exec {place('places-static', '-static')}")
    again = [now[name] for name in FUNCTIONS]
    wait_until(lambda: named(symbolizer, places.pid, again) == list(FUNCTIONS))
    programs = [state.program for state in symbolizer.maps(places.pid).generations]
    assert programs == [0, 1]
    # When it is told, later, the time of it counts.
    symbolizer.executed(places.pid, before + 1)
    assert [state.since_ns for state in symbolizer.maps(places.pid).generations] == [0, before + 1]
    assert named(symbolizer, places.pid, [old], times_ns=[before]) == ["main"]
    times = [before + 2] * len(again)
    assert named(symbolizer, places.pid, again, times_ns=times) == list(FUNCTIONS)


def test_a_library_that_is_loaded_later_has_names(tmp_path: Path, symbolizer: Symbolizer) -> None:
    """The mapping is found when an address lies in none, or when the kernel has told it."""
    source = tmp_path / "late.c"
    source.write_text("int late_function(int x) { return x + 1; }")
    library = tmp_path / "late.so"
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    script = (
        "import ctypes, sys; print(flush=True); sys.stdin.readline(); "
        f"it = ctypes.CDLL('{library}'); "
        "print(ctypes.cast(it.late_function, ctypes.c_void_p).value, flush=True); "
        "sys.stdin.readline()"
    )
    process = subprocess.Popen(
        ["/usr/bin/python3", "-I", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdout.readline()
        maps = symbolizer.maps(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        address = int(process.stdout.readline())
        told = MappedCode(time.monotonic_ns(), process.pid, address, 1, 0, 0, 0, str(library))

        def is_found() -> bool:
            symbolizer.learn([told])
            return bool(maps.find(np.array([address], np.uint64))[0] >= 0)

        wait_until(is_found)
        assert named(symbolizer, process.pid, [address]) == ["late_function"]
        other = Symbolizer()
        assert named(other, process.pid, [address]) == ["late_function"]
        other.close()
    finally:
        process.kill()
        process.communicate()


COPIED: Final = """
import ctypes, mmap, os, sys
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
code = mmap.mmap(-1, 4096, flags, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
def tell(name, at):
    with open(f"/tmp/perf-{os.getpid()}.map", "a") as file:
        file.write(f"{address + at:x} 10 {name}\\n")
tell("of both", 0); tell("of the first", 0x20)
ends, start = os.pipe()
copy = os.fork()
if not copy:
    os.close(start)
    tell("of the copy", 0x20)
    print(os.getpid(), address, flush=True)
    os.read(ends, 1)
    os._exit(0)
sys.stdin.readline()
tell("of the first, later", 0x40)
print(flush=True)
sys.stdin.readline()
"""


def test_what_was_compiled_before_a_fork_has_its_name_in_the_copy(symbolizer: Symbolizer) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-I", "-c", COPIED], stdin=pipe, stdout=pipe, text=True
    ) as first:
        assert first.stdin
        assert first.stdout
        copy, address = map(int, first.stdout.readline().split())
        maps = [Path(f"/tmp/perf-{pid}.map") for pid in (first.pid, copy)]
        places = [address, address + 0x20, address + 0x40]
        try:
            unnamed = [f"[anonymous]+0x{at:x}" for at in (0, 0x40)]
            wanted = [unnamed[0], "of the copy", unnamed[1]]
            wait_until(lambda: named(symbolizer, copy, places) == wanted)
            symbolizer.copied(copy, 0, (first.pid, 0))
            wanted[0] = "of both"
            wait_until(lambda: named(symbolizer, copy, places) == wanted)
            in_first = ["of both", "of the first", unnamed[1]]
            # /proc tells the time of the copy in ticks: what is told within two may be before it.
            begun_ns = symbolizer.maps(copy).started_ns
            assert begun_ns
            known_ns = begun_ns + 10**9  # by then the map was read, and read again
            wait_until(
                lambda: (
                    named(symbolizer, first.pid, places) == in_first
                    and time.monotonic_ns() > known_ns
                )
            )
            first.stdin.write("\n")
            first.stdin.flush()
            first.stdout.readline()
            in_first[2] = "of the first, later"
            wait_until(lambda: named(symbolizer, first.pid, places) == in_first)
            assert named(symbolizer, copy, places) == wanted
        finally:
            for path in maps:
                path.unlink(missing_ok=True)
            first.communicate("\n")


def test_functions_of_the_vdso_have_names(
    start: Callable[..., Places], symbolizer: Symbolizer
) -> None:
    places = start(place("places"))
    maps = symbolizer.maps(places.pid)
    where = int(maps.find(np.array([places.at["vdso"]], np.uint64))[0])
    vdso = maps.files[maps.file_indexes[where]]
    assert vdso.module == "[vdso]"
    assert vdso.elf
    dump = vdso.elf.section(".dynstr")
    assert dump
    addresses = list(range(places.at["vdso"], int(maps.ends[where]), 16))
    found = set(named(symbolizer, places.pid, addresses))
    assert any("clock_gettime" in name for name in found)


def test_compiled_functions_are_followed(
    start: Callable[..., Places], symbolizer: Symbolizer
) -> None:
    places = start(place("places"), "jit")
    code = places.at["code"]
    addresses = [code, code + 31, code + 32, code + 64, code + 127, code + 128]
    expected = ["first compiled"] * 2 + ["[anonymous]+0x20"] + ["second;compiled"] * 2
    assert named(symbolizer, places.pid, addresses) == [*expected, "[anonymous]+0x80"]
    places.tell("again")
    wait_until(lambda: named(symbolizer, places.pid, [code, code + 64]) == ["third", "fourth"])
    places.tell("rewrite")
    wait_until(lambda: named(symbolizer, places.pid, [code, code + 64]) == ["fifth", "sixth"])


def test_the_kernel_has_names_too(symbolizer: Symbolizer) -> None:
    lines = [line.split() for line in Path("/proc/kallsyms").read_text().splitlines()[2000:2050]]
    addresses = [int(line[0], 16) for line in lines]
    if not any(addresses):
        pytest.skip("the kernel's addresses are hidden")
    found = named(symbolizer, os.getpid(), [address + 1 for address in addresses], is_return=True)
    at = dict[int, set[str]]()
    for line in lines:
        at.setdefault(int(line[0], 16), set()).add(line[2])
    assert all(name in at[address] for name, address in zip(found, addresses, strict=True))


def test_any_address_gets_an_answer(symbolizer: Symbolizer) -> None:
    chance = np.random.default_rng(13)
    addresses = chance.integers(0, 1 << 64, 2000, dtype=np.uint64)
    addresses[:5] = [0, 1, (1 << 47) - 1, 1 << 63, (1 << 64) - 1]
    for pid in (os.getpid(), 0, 2, 1 << 22):
        found = symbolizer.names(pid, addresses, chance.random(2000) < 0.5)
        assert len(found.functions) == 2000
        assert all(symbolizer.strings[number] for number in found.functions)
        symbolizer.forget(pid)
    empty = symbolizer.names(os.getpid(), addresses[:0], np.zeros(0, np.bool_))
    assert len(empty.functions) == 0


def test_memory_is_bounded_and_counted(
    start: Callable[..., Places], symbolizer: Symbolizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = start(place("places"), "jit")
    expected = [*FUNCTIONS, "getppid", "first compiled"]
    addresses = [*own_functions(places), places.at["getppid"], places.at["code"]]
    assert named(symbolizer, places.pid, addresses) == expected
    stats = symbolizer.stats
    assert stats.processes == 1
    assert stats.perf_map_functions == 2
    assert stats.tables.tables == stats.tables.misses == 2
    assert 0 < stats.tables.memory_bytes < 1 << 20
    monkeypatch.setattr(names_module, "_LARGEST_STRINGS_BYTES", 0)
    assert symbolizer.trim()
    assert named(symbolizer, places.pid, addresses) == expected
    symbolizer.store.most_tables = 1
    other = start(place("places-static", "-static"))
    assert named(symbolizer, other.pid, own_functions(other)) == list(FUNCTIONS)
    assert named(symbolizer, places.pid, addresses) == expected
    assert symbolizer.stats.tables.tables == 1
    assert symbolizer.stats.tables.evicted > 0
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    symbolizer.close()
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) < descriptors


def test_no_more_files_are_open_than_allowed(start: Callable[..., Places]) -> None:
    files = MappedFiles(most_open=2)
    places = start(place("places"))
    maps = ProcessMaps(places.pid, files)
    assert len(files) == 2
    assert files.closed > 0
    closed = [file for file in maps.files if "more than 2 files" in file.why_not]
    assert len(closed) == files.closed
    files.close()
    assert len(files) == 0


def test_a_copy_with_the_same_build_id_and_other_symbols_has_its_own_names(
    start: Callable[..., Places], symbolizer: Symbolizer, tmp_path: Path
) -> None:
    """A container must not be able to name the functions of another one."""
    hostile = tmp_path / "hostile"
    rename = [f"--redefine-sym={name}=evil_{number}" for number, name in enumerate(FUNCTIONS[:4])]
    subprocess.run(["objcopy", *rename, place("places"), hostile], check=True)
    bad, good = start(hostile), start(place("places"))
    found = named(symbolizer, bad.pid, own_functions(bad))
    assert found == ["evil_0", "evil_1", "evil_2", "evil_3", "main"]
    assert named(symbolizer, good.pid, own_functions(good)) == list(FUNCTIONS)
    # An equal copy shares the table.
    same = tmp_path / "same"
    shutil.copy(place("places"), same)
    again = start(same)
    tables = symbolizer.stats.tables.tables
    assert named(symbolizer, again.pid, own_functions(again)) == list(FUNCTIONS)
    assert symbolizer.stats.tables.tables == tables


@pytest.mark.parametrize(
    "name", ["</script><script>", "main;drive;fake 999", "a\x1b[31mb", "x" * 900]
)
def test_hostile_names_are_shown_as_they_are_but_harm_nobody(
    start: Callable[..., Places], symbolizer: Symbolizer, tmp_path: Path, name: str
) -> None:
    program = tmp_path / "named"
    rename = f"--redefine-sym=global_function={name}"
    subprocess.run(["objcopy", rename, place("places"), program], check=True)
    places = start(program)
    (found,) = named(symbolizer, places.pid, [places.at["global_function"]])
    expected = name.replace("\x1b", "?")
    assert found == (expected if len(expected) < 512 else "x" * 511 + "…")
    assert found.isprintable()
