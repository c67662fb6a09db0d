"""The build, where something that it needs is missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import build_hook


def test_without_clang_the_build_stops_with_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CLANG", raising=False)
    with pytest.raises(SystemExit) as stopped:
        build_hook.build_objects()
    assert stopped.value.code == (
        "clang is missing: apt-get install clang libbpf-dev (or set CLANG)"
    )


@pytest.mark.parametrize("arch", build_hook.TARGET_ARCH.values())
@pytest.mark.parametrize("source", build_hook.program_sources(), ids=lambda s: s.name)
def test_every_program_compiles_for_every_processor(
    source: Path, arch: str, tmp_path: Path
) -> None:
    output = tmp_path / "compiled.o"
    subprocess.run(build_hook.clang_command(source, output, arch), check=True)
    assert output.read_bytes().startswith(b"\x7fELF")
