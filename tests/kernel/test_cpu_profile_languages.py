"""Profiles of programs in several languages, built in several ways, that spend 70, 20 and 10 % of
their CPU time in three functions, some ten calls deep."""

from __future__ import annotations

import math
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from typing import Final

import pytest

from coral.mesh.v1 import ebpf_pb2 as pb
from tests.profiling import Profile, profiled, profiled_further, profiling
from tests.support import ROOT, built, wait_until

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.long]

HZ: Final = 499
MILLISECONDS: Final = 2500
MOST_OFF: Final = 0.03
C: Final = ROOT / "tests/programs/profiled.c"
SOURCES: Final = ROOT / "tests/programs/shares"
OMIT: Final = ("-O2", "-fomit-frame-pointer")
BUILDS: Final = {
    "pie": (*OMIT, "-fpie", "-pie"),
    "not_pie": (*OMIT, "-fno-pie", "-no-pie"),
    "static": (*OMIT, "-static"),
    "static_pie": (*OMIT, "-static-pie"),
    "lld": (*OMIT, "-fuse-ld=lld"),
    "lld_not_pie": (*OMIT, "-fno-pie", "-no-pie", "-fuse-ld=lld"),
    "frame_pointers": ("-O2", "-fno-omit-frame-pointer"),
}
# The others are as rare as they differ little; `make test-soak` has them.
OFTEN: Final = ("pie", "static", "frame_pointers")
C_NAMES: Final = ("spend_most", "spend_some", "spend_little")
GO_NAMES: Final = ("main.spendMost", "main.spendSome", "main.spendLittle")
LEVELS: Final = [f"level_{number}" for number in range(1, 10)]

Record = Callable[[str, object], None]


def need(program: str) -> str:
    """Its path; skips the test without it."""
    path = which(program)
    if path is None:
        pytest.skip(f"no {program}")
    return path


def of_c(build: str) -> Path:
    options = BUILDS[build]
    if "-fuse-ld=lld" in options:
        need("ld.lld")

    def command(output: Path) -> Sequence[str | Path]:
        return ["gcc", *options, "-pthread", C, "-o", output]

    return built(f"profiled.{build}", [C], command)


def close(counts: Sequence[int], truth: Sequence[float], profile: Profile, record: Record) -> None:
    """COUNTS of samples have the shares of TRUTH, within four standard errors, and 3 points."""
    total, all_s = sum(counts), sum(truth)
    assert total > 0.85 * HZ * all_s
    off = [count / total - seconds / all_s for count, seconds in zip(counts, truth, strict=True)]
    record("points", [round(100 * it, 2) for it in off])
    print(f"{counts} of {profile.samples}, off by {off}, ends {profile.by('end')}")
    for it, seconds in zip(off, truth, strict=True):
        share = seconds / all_s
        assert abs(it) <= max(MOST_OFF, 4 * math.sqrt(share * (1 - share) / total))


def shares_of(profile: Profile, patterns: Sequence[str], record: Record) -> None:
    """The samples with a function that matches each of PATTERNS are its share of the truth, which
    is in the same order."""
    counts = [
        sum(row.count for row in profile.rows if any(re.search(it, name) for name in row.stack))
        for it in patterns
    ]
    close(counts, list(profile.truth.values()), profile, record)


def spending(profile: Profile, pattern: str) -> list[pb.CpuProfileSample]:
    """Rows with a function that matches."""
    return [row for row in profile.rows if any(re.search(pattern, name) for name in row.stack)]


def whole(rows: Sequence[pb.CpuProfileSample]) -> None:
    """All reach the bottom."""
    ends = Counter[int]()
    for row in rows:
        ends[row.end] += row.count
    assert set(ends) == {pb.CPU_STACK_END_BOTTOM}, ends


def soaking(value: object, name: str | None = None) -> object:
    """A parameter of which `make test-soak` takes care."""
    return pytest.param(value, marks=pytest.mark.soak, id=name)


@pytest.mark.parametrize("build", [build if build in OFTEN else soaking(build) for build in BUILDS])
def test_c_however_it_is_built(build: str, record_property: Record) -> None:
    profile = profiled(of_c(build), "shares", MILLISECONDS, frequency=HZ)
    shares_of(profile, [f"^{name}$" for name in C_NAMES], record_property)
    rows = spending(profile, "^spend_")
    whole(rows)
    for row in rows:
        begin = list(row.stack).index("main")
        assert row.stack[begin + 1 : begin + 10] == LEVELS
    assert {row.unwinding for row in rows} == {pb.CPU_UNWINDING_EH_FRAME}


