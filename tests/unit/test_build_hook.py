"""The build, where something that it needs is missing."""

from __future__ import annotations

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
