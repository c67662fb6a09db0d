"""bcc's compiler as a process: one at a time, and none once the agent ends."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coral.bpf import LoadError
from coral.bpf.loading import bcc
from tests.support import wait_until

# A compiler that tells how often it ran, and fails beside another one.
BCC = """\
import os, time
class BPF:
    def __init__(self, text, cflags):
        os.mkdir({directory!r} + "/at_work")
        time.sleep(0.2)
        os.rmdir({directory!r} + "/at_work")
        with open({directory!r} + "/runs", "a") as runs:
            runs.write("x")
    def dump_func(self, name):
        return name
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a package `bcc`, found as that of the distribution."""
    package = tmp_path / "bcc"
    package.mkdir()
    (package / "libbcc.py").touch()
    (package / "__init__.py").write_text(BCC.format(directory=str(tmp_path)))
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))
    monkeypatch.setattr(bcc, "_bcc_paths", lambda: (str(tmp_path),))
    monkeypatch.setattr(bcc, "_compiler", bcc._Compiler())
    return tmp_path


def runs(directory: Path) -> int:
    return len((directory / "runs").read_text())


def test_programs_are_compiled_one_at_a_time_and_each_once(compiler: Path) -> None:
    sources = [compiler / f"{name}.bpf.c" for name in "abab"]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda source: bcc.compiled(source, (source.stem,), ()), sources))
    assert [list(each.items()) for each in made] == [
        [(source.stem, source.stem.encode())] for source in sources
    ]
    assert runs(compiler) == 2


def test_a_compiler_that_is_stopped_is_a_refusal_for_all_who_wait(compiler: Path) -> None:
    (compiler / "at_work").mkdir()  # it fails if it comes so far
    (compiler / "bcc/__init__.py").write_text("import signal\ndef BPF(**_): signal.pause()\n")
    begun = threading.Barrier(3)

    def compile_(name: str) -> str:
        begun.wait()
        with pytest.raises(LoadError) as refused:
            bcc.compiled(compiler / f"{name}.bpf.c", (), ())
        return str(refused.value)

    with ThreadPoolExecutor(2) as pool:
        told = [pool.submit(compile_, name) for name in "ab"]
        begun.wait()
        wait_until(lambda: bcc._compiler._process is not None)
        bcc.stop()
        texts = [each.result(10) for each in told]
    assert texts == [f"compiling {name}.bpf.c with bcc: the agent ends" for name in "ab"]
    with pytest.raises(LoadError, match="the agent ends"):
        bcc.compiled(compiler / "c.bpf.c", (), ())
