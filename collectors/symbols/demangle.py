"""Names as programmers wrote them, from those that compilers of C++, Rust and Swift give symbols.

A library does it, which was not written for hostile names: 250 bytes of C++ stand for a name of
500 MB, and deep ones overflow its stack. So it runs in a process of its own, with little memory and
no rights, and what ends that process stays as it was.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

_log: Final = logging.getLogger(__name__)

LONGEST_BYTES: Final = 2048
"""Longer ones stay as they are."""

_MANGLED: Final = re.compile(rb"_{1,4}Z[A-Za-z0-9_.$]+|_R[A-Za-z0-9_.$]+|_?\$[sS][A-Za-z0-9_]+")
_HASH: Final = re.compile(r"::h[0-9a-f]{16}(?=$| |\.)")
_BATCH_NAMES: Final = 31  # of the longest, these fit into a pipe: writing never waits
_MOST_DEATHS: Final = 16
_ANSWER_S: Final = 1.0
_FIRST_ANSWER_S: Final = 10.0
_LARGEST_ANSWER_BYTES: Final = 1 << 20
_LIBRARY: Final = "pydemumble"
# The process: a name a line, and when an empty line comes, for each one the answer, cut to 1024
# letters; empty for none.
_PROGRAM: Final = f"""
import os, resource, sys
from {_LIBRARY} import demangle
for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
    resource.setrlimit(limit, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (128 << 20, 128 << 20))
try:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
except OSError:
    pass
out = sys.stdout.buffer
for line in sys.stdin.buffer:
    if line == b"\\n":
        out.flush()
        continue
    try:
        found = demangle(line[:-1].decode("ascii"))[:1024]
    except (MemoryError, ValueError):
        found = ""
    out.write(found.encode("utf-8", "replace").replace(b"\\n", b" ") + b"\\n")
"""


class Demangler:
    """Demangles names in a process that starts with the first one. `why_not` says why names stay
    as they are, if they do; `refused` counts those that ended the process. Not safe to use from two
    threads at once."""

    def __init__(self) -> None:
        self.why_not = ""
        self.refused = 0
        self._process: subprocess.Popen[bytes] | None = None
        if importlib.util.find_spec(_LIBRARY) is None:
            self.why_not = f"names of C++, Rust and Swift stay mangled: {_LIBRARY} is not installed"

    def demangled(self, names: Sequence[bytes]) -> list[str]:
        """NAMES, each demangled, or as it is if it is not mangled or cannot be demangled. Never
        raises; 10 µs a name, and 50 ms for the first one."""
        found = [name.decode(errors="replace") for name in names]
        wanted = [
            (number, name)
            for number, name in enumerate(names)
            if len(name) <= LONGEST_BYTES and _MANGLED.fullmatch(name)
        ]
        for first in range(0, len(wanted), _BATCH_NAMES):
            batch = wanted[first : first + _BATCH_NAMES]
            answers = self._ask([name for _, name in batch])
            if len(answers) < len(batch):  # one of them ended it
                answers = [self._alone(name) for _, name in batch]
            for (number, _), answer in zip(batch, answers, strict=True):
                if answer:
                    found[number] = _HASH.sub("", answer)
        return found

    def _alone(self, name: bytes) -> str:
        answers = self._ask([name])
        if answers or self.why_not:
            return "".join(answers)
        self._died()
        return ""

    def _ask(self, names: Sequence[bytes]) -> list[str]:
        """The answers for NAMES, fewer if the process ended or does not answer."""
        wait_s = _ANSWER_S if self._process else _FIRST_ANSWER_S
        process = None if self.why_not else self._process or self._start()
        if process is None:
            return []
        assert process.stdin  # noqa: S101
        assert process.stdout  # noqa: S101
        answer = b""
        try:
            process.stdin.write(b"".join(name + b"\n" for name in (*names, b"")))
            process.stdin.flush()
            poll = select.poll()  # descriptors may be above 1023
            poll.register(process.stdout, select.POLLIN)
            while answer.count(b"\n") < len(names) and len(answer) < _LARGEST_ANSWER_BYTES:
                if not poll.poll(wait_s * 1000):
                    break
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                if not chunk:
                    break
                answer += chunk
        except OSError:
            pass
        if answer.count(b"\n") < len(names):
            self.close()
        return [line.decode(errors="replace") for line in answer.split(b"\n")[:-1][: len(names)]]

    def _start(self) -> subprocess.Popen[bytes] | None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the agent
                cwd="/",
                env={},
            )
        except OSError as error:
            self.why_not = f"names of C++, Rust and Swift stay mangled: {error}"
        return self._process

    def _died(self) -> None:
        self.refused += 1
        self.close()
        if self.refused >= _MOST_DEATHS:
            self.why_not = (
                f"names of C++, Rust and Swift stay mangled: {self.refused} of them have ended the "
                "process that demangles"
            )
            _log.warning(self.why_not)

    def close(self) -> None:
        """Ends the process. Safe to call twice; it starts again when needed."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                with suppress(OSError):
                    pipe.close()
        process.wait()
