"""Agents, sessions and accounts: the colony's own books."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from coral.views.answers.contract import BAD, WARNING, AnswerView, Row, Shown, count_text
from coral.views.sheet import Column, Sheet
from coral.views.text import format_age

_SESSIONS: Final = (
    Column("AGENT", right=False, fits=True, room=10),
    Column("KIND", right=False),
    Column("SERVICE", right=False, fits=True, room=12, spare=1),
    Column("BEGAN", spare=2),
    Column("ENDED", right=False, fits=True, room=8, spare=3),
    Column("EVENTS"),
    Column("LOST"),
    Column("SESSION", right=False, spare=4, below=True),
)
_ACCOUNTS: Final = (
    Column("AGENT", right=False, fits=True, room=10),
    Column("KIND", right=False),
    Column("SERVICE", right=False, fits=True, room=10, spare=2),
    Column("PRODUCED"),
    Column("STORED"),
    Column("LOST"),
    Column("UNDER WAY", spare=1),
    Column("UNEXPLAINED", spare=3, optional=True),
    Column("AT", right=False, wraps=True, room=16, spare=4, below=True),
)
_AGENTS: Final = (
    Column("AGENT", right=False, fits=True, room=12),
    Column("ADDRESS", right=False, fits=True, room=12, spare=4),
    Column("THERE", right=False),
    Column("HEARD", spare=1),
    Column("SESSIONS", spare=3),
    Column("STORED", spare=5),
    Column("LOST", spare=2),
    Column("AWAY", spare=6, optional=True),
    Column("VERSION", right=False, spare=8),
    Column("KERNEL", right=False, spare=9),
    Column("WHY", right=False, wraps=True, room=20, spare=7, below=True, optional=True),
)


def sessions(shown: Shown) -> Iterator[Sheet]:
    """Sessions, those at work first."""
    sheet = Sheet(_SESSIONS)
    for row in shown.rows:
        sheet.add(
            row["agent"],
            row["kind"],
            row["service"] or "-",
            _ago(shown, row["started_ns"]),
            _ended(row, shown),
            count_text(row["produced"]),
            _lost(row),
            row["session"],
        )
    yield sheet


def accounts(shown: Shown) -> Iterator[Sheet | str]:
    """Where every event is."""
    sheet = Sheet(_ACCOUNTS)
    for row in shown.rows:
        unexplained = row["unexplained"]
        sheet.add(
            row["agent"],
            row["kind"],
            row["service"] or "-",
            count_text(row["produced"]),
            count_text(row["stored"]),
            _lost(row),
            count_text(row["not_arrived"]) if row["not_arrived"] else "",
            (count_text(unexplained), BAD) if unexplained else "",
            _stages(row),
        )
    yield sheet
    sums = {
        name: sum(row[name] for row in shown.rows)
        for name in ("produced", "stored", "lost", "not_arrived", "unexplained")
    }
    way = f" + {sums['not_arrived']:,} under way" if sums["not_arrived"] else ""
    bad = f", {sums['unexplained']:,} UNEXPLAINED" if sums["unexplained"] else ""
    yield ""
    produced, stored, lost = (f"{sums[name]:,}" for name in ("produced", "stored", "lost"))
    yield f"{produced} produced = {stored} stored + {lost} lost{way}{bad}"


def agents(shown: Shown) -> Iterator[Sheet]:
    """Agents, those that cannot be reached first."""
    sheet = Sheet(_AGENTS)
    for row in shown.rows:
        there = bool(row["connected"])
        sheet.add(
            row["agent"] or "-",
            row["address"] or "",
            ("yes", "green") if there else ("no", "red"),
            _ago(shown, row["last_seen_ns"]),
            count_text(row["sessions"]),
            count_text(row["stored"]),
            _lost(row),
            (format_age(row["away_ns"]), WARNING) if row["away_ns"] else "",
            row["version"] or "",
            row["kernel"] or "",
            "" if there else row["detail"] or "",
        )
    yield sheet


def _ended(row: Row, shown: Shown) -> tuple[str, str]:
    if not row["ended"]:
        return "at work", "green"
    ago = _ago(shown, row["ended_ns"])
    style = BAD if row["ended"] in ("failed", "preempted", "agent_lost") else "dim"
    return f"{row['ended'].replace('_', ' ')} {ago}", style


def _lost(row: Row) -> tuple[str, str]:
    return (count_text(row["lost"]), BAD) if row["lost"] else ("0", "dim")


def _stages(row: Row) -> str:
    """Where events were lost; in the kernel those without a number, too."""
    lost = json.loads(row["lost_by_stage"] or "{}")
    kernel = json.loads(row["lost_in_kernel"] or "{}")
    parts = [f"{count:,} {stage}" for stage, count in lost.items()]
    parts += [f"{count:,} {stage} (in the kernel)" for stage, count in kernel.items()]
    return ", ".join(parts)


def _ago(shown: Shown, time_ns: int | None) -> str:
    if not time_ns:
        return ""
    return f"{format_age(max(shown.now_ns - time_ns, 0))} ago"


SESSIONS: Final = AnswerView(sessions, "no session was at work in this time")
ACCOUNTS: Final = AnswerView(accounts, "no session was at work in this time")
AGENTS: Final = AnswerView(agents, "no agent is known")
