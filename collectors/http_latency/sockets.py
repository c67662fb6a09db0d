"""Where the programs meet the sockets that processes use: the ladder of `http_latency` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from coral.bpf import Feature, Features, Rung, Step

# The programs of each way, best first: in the sockets themselves, or where system calls return.
PROGRAMS: Final[Mapping[str, Sequence[str]]] = {
    "socket_hooks": ("coral_received", "coral_sent"),
    "system_calls": ("coral_left",),
}
_SOCKET_HOOKS, _SYSTEM_CALLS = PROGRAMS
_LOOPS: Final = "loops"
_NO_BTF: Final = "it needs BTF, which programs compiled by bcc lack"


def sockets(features: Features, rung: Rung) -> Step:
    """The way on this kernel; none without programs that read as many bytes as there are."""
    what = "sockets"
    loops = features[_LOOPS]
    if rung.loader.taken != "core":
        loops = Feature(_LOOPS, False, _NO_BTF)
    if not loops.available:
        return Step(what, "", (loops,))
    hooks = features[_SOCKET_HOOKS]
    if hooks.available:
        return Step(what, _SOCKET_HOOKS)
    return Step(what, _SYSTEM_CALLS, (hooks,))
