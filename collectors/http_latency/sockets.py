"""Where the programs meet the sockets that processes use: the ladder of `http_latency` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from coral.bpf import Features, Step

# The programs of each way, best first: in the sockets themselves, or where system calls return.
PROGRAMS: Final[Mapping[str, Sequence[str]]] = {
    "socket_hooks": ("coral_received", "coral_sent"),
    "system_calls": ("coral_left",),
}
_SOCKET_HOOKS, _SYSTEM_CALLS = PROGRAMS
_LOOPS: Final = "loops"  # with which the programs read as many bytes as there are


def sockets(features: Features) -> Step:
    """The way on this kernel; none where programs cannot loop."""
    what = "sockets"
    if not (loops := features[_LOOPS]).available:
        return Step(what, "", (loops,))
    if not (hooks := features[_SOCKET_HOOKS]).available:
        return Step(what, _SYSTEM_CALLS, (hooks,))
    return Step(what, _SOCKET_HOOKS)
