"""Single requests as lines and as data, and figures as data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from coral.client import Batch, Buckets
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.views.addresses import endpoint
from coral.views.data import event_rows, plain, short_name
from coral.views.http_latency.tally import TEXTS, of_row
from coral.views.http_latency.words import (
    is_error,
    is_refusal,
    method_word,
    outcome_word,
    process,
    request,
    status_word,
)
from coral.views.pictures import QUANTILES
from coral.views.text import format_amount, format_clock, format_ns, padded, shorten, styled
from coral.wire.kinds import kind_name
from coral.wire.text import safe

_NARROW: Final = 80  # terminals that are narrower have the time to the millisecond
_MILLISECONDS: Final = len("HH:MM:SS.mmm")
_GAP: Final = 2
_STATUS_WIDTH: Final = 3
_TIME_WIDTH: Final = 7
_NOTE_WIDTH: Final = len("upgraded")  # the least room for how a request ended
_WHO_WIDTH: Final = 17  # for `python3/1234567`, or `ABORTED by client` in its place
_PEER_WIDTH: Final = 21  # for IPv4 with a port
_BYTES_WIDTH: Final = 13
_REQUEST_WIDTH: Final = 21  # the least; and the least of all, on a terminal of a few columns:
_SHORTEST_REQUEST: Final = 8
_WIDE_REQUEST: Final = 44  # in a pipe, where a longer path is not cut
_PIPE_WHO_WIDTH: Final = 22
_NO_LIMIT: Final = 1 << 16
# What a wider terminal shows besides, the most important first, and in how many more cells.
_MORE: Final = (
    ("who", _WHO_WIDTH - _NOTE_WIDTH),
    ("first_byte", _TIME_WIDTH + _GAP),
    ("request", 10),
    ("peer", _PEER_WIDTH + _GAP),
    ("request", 8),
    ("bytes", _BYTES_WIDTH + _GAP),
    ("request", 24),
)


@dataclass(frozen=True)
class _Layout:
    """What a line has besides time, status and duration; `request` is a number of cells, and
    `tail` that of all that comes after the duration."""

    request: int
    tail: int
    shown: frozenset[str] = frozenset()


@lru_cache
def _layout(room: int) -> _Layout:
    """How to use ROOM cells."""
    wide, tail = _REQUEST_WIDTH, _NOTE_WIDTH + _GAP
    left = room - wide - tail
    if left < 0:
        wide = max(room - tail, min(room, _SHORTEST_REQUEST), 1)
        return _Layout(wide, max(room - wide, 0))
    shown = set()
    for name, cells in _MORE:
        if name == "request":
            wide += min(cells, left)
            left -= min(cells, left)
            continue
        if cells > left:
            wide += left
            break
        shown.add(name)
        left -= cells
        tail += cells if name != "first_byte" else 0
    return _Layout(wide, tail, frozenset(shown))


def event_lines(batch: Batch, width: int | None = None) -> Iterator[str]:
    """A line for each single request, of WIDTH columns at most."""
    for event in event_rows(batch, *TEXTS):
        yield event_line(event, width)


def event_line(event: Mapping[str, Any], width: int | None = None) -> str:
    """One request for people: when it began, which it is, its status, the times to the first and
    the last byte of the response, bytes of both bodies, process, peer; last how it ended, if it is
    not complete. On a terminal, what does not fit is left out."""
    clock = format_clock(event["time_ns"])
    if width is not None and width < _NARROW:
        clock = clock[:_MILLISECONDS]
    called = request(event["role"], event["method"], safe(event["path"]))
    status, total = _status(event), _total(event)
    if width is None:
        text = called(_NO_LIMIT)
        middle = f"{padded(text, _WIDE_REQUEST)}  {status}  {_first_byte(event)}  {total}"
        who = process(event["comm"], event["pid"])(_NO_LIMIT)
        tail = f"{_bytes(event)}  {padded(who, _PIPE_WHO_WIDTH)}  {_peer(event)}"
        note = _coloured(outcome_word(event["outcome"]), event)
        return f"{clock}  {middle}  {tail}  {note}".rstrip()
    layout = _layout(width - len(clock) - _STATUS_WIDTH - _TIME_WIDTH - 3 * _GAP)
    first = f"{_first_byte(event)}  " if "first_byte" in layout.shown else ""
    middle = f"{padded(called(layout.request), layout.request)}  {status}  {first}{total}"
    return f"{clock}  {middle}{_tail(event, layout)}".rstrip()


def _tail(event: Mapping[str, Any], layout: _Layout) -> str:
    """What stands behind the times. How the request ended takes the place of other things where
    there is no room for both."""
    note = outcome_word(event["outcome"])
    shown = [name for name in ("bytes", "who", "peer") if name in layout.shown]
    widths = {"bytes": _BYTES_WIDTH, "who": _WHO_WIDTH, "peer": _PEER_WIDTH}
    room = layout.tail - _GAP
    for name in ("bytes", "peer", "who"):
        used = sum(widths[each] + _GAP for each in shown)
        if note and name in shown and used + len(note) > room:
            shown.remove(name)
    used = sum(widths[each] + _GAP for each in shown)
    who = process(event["comm"], event["pid"])(_WHO_WIDTH)
    texts = {"bytes": _bytes(event), "who": who, "peer": _short_peer(event)}
    parts = [padded(texts[name], widths[name]) for name in shown]
    if note:
        parts.append(_coloured(shorten(note, max(room - used, 0)), event))
    return "".join(f"  {part}" for part in parts)


def _status(event: Mapping[str, Any]) -> str:
    return _coloured(f"{status_word(event['status']):<{_STATUS_WIDTH}}", event)


def _coloured(text: str, event: Mapping[str, Any]) -> str:
    """TEXT in red where something went wrong, in yellow where the client was refused."""
    aborted = outcome_word(event["outcome"]).startswith("ABORTED")
    if not text.strip():
        return text
    if is_error(event["status"], event["outcome"]) or aborted:
        return styled(text, "red", bold=True)
    return styled(text, "yellow") if is_refusal(event["status"]) else text


def _first_byte(event: Mapping[str, Any]) -> str:
    return _time(event["first_byte_ns"]) if event["status"] else " " * _TIME_WIDTH


def _total(event: Mapping[str, Any]) -> str:
    if event["outcome"] == pb.HTTP_OUTCOME_IN_PROGRESS:
        return " " * _TIME_WIDTH
    return _time(event["duration_ns"])


def _time(ns: int) -> str:
    return f"{format_ns(ns):>{_TIME_WIDTH}}"


def _bytes(event: Mapping[str, Any]) -> str:
    """Bytes of the bodies of the request and of the response: `345B/1.20kB`."""
    sizes = (event["request_body_bytes"], event["response_body_bytes"])
    text = "/".join(f"{format_amount(size)}B" for size in sizes)
    return f"{text:>{_BYTES_WIDTH}}"


def _peer(event: Mapping[str, Any]) -> str:
    """With TLS where there is any; without an address where it is not known which socket carries
    the request."""
    port = event["remote_port"]
    known = [endpoint(event["remote_address"], port)] if port else []
    return " ".join([*known, *["TLS"] * bool(event["tls"])])


def _short_peer(event: Mapping[str, Any]) -> str:
    """Without the beginning of a long address."""
    peer = _peer(event)
    return shorten(peer, _PEER_WIDTH, _PEER_WIDTH - 1)


def records(batch: Batch) -> Iterator[dict[str, Any]]:
    """Each row as plain data, with the names of the .proto."""
    message = batch.message
    head = {"collector": kind_name(message.kind), "service": message.service_name}
    for event in event_rows(batch, *TEXTS):
        yield head | event | _words(event)
    interval = {
        "interval_start_ns": message.interval_start_ns,
        "interval_end_ns": message.interval_end_ns,
    }
    for index, row in enumerate(message.http_latency):
        data = plain(row)
        del data["labels"]  # the same as other fields, as text
        requests = of_row(row)
        quantiles = _quantiles("", requests.total) | _quantiles("first_byte_", requests.first_byte)
        yield head | {"seq": message.first_seq + index} | interval | data | _words(data) | quantiles


def _words(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of DATA that are words, or yes or no."""
    version = f"1.{data['version']}" if data["method"] not in ("unspecified", 0) else ""
    words: dict[str, Any] = {"version": version}
    words |= {name: bool(data[name]) for name in ("tls", "failed") if name in data}
    for name, enum in (("role", pb.HttpRole), ("outcome", pb.HttpOutcome)):
        if isinstance(data.get(name), int):
            words[name] = short_name(enum.DESCRIPTOR, data[name])
    method = data["method"]
    if isinstance(method, str):
        method = pb.HttpMethod.Value(f"HTTP_METHOD_{method.upper()}")
    return words | {"method": method_word(method)}


def _quantiles(prefix: str, buckets: Buckets) -> dict[str, float | None]:
    """Quantiles in ms, which is the unit of the rows."""
    return {
        f"{prefix}p{q * 100:g}": round(buckets.quantile(q) / 1e6, 6) if buckets.count else None
        for q in QUANTILES
    }
