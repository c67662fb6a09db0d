"""A tap of some puppets in a pipe, and the tables that it prints."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from tests.support import Puppet, RunningAgent, collectors_at_work, coral, wait_until

START_S: Final = 30.0  # of a first session, on a busy machine


class Tap:
    """A tap of some puppets in a pipe."""

    def __init__(
        self, kind: str, agent: RunningAgent, puppets: Sequence[Puppet], *arguments: str
    ) -> None:
        pids = ",".join(str(puppet.pid) for puppet in puppets)
        self._process = subprocess.Popen(
            coral("tap", "--agent", agent.address, kind, f"pid:{pids}", *arguments),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        wait_until(
            lambda: any(it.subscribers for it in collectors_at_work(agent).values()), START_S
        )

    def until(self, text: str) -> str:
        """Reads until a line has that in it; returns the line."""
        assert self._process.stdout
        line = next((line for line in self._process.stdout if text in line), "")
        assert line, f"no line with {text}"
        return line

    def finish(self) -> str:
        """Ctrl-C; what it has printed since."""
        self._process.send_signal(signal.SIGINT)
        out, err = self._process.communicate(timeout=60)
        assert (self._process.returncode, err) == (128 + signal.SIGINT, "")
        assert "\x1b" not in out
        return out

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def tapped(
    kind: str, agent: RunningAgent, *puppets: Puppet, arguments: Sequence[str] = ()
) -> Iterator[Tap]:
    """A tap of KIND, such as `--tcp-metrics`, for the duration of the block."""
    tap = Tap(kind, agent, puppets, *arguments)
    try:
        yield tap
    finally:
        tap.kill()


def sheet(out: str, *header: str) -> Mapping[str, Sequence[str]]:
    """The last table whose columns begin with HEADER: by its first column, the others."""
    lines = out.splitlines()
    (*_, at) = (i for i, line in enumerate(lines) if columns(line)[: len(header)] == [*header])
    rows = {}
    for line in lines[at + 1 :]:
        if not line:
            break
        first, *others = columns(line)
        rows[first] = others
    return rows


def columns(line: str) -> list[str]:
    """The cells of a line of a table."""
    return re.split(" {2,}", line.strip())
