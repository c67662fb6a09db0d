"""The process that `coral doctor` has its collectors watch."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from types import TracebackType
from typing import Final, Self

from coral.views.contract import Provocation

# Prints a line when it is ready, runs its code after it has read one, and then waits for its end.
_PATIENT: Final = """
import os, sys
print(flush=True)
sys.stdin.readline()
{code}
sys.stdin.readline()
"""
# For a collector without a provocation: only its start and stop can be checked.
UNKNOWN: Final = Provocation("events", 0, "", lambda _: 0)


class Patient:
    """A process that runs the given Python code when `begin` is called, and that lives until the
    block is left."""

    def __init__(self, code: str) -> None:
        self._code = _PATIENT.format(code=code)

    async def __aenter__(self) -> Self:
        self._process: Process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", self._code),
            stdin=PIPE,
            stdout=PIPE,
            process_group=0,  # Ctrl-C is for the doctor
        )
        assert self._process.stdin  # noqa: S101  they were asked for
        assert self._process.stdout  # noqa: S101
        self._stdin = self._process.stdin
        try:
            await self._process.stdout.readline()
        except asyncio.CancelledError:
            self._process.kill()
            raise
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        await self._process.communicate()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def begin(self) -> None:
        """Lets it run its code."""
        self._stdin.write(b"\n")
