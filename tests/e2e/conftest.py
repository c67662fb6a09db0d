"""Some tests need bcc and the headers of a kernel, and are deselected without them. The matrix of
kernels installs both, and runs every test of programs that bcc compiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from coral import bpf

_LENDABLE = any(Path("/usr/src").glob("linux-headers-*-common"))  # those of any kernel


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    bcc = bpf.probe()["bcc"]
    if bcc.available or (_LENDABLE and "not installed" not in bcc.reason):
        return
    left_out = [item for item in items if item.get_closest_marker("needs_bcc")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