@pytest.mark.parametrize("build", ["pie", soaking("not_pie"), soaking("static")])
def test_a_stripped_program_has_its_addresses(build: str, record_property: Record) -> None:
    """They are those of the same functions in the program before it was stripped."""
    named = of_c(build)

    def strip(output: Path) -> Sequence[str | Path]:
        return ["strip", "-o", output, named]

    stripped = built(f"stripped.{build}", [named], strip)
    profile = profiled(stripped, "shares", MILLISECONDS, frequency=HZ)
    places = functions_of(named)
    counts: Counter[str] = Counter()
    rows = []
    for row in profile.rows:
        frames = [function_at(places, name, stripped.name) for name in row.stack]
        # The calls of cpu_ns lie on top.
        found = [name for name in frames if name in C_NAMES]
        counts.update(dict.fromkeys(found, row.count))
        if found:
            rows.append(row)
            assert [name for name in frames if name in LEVELS] == LEVELS
            assert "main" in frames
    whole(rows)
    close(
        [counts[name] for name in C_NAMES], list(profile.truth.values()), profile, record_property
    )


def functions_of(program: Path) -> list[tuple[int, int, str]]:
    out = subprocess.run(["nm", "-S", program], capture_output=True, text=True, check=True).stdout
    return [
        (int(start, 16), int(start, 16) + int(size, 16), name)
        for start, size, kind, name in (
            line.split() for line in out.splitlines() if len(line.split()) == 4
        )
        if kind in "tT"
    ]


def function_at(places: Sequence[tuple[int, int, str]], name: str, module: str) -> str:
    """The function of a frame without a name; empty if it is of another module."""
    match = re.fullmatch(re.escape(module) + r"\+0x([0-9a-f]+)", name)
    at = int(match[1], 16) if match else -1
    return next((function for start, end, function in places if start <= at < end), "")


def test_signal_handlers_lie_on_whole_stacks(record_property: Record) -> None:
    profile = profiled(of_c("static"), "signals", MILLISECONDS, frequency=HZ)
    handling = spending(profile, "^handle_signal_work$")
    assert sum(row.count for row in handling) > 50
    whole(handling)
    for row in handling:
        stack = list(row.stack)
        assert stack.index("main") < stack.index("handle_signal_work")
    record_property("handling", sum(row.count for row in handling))


def of_cxx() -> Path:
    need("g++")
    source = SOURCES / "shares.cc"

    def command(output: Path) -> Sequence[str | Path]:
        return ["g++", "-std=c++17", *OMIT, "-pthread", source, "-o", output]

    return built("shares.cxx", [source], command)


@pytest.mark.parametrize("threads", [0, soaking(24)])
def test_templates_of_cxx(threads: int, record_property: Record) -> None:
    profile = profiled(of_cxx(), MILLISECONDS, threads, frequency=HZ)
    patterns = [rf"shares::spend<shares::{it}, \d+>" for it in ("most", "some", "little")]
    shares_of(profile, patterns, record_property)
    rows = spending(profile, "shares::spend<")
    whole(rows)
    for row in rows:
        levels = [name for name in row.stack if "shares::level<" in name]
        assert [int(re.findall(r"level<(\d+)>", name)[0]) for name in levels] == list(range(1, 10))
        assert threads or "main" in row.stack
    assert len(profile.by("tid")) >= threads


def test_rust(record_property: Record) -> None:
    need("rustc")
    source = SOURCES / "shares.rs"

    def command(output: Path) -> Sequence[str | Path]:
        # rustc derives a crate's name from the file that it makes, unless it is told.
        return ["rustc", "-O", "--crate-name", "shares", source, "-o", output]

    program = built("shares.rust", [source], command)
    profile = profiled(program, MILLISECONDS, frequency=HZ)
    shares_of(profile, [f"^shares::{name}$" for name in C_NAMES], record_property)
    rows = spending(profile, "^shares::spend_")
    whole(rows)
    for row in rows:
        assert "shares::main" in row.stack
        assert sum("Level>::descend" in name for name in row.stack) == 9


