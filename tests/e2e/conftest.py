"""bcc is not everywhere, and wants a kernel's headers: its tests are there where these are."""

from __future__ import annotations

from pathlib import Path

from bpf import bcc

_LENDABLE = any(Path("/usr/src").glob("linux-headers-*-common"))  # of another kernel

collect_ignore = [] if bcc._bcc_paths() and (_LENDABLE or not bcc.obstacle()) else ["test_bcc.py"]
