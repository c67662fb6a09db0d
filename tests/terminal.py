"""A terminal for a command, and the text that the command has drawn on it."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence
from select import select
from typing import Final, Self

from tests.support import wait_until

_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_LOCAL: Final = 3  # of what tcgetattr returns: the local modes


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command: Sequence[str], lines: int = 30, columns: int = 120) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        # The echo of a key could stand in the midst of a line, or of an escape sequence.
        attributes = termios.tcgetattr(slave)
        attributes[_LOCAL] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        environment = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            env=environment,
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        self.output = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def has_drawn(self, *texts: str) -> bool:
        """Reads new output; whether the output so far contains all of TEXTS."""
        while select([self._master], [], [], 0)[0]:
            try:
                self.output += self._decoder.decode(os.read(self._master, 1 << 16))
            except OSError:  # no process has it open any more
                break
        return all(text in self.text for text in texts)

    @property
    def text(self) -> str:
        """All output so far, without escape sequences."""
        return _ESCAPES.sub("", self.output)

    def press(self, key: str) -> None:
        """Types KEY, which is not echoed."""
        os.write(self._master, key.encode())

    def finish(self) -> int:
        """Waits for the command to end; returns its exit status."""
        wait_until(lambda: self.has_drawn() and self.process.poll() is not None)
        self.has_drawn()
        return self.process.returncode