@pytest.mark.parametrize("flags", [soaking("", "plain"), pytest.param("-s -w", id="stripped")])
def test_go(flags: str, record_property: Record) -> None:
    need("go")
    source = SOURCES / "shares.go"

    def command(output: Path) -> Sequence[str | Path]:
        return ["go", "build", "-ldflags", flags, "-o", output, source]

    profile = profiled(
        built(f"shares.go{flags.replace(' ', '')}", [source], command), MILLISECONDS, frequency=HZ
    )
    if flags:
        # Without a symbol table, names are in a table of Go's own, which is not read.
        assert profile.samples > 0.85 * HZ * sum(profile.truth.values())
        return
    shares_of(profile, [f"^{re.escape(name)}$" for name in GO_NAMES], record_property)
    rows = spending(profile, r"^main\.spend")
    whole(rows)
    for row in rows:
        assert "main.main" in row.stack
        assert list(row.stack).count("main.descend") == 9


@contextmanager
def perf_map() -> Iterator[None]:
    """Removes the perf maps that programs leave behind."""
    before = set(Path("/tmp").glob("perf-*.map"))
    try:
        yield
    finally:
        for path in set(Path("/tmp").glob("perf-*.map")) - before:
            if not Path(f"/proc/{path.stem.partition('-')[2]}").exists():
                path.unlink(missing_ok=True)


def test_cpython_without_perf_maps(record_property: Record) -> None:
    script = SOURCES / "shares.py"
    profile = profiled("/usr/bin/python3", "-I", script, MILLISECONDS, frequency=HZ)
    # Which Python function runs is not to be seen.
    rows = spending(profile, "^_PyEval_EvalFrameDefault$")
    count = sum(row.count for row in rows)
    assert count > 0.85 * HZ * sum(profile.truth.values())
    whole(rows)
    record_property("share", round(count / profile.samples, 3))


def python_with_maps() -> str:
    """A Python with -X perf, from the path or from pyenv, whose own commands are scripts."""
    names = ("python3.14", "python3.13", "python3.12")
    found = [path for name in names if (path := which(name))]
    found += map(str, Path.home().glob(".pyenv/versions/*/bin/python3.1[234]"))
    for path in found:
        ask = [path, "-I", "-X", "perf", "-c", "import sys; print(sys.executable)"]
        told = subprocess.run(ask, capture_output=True, text=True, check=False)
        if told.returncode == 0:
            return told.stdout.strip()
    pytest.skip("no Python with -X perf (3.12)")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="measured on x86-64")
def test_cpython_with_perf_maps(record_property: Record) -> None:
    script = SOURCES / "shares.py"
    with perf_map():
        command = (python_with_maps(), "-X", "perf", "-I", script, MILLISECONDS)
        profile = profiled(*command, frequency=HZ)
    shares_of(profile, [f"^py::{name}:" for name in C_NAMES], record_property)
    rows = spending(profile, "^py::spend_")
    whole(rows)
    for row in rows:
        assert sum(name.startswith("py::descend:") for name in row.stack) == 9


def test_node_without_perf_maps(record_property: Record) -> None:
    node = need("node")
    profile = profiled(node, SOURCES / "shares.js", MILLISECONDS, frequency=HZ)
    rows = [row for row in profile.rows if not row.in_kernel and row.tid == row.tgid]
    count = sum(row.count for row in rows)
    assert count > 0.7 * HZ * sum(profile.truth.values())
    ends = Counter[int]()
    for row in rows:
        ends[row.end] += row.count
    record_property("whole", round(ends[pb.CPU_STACK_END_BOTTOM] / count, 4))
    assert ends[pb.CPU_STACK_END_BOTTOM] > 0.99 * count


def test_what_the_event_loop_of_node_calls_is_whole() -> None:
    """It lies above 12 KB that libuv has on the stack for what epoll tells it."""
    node = need("node")
    profile = profiled(node, SOURCES / "shares.js", 800, "called", frequency=HZ)
    rows = [row for row in profile.rows if "uv__io_poll" in row.stack]
    count = sum(row.count for row in rows)
    assert count > 0.5 * HZ * sum(profile.truth.values())
    whole = sum(row.count for row in rows if row.end == pb.CPU_STACK_END_BOTTOM)
    print(f"{whole} of {count} are whole")
    assert whole > 0.9 * count


