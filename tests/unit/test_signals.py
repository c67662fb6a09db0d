"""A signal ends a command in order, even while a library calls back."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import ctypes, os, signal, time
from coral.cli.signals import exiting

calls = 0

@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
def compare(_left, _right):
    global calls
    calls += 1
    if calls == 50:
        os.kill(os.getpid(), signal.SIGTERM)
    return 0

with exiting():
    try:
        ctypes.CDLL(None).qsort((ctypes.c_int * 1000)(), 1000, ctypes.sizeof(ctypes.c_int), compare)
        signal.pause()
    finally:
        print("cleaned up")
"""


def test_a_signal_within_a_callback_still_ends_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "")
