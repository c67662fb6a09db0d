"""For the tests of attaching: toys of tests/bpf loaded, and a program that calls one function."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from coral.bpf import BpfObject

_BTF: Final = Path("/sys/kernel/btf/vmlinux")

FUNCTION: Final = "called_function"


def toy(path: Path, *programs: str, **options: object) -> BpfObject:
    """An object with PROGRAMS to be loaded; by bcc where the kernel has no BTF."""
    loader = "core" if _BTF.exists() else "bcc"
    return BpfObject(path, programs=(), walks=programs, options=options, loader=loader)


class Called:
    """A program that calls FUNCTION as often as its command says, waiting to be let go."""

    def __init__(self, *command: str | Path) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid

    def finish(self) -> int:
        """Lets it call its function; the sum of the results, as it prints it."""
        out, _ = self._process.communicate("x")
        assert self._process.returncode == 0
        return int(out)

    def kill(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.communicate()
