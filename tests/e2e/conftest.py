"""bcc is not everywhere, and wants a kernel's headers: some tests are there where these are. The
matrix of kernels, which brings both, runs all that bcc compiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from coral import bpf

_LENDABLE = any(Path("/usr/src").glob("linux-headers-*-common"))  # of another kernel


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    bcc = bpf.probe()["bcc"]
    if bcc.available or (_LENDABLE and "not installed" not in bcc.reason):
        return
    left_out = [item for item in items if item.get_closest_marker("needs_bcc")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
