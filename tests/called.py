"""tests/programs/called.c, running."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

FUNCTION: Final = "called_function"


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
