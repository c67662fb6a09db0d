"""The views of all queries, by their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from coral.views.answers import anything, books, http, profile, services, syscalls, tcp
from coral.views.answers.contract import AnswerView

ANSWER_VIEWS: Final[Mapping[str, AnswerView]] = {
    "http": http.VIEW,
    "syscalls": syscalls.VIEW,
    "tcp": tcp.VIEW,
    "profile": profile.VIEW,
    "services": services.VIEW,
    "sessions": books.SESSIONS,
    "accounts": books.ACCOUNTS,
    "agents": books.AGENTS,
    "sql": anything.VIEW,
}
