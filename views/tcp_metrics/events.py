"""Single events of connections as lines and as data, and figures as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from coral.client import Batch
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.addresses import endpoint
from coral.views.data import plain, short_name
from coral.views.errnos import errno_name
from coral.views.names import Names
from coral.views.tcp_metrics.flows import CLIENT, LISTENER, SERVER, Flow, is_bad
from coral.views.tcp_metrics.peers import peer
from coral.views.tcp_metrics.tally import event_end, event_rows
from coral.views.text import format_clock, shorten, styled, times
from coral.wire.kinds import kind_name
from coral.wire.text import safe

_WHO_WIDTH: Final = 22
_ENDS_WIDTH: Final = 41
_WIDE: Final = 120  # of a terminal; on a narrower one the local address is left out
_NARROW: Final = 80
_LEAST_WHO_WIDTH: Final = 16  # for `python3/1234567`
_PID_WIDTH: Final = 7
_SHORTEST_COMM: Final = 5  # with the slash; where there is less room, the id stands alone
_TRANSITION_WIDTH: Final = len("established → close-wait")
_PEER_WIDTHS: Final = (18, 28)  # least, most
_What = pb.TcpStateChange
_KINDS: Final = {
    _What.WHAT_RETRANSMIT_FAST: "fast recovery",
    _What.WHAT_RETRANSMIT_TIMEOUT: "timer",
    _What.WHAT_RETRANSMIT_TAIL_PROBE: "tail probe",
    _What.WHAT_RETRANSMIT_HANDSHAKE: "handshake",
}
_ARROWS: Final = {CLIENT: "→", SERVER: "←"}
_ENUMS: Final = {
    "role": pb.TcpRole.DESCRIPTOR,
    "what": pb.TcpStateChange.What.DESCRIPTOR,
    "old_state": pb.TcpState.DESCRIPTOR,
    "new_state": pb.TcpState.DESCRIPTOR,
    "end": pb.TcpEnd.DESCRIPTOR,
}


def event_line(
    event: Mapping[str, Any], names: Names | None = None, width: int | None = None
) -> str:
    """One event for people: when, whose, between which addresses, what. A terminal of WIDTH columns
    may be too narrow for both addresses: then only the peer's is shown."""
    clock = format_clock(event["time_ns"])
    pid = str(event["pid"])
    who = f"{safe(event['comm'])}/{pid}"
    texts, colour = _what(event)
    if width is None or width >= _WIDE:
        head = f"{clock}  {who:<{_WHO_WIDTH}} {_ends(event, names):<{_ENDS_WIDTH}} "
    else:
        clock = clock[: _clock_width(width)]
        who_width, peer_width = _widths(width - len(clock))
        if who_width:
            named = who_width >= len(pid) + _SHORTEST_COMM
            who = shorten(who, who_width, len(pid) + 1) if named else pid
            who = f"{who:<{who_width}} "
        else:
            who = ""
        head = f"{clock}  {who}{_peer(event, names)(peer_width):<{peer_width}} "
    what = texts[0] if width is None else _fitting(texts, max(width - len(head), 1))
    return head + (styled(what, colour, bold=colour == "red") if colour else what)


def _clock_width(width: int) -> int:
    """A narrow terminal has the time to the millisecond."""
    return len("HH:MM:SS.mmm" if width < _NARROW else "HH:MM:SS.mmmmmm")


def _widths(width: int) -> tuple[int, int]:
    """How wide the columns of the process and of the peer are, on a terminal that has WIDTH columns
    beside the clock; 0 for the process where there is no room for it."""
    least, most = _PEER_WIDTHS
    room = width - len("    ") - _TRANSITION_WIDTH  # the gaps
    who = min(room - least, _WHO_WIDTH if room >= most + _WHO_WIDTH else _LEAST_WHO_WIDTH)
    if who < _PID_WIDTH:
        return 0, min(max(room + 1, least), most)
    return who, min(max(room - who, least), most)


def _fitting(texts: Sequence[str], width: int) -> str:
    """The first of TEXTS that fits into WIDTH cells, else the last one, shortened."""
    return next((text for text in texts if len(text) <= width), shorten(texts[-1], width))


def _peer(event: Mapping[str, Any], names: Names | None) -> Callable[[int], str]:
    local, remote = event["local_port"], event["remote_port"]
    near, far = (remote, local) if event["role"] == CLIENT else (local, remote)
    return peer(Flow(event["role"], event["remote_address"], near, far), names)


def _ends(event: Mapping[str, Any], names: Names | None) -> str:
    local = endpoint(event["local_address"], event["local_port"])
    if event["role"] == LISTENER and not event["remote_port"]:
        return local
    address = event["remote_address"]
    remote = endpoint((names and names.of(address)) or address, event["remote_port"])
    return f"{local} {_ARROWS.get(event['role'], '-')} {remote}"


def _what(event: Mapping[str, Any]) -> tuple[list[str], str]:
    """What happened, from the longest text to the shortest, and in which colour."""
    what, count = event["what"], event["count"]
    many = f" {times(count)}" if count > 1 else ""
    if kind := _KINDS.get(what):
        short = f"RETRANSMIT{many}, {kind}"
        return [f"{short}, {_state(event['new_state'])}", short], "yellow"
    reason = event["reason"] and f": {event['reason']}"
    if what == _What.WHAT_RESET_SENT:
        return [f"RESET sent{many}{reason}"], "red"
    if what == _What.WHAT_RESET_RECEIVED:
        return [f"RESET received{many}"], "red"
    to = f"→ {_state(event['new_state'])}"
    change = f"{_state(event['old_state'])} {to}"
    if event["new_state"] != pb.TCP_STATE_CLOSE or event["role"] == LISTENER:
        return [change, to], ""
    error = errno_name(event["error"])
    word = event_end(event) if event["end"] else ""
    error = error if error != word else ""
    choices = (change, word, error), (change, word), (to, word), (to,)
    texts = ["  ".join(part for part in parts if part) for parts in choices]
    return texts, "red" if is_bad(word) else ""


def _state(number: int) -> str:
    """`syn-sent` and its like, as `ss` says."""
    return short_name(pb.TcpState.DESCRIPTOR, number).replace("_", "-")


def records(batch: Batch, names: Names | None = None) -> Iterator[dict[str, Any]]:
    """Each row as plain data, with the names of the .proto."""
    message = batch.message
    head = {"collector": kind_name(message.kind), "service": message.service_name}
    for event in event_rows(batch):
        data = {
            name: short_name(_ENUMS[name], value).lower() if name in _ENUMS else value
            for name, value in event.items()
        }
        yield head | data | {"error": errno_name(event["error"])} | _named(event, names)
    interval = {
        "interval_start_ns": message.interval_start_ns,
        "interval_end_ns": message.interval_end_ns,
    }
    for index, row in enumerate((*message.tcp_metrics, *message.tcp_peers)):
        data = plain(row)
        yield head | {"seq": message.first_seq + index} | interval | data | _named(data, names)


def _named(data: Mapping[str, Any], names: Names | None) -> dict[str, str]:
    return {"remote_name": names.of(data["remote_address"])} if names else {}
