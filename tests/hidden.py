"""What no program can see on some virtual machines: their kernel runs none while a thread of the
first process is the current task. Packets and timers that interrupt it reach no program, and no
figure of a program tells of them. The kernel's own trace has them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

from benchmarks.kernel import tracefs
from benchmarks.tracefs import TRACEFS

CHANGES: Final = "sock/inet_sock_set_state"
# What programs of `tcp_metrics` count, and what may come while any process is current.
OF_TCP: Final = (
    CHANGES,
    *(f"tcp/tcp_{name}" for name in ("retransmit_skb", "retransmit_synack", "receive_reset")),
)
# For tests that need each of these: one that fails, although each program runs whenever it should,
# is run again.
AGAIN_IF_HIDDEN: Final = (
    pytest.mark.usefixtures("hidden_of_tcp"),
    pytest.mark.flaky(reruns=4, only_rerun=["HiddenError"]),
)


class HiddenError(Exception):
    """A test has failed while something was hidden."""


@contextmanager
def hidden_events(events: Sequence[str], ports: Sequence[int] = ()) -> Iterator[Callable[[], int]]:
    """Inside the block, how many of these EVENTS there have been while the first process was
    current, of sockets on PORTS or of all: at most that many are missing. 0 without tracefs."""
    instance = TRACEFS / "instances" / f"coral-{os.getpid()}"
    with tracefs():
        _remove_those_of_the_dead()
        try:
            instance.mkdir()
        except OSError:
            yield lambda: 0
            return
        try:
            wanted = " || ".join(f'COMM == "{name}"' for name in _names_of_first_process())
            if ports:
                of_ports = " || ".join(f"sport == {port} || dport == {port}" for port in ports)
                wanted = f"({of_ports}) && ({wanted})"
            for event in events:
                (instance / "events" / event / "filter").write_text(wanted)
                (instance / "events" / event / "enable").write_text("1")
            yield lambda: _traced(instance)
            (instance / "events/enable").write_text("0")
        finally:
            instance.rmdir()


@contextmanager
def failing_if_hidden(hidden: Callable[[], int]) -> Iterator[None]:
    """What fails inside the block while something was HIDDEN raises `HiddenError`."""
    before = hidden()
    try:
        yield
    except Exception as error:
        if (count := hidden() - before) > 0:
            raise HiddenError(f"{count} events while process 1 was current") from error
        raise


def _remove_those_of_the_dead() -> None:
    for instance in (TRACEFS / "instances").glob("coral-*"):
        if not Path("/proc", instance.name.removeprefix("coral-")).exists():
            with suppress(OSError):  # another test is quicker
                instance.rmdir()


def _names_of_first_process() -> set[str]:
    """The names of its threads. Another process may have the same name: its changes count too."""
    names = set()
    for comm in Path("/proc/1/task").glob("*/comm"):
        with suppress(OSError):  # it has ended
            names.add(comm.read_text().rstrip("\n"))
    return names


def _traced(instance: Path) -> int:
    """The events so far, those included that others have overwritten."""
    stats = "".join(path.read_text() for path in instance.glob("per_cpu/cpu*/stats"))
    return sum(map(int, re.findall(r"^(?:entries|overrun): (\d+)", stats, re.MULTILINE)))
