"""The README's example program runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.support import ROOT, Calls

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_the_library_example_watches_prints_and_stops(calls: Callable[..., Calls]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    running = calls("getppid", 100_000_000)
    running.go()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-P", "-c", example.replace("1234", str(running.pid))],
        capture_output=True, text=True, cwd=ROOT, timeout=30, check=True,
    )  # fmt: skip
    capabilities, *frames = [line for line in done.stdout.splitlines() if "session" not in line]
    assert "'syscall_stats': Support(supported=True, hook='tp_btf'" in capabilities
    assert len(frames) == 3
    assert all(frame.startswith("[('getppid', ") for frame in frames)