def test_node_with_perf_maps(record_property: Record, tmp_path: Path) -> None:
    node = need("node")
    with perf_map():
        # It writes a log besides the map.
        log = ("--no-logfile-per-isolate", f"--logfile={tmp_path}/v8.log")
        command = (node, "--perf-basic-prof", *log, SOURCES / "shares.js", MILLISECONDS)
        profile = profiled(*command, frequency=HZ)
    names = ("spendMost", "spendSome", "spendLittle")
    shares_of(profile, [rf"^JS:.?{name} " for name in names], record_property)
    rows = spending(profile, r"^JS:.?spend")
    whole(rows)


@contextmanager
def warm_java(*options: str) -> Iterator[subprocess.Popen[str]]:
    """A JVM that has compiled what it will run, each method by itself, and waits for a byte."""
    javac, java = need("javac"), need("java")
    source = SOURCES / "Shares.java"

    def command(output: Path) -> Sequence[str | Path]:
        return [javac, "-d", output, source]

    classes = built("shares.java", [source], command)
    apart = ("-XX:CompileCommand=quiet", "-XX:CompileCommand=dontinline,Shares::*")
    process = subprocess.Popen(
        [java, "-XX:+UseSerialGC", *apart, *options, "-cp", classes, "Shares", str(MILLISECONDS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.soak
def test_java_with_frame_pointers_and_a_perf_map(record_property: Record) -> None:
    with perf_map(), warm_java("-XX:+PreserveFramePointer") as process:
        write_map = [need("jcmd"), str(process.pid), "Compiler.perfmap"]
        subprocess.run(write_map, stdout=subprocess.DEVNULL, check=True)
        profile = profiled_further(process, frequency=HZ)
    names = ("spendMost", "spendSome", "spendLittle")
    shares_of(profile, [rf"\bShares\.{name}\(" for name in names], record_property)
    rows = spending(profile, r"\bShares\.spend")
    # At the first and last instructions of a method, the frame pointer is not its own.
    right = sum(
        row.count
        for row in rows
        if row.end == pb.CPU_STACK_END_BOTTOM
        and sum("Shares.descend(" in name for name in row.stack) == 9
    )
    count = sum(row.count for row in rows)
    record_property("whole", f"{right} of {count}")
    assert right > 0.98 * count


@pytest.mark.soak
def test_a_perf_map_of_java_that_is_written_again_is_read_again() -> None:
    with perf_map(), warm_java("-XX:+PreserveFramePointer") as process:
        path = Path(f"/tmp/perf-{process.pid}.map")
        write_map = [need("jcmd"), str(process.pid), "Compiler.perfmap"]
        subprocess.run(write_map, stdout=subprocess.DEVNULL, check=True)
        # One from before these were compiled.
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "Shares.spend" not in line))
        with profiling(pid=process.pid, frequency=HZ) as profile:
            assert process.stdin
            process.stdin.write("x")
            process.stdin.flush()
            wait_until(lambda: profile.samples > 50)
            assert not spending(profile, r"\bShares\.spend")
            subprocess.run(write_map, stdout=subprocess.DEVNULL, check=True)
            process.communicate()
    assert spending(profile, r"\bShares\.spend")


@pytest.mark.soak
def test_java_without_them_has_no_names_and_its_stacks_are_cut(record_property: Record) -> None:
    with warm_java() as process:
        profile = profiled_further(process, frequency=HZ)
    assert profile.samples > 0.85 * HZ * sum(profile.truth.values())
    rows = [row for row in profile.rows if row.stack and row.stack[-1].startswith("[anonymous]+")]
    count = sum(row.count for row in rows)
    cut = sum(row.count for row in rows if row.end == pb.CPU_STACK_END_NO_UNWIND_INFO)
    record_property("cut", f"{cut} of {count}, of {profile.samples}")
    assert cut > 0.85 * profile.samples
    assert not spending(profile, "spend")


def test_no_process_but_the_target(programs: Path) -> None:
    """Another that runs the same program at the same time is not in it."""
    other = subprocess.Popen(
        [programs / "profiled", "shares", "60000"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        assert other.stdin
        other.stdin.write(b"x")
        other.stdin.flush()
        profile = profiled(programs / "profiled", "shares", 1000, frequency=HZ)
    finally:
        other.kill()
        other.communicate()
    assert profile.samples > 0.85 * HZ * sum(profile.truth.values())
    assert len(profile.by("tgid")) == 1
    assert other.pid not in profile.by("tgid")
