"""Stacks of real processes, unwound from copies, against gdb, frame by frame."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from coral.collectors.unwinding.stacks import End, Frame
from tests.stopped import Compared, compare, seen_by_gdb, unwound
from tests.support import ROOT, built

pytestmark = [
    pytest.mark.skipif(which("gdb") is None, reason="no gdb"),
    pytest.mark.skipif(os.geteuid() != 0, reason="not root, whose gdb may attach to any process"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="gdb's registers are of x86-64"),
]
SOURCE = ROOT / "tests/programs/unwound.c"
BUILDS = {
    "plain": ["-O2"],
    "static": ["-O2", "-static"],
    "not_pie": ["-O2", "-no-pie", "-fno-pie", "-Wl,-z,lazy"],
    "size": ["-Os", "-mavx2"],
    "frame_pointers": ["-O1", "-fno-omit-frame-pointer"],
    "o3": ["-O3", "-mavx", "-fcf-protection=full", "-Wl,-z,ibtplt"],
}
PYTHON = """
import json, re, threading, zlib
def rec(n): return 0 if n == 0 else 1 + rec(n - 1)
def work():
    while True:
        text = json.dumps({str(i): [i] for i in range(100)})
        re.sub(r"\\\\d+", lambda m: m[0] + "x", text)
        sorted(range(50), key=lambda x: rec(x % 9))
        zlib.compress(text.encode())
threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
work()
"""
# Through C at each level: sorted() calls its key.
DEEP = """
def deep(n):
    if n: return sorted([n - 1], key=deep)
    print("ready", flush=True)
    while True: pass
deep(150)
"""
NODE = """
const zlib = require('zlib'), crypto = require('crypto');
const rec = (n) => n == 0 ? 0 : 1 + rec(n - 1);
function work() {
  const text = JSON.stringify(Array.from({length: 500}, (_, i) => ({a: 'x' + i})));
  JSON.parse(text); zlib.gzipSync(text); crypto.createHash('sha512').update(text).digest();
  crypto.pbkdf2('a', 'b', 5000, 64, 'sha512', () => {});
  rec(50); setImmediate(work);
}
console.log('ready'); work();
"""


@contextmanager
def running(*command: str | Path) -> Iterator[int]:
    """A program that has said that it is ready."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            yield process.pid
        finally:
            process.kill()


def compiled(options: list[str], output: Path) -> list[str | Path]:
    return ["gcc", "-fomit-frame-pointer", *options, "-pthread", "-o", output, SOURCE]


@pytest.mark.parametrize("build", BUILDS)
def test_stacks_of_c_are_those_of_gdb(build: str) -> None:
    program = built(f"unwound.{build}", [SOURCE], partial(compiled, BUILDS[build]))
    with running(program, "4") as pid:
        seen = seen_by_gdb(pid, 15)
        stacks = unwound(pid, seen.samples)
    compared = compare(seen, stacks)
    assert not compared.wrong
    # One thread of four handles signals on a stack of its own: the other is not in the copy then.
    assert compared.equal >= 45
    assert compared.equal + compared.cut == 60
    assert not (stacks.flags & Frame.GUESS).any()
    assert (stacks.flags & Frame.SIGNAL).any()
    assert set(stacks.ends.tolist()) <= {End.BOTTOM, End.COPY_TOO_SHORT}


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_thousand_stacks_are_those_of_gdb(record_property: Callable[[str, object], None]) -> None:
    total = Compared()
    commands: list[tuple[int, list[str | Path]]] = [
        (40, [built(f"unwound.{build}", [SOURCE], partial(compiled, BUILDS[build])), "4"])
        for build in BUILDS
    ]
    commands.append((60, ["/usr/bin/python3", "-P", "-c", PYTHON]))
    commands.append((15, ["node", "-e", NODE]))
    for rounds, command in commands:
        with running(*command) as pid:
            seen = seen_by_gdb(pid, rounds)
            compared = compare(seen, unwound(pid, seen.samples))
        total.equal += compared.equal
        total.cut += compared.cut
        total.guessed += compared.guessed
        total.wrong += compared.wrong
    for name in ("equal", "cut", "guessed"):
        record_property(name, getattr(total, name))
    assert not total.wrong
    assert total.equal >= 1000


def test_stacks_of_cpython_are_those_of_gdb() -> None:
    with running("/usr/bin/python3", "-P", "-c", PYTHON) as pid:
        seen = seen_by_gdb(pid, 20)
        stacks = unwound(pid, seen.samples)
    compared = compare(seen, stacks)
    assert not compared.wrong
    assert compared.equal == 40
    assert (stacks.ends == End.BOTTOM).all()


@pytest.mark.skipif(which("node") is None, reason="no node")
def test_stacks_of_node_are_those_of_gdb_up_to_compiled_javascript() -> None:
    with running("node", "-e", NODE) as pid:
        seen = seen_by_gdb(pid, 6)
        stacks = unwound(pid, seen.samples)
    compared = compare(seen, stacks)
    assert not compared.wrong
    assert compared.equal >= 30
    # Guesses lead to the bottom, too.
    assert (stacks.ends == End.BOTTOM).all()


def test_a_stack_that_is_deeper_than_its_copy_is_said_to_be_cut() -> None:
    with running("/usr/bin/python3", "-P", "-c", DEEP) as pid:
        seen = seen_by_gdb(pid, 2, stack_bytes=16384)
        stacks = unwound(pid, seen.samples)
    assert (stacks.ends == End.COPY_TOO_SHORT).all()
    assert compare(seen, stacks).cut == len(stacks)
    assert (stacks.lengths > 20).all()
    assert np.all([len(frames) > 400 for frames in seen.frames])
