"""TCP by peer, those with most bytes first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from coral.views.addresses import endpoint
from coral.views.answers.contract import (
    BAD,
    WARNING,
    AnswerView,
    Row,
    Shown,
    bytes_text,
    change,
    count_text,
    leading,
    time_cell,
    verdict_cell,
)
from coral.views.sheet import Column, Content, Sheet, bytes_cell
from coral.views.text import fitting, format_ns, format_share, shorten, times

_PARTS: Final = ("role", "remote_address", "port")
_SUBJECT: Final = Column("PEER", right=False, fits=True, room=18, comfort=28)
_US: Final = 1000


def sheets(shown: Shown) -> Iterator[Sheet]:
    """One table."""
    yield _compared(shown) if shown.compared else _table(shown)


def _table(shown: Shown) -> Sheet:
    lead = leading(shown, _PARTS, _SUBJECT)
    sheet = Sheet(
        (
            *lead.columns,
            Column("OPENED", spare=4),
            Column("FAILED"),
            Column("OUT"),
            Column("IN"),
            Column("RTT P50", spare=3),
            Column("RTT P99", spare=2),
            Column("CONNECT P50", spare=6),
            Column("RESENT", spare=1),
            Column("ENDED BADLY", right=False, fits=True, room=12, spare=5, optional=True),
        )
    )
    for row in shown.rows:
        style = BAD if row["failed"] or row["listen_drops"] else ""
        sheet.add(
            *lead.cells(row, (_peer_cell(row), style)),
            count_text(row["opened"]),
            (count_text(row["failed"]), BAD if row["failed"] else "dim"),
            bytes_cell(row["bytes_sent"]),
            bytes_cell(row["bytes_received"]),
            time_cell(row["rtt_p50_us"], _US),
            time_cell(row["rtt_p99_us"], _US),
            time_cell(row["connect_p50_us"], _US),
            (_resent(row), WARNING if row["retransmits"] else "dim"),
            (fitting(_troubles(row)), BAD),
        )
    return sheet


def _compared(shown: Shown) -> Sheet:
    lead = leading(shown, _PARTS, _SUBJECT)
    sheet = Sheet(
        (
            *lead.columns,
            Column("NOW", right=False),
            Column("OPENED", spare=4),
            Column("FAILED", spare=2),
            Column("OUT", spare=3),
            Column("RETRANS", spare=1),
            Column("RTT P99"),
        )
    )
    for row in shown.rows:
        sheet.add(
            *lead.cells(row, (_peer_cell(row), "")),
            verdict_cell(row),
            change(row, "opened", count_text),
            change(row, "failed", count_text),
            change(row, "bytes_sent", bytes_text),
            change(row, "retransmits", count_text),
            change(row, "rtt_p99_us", lambda us: format_ns(us * _US)),
        )
    return sheet


def _peer_cell(row: Row) -> Content:
    text = _peer(row)
    return lambda width: shorten(text, width, width // 2)


def _peer(row: Row) -> str:
    """`→ 10.0.0.7:5432` of a client, `:8080 ← 10.0.0.7` of a server, of those parts that the answer
    has."""
    address, port = row.get("remote_address") or "", row.get("port")
    role = row.get("role") or ""
    if role == "listener":
        return f"listener :{port}"
    if role == "server":
        return f":{port if port is not None else '*'} ← {address or '*'}"
    there = endpoint(address or "*", port) if port else address or "*"
    return f"→ {there}" if role == "client" else there


def _resent(row: Row) -> str:
    sent = row["segments_sent"]
    return format_share(row["retransmits"] / sent) if sent else "0%"


def _troubles(row: Row) -> list[str]:
    named = (
        ("REFUSED", "refused"),
        ("TIMEOUT", "timeouts"),
        ("RESET", "resets"),
        ("DROPPED", "listen_drops"),
    )
    return [f"{word} {times(row[name])}" for word, name in named if row[name]]


VIEW: Final = AnswerView(sheets, "no connections")
