"""What an agent says of itself and of its sessions, kept within bounds: the colony has it in memory
and in its books, for every session of every agent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Final

from coral.client import ContractError
from coral.wire.text import is_printable

_MOST_ID: Final = 256
_MOST_TEXT: Final = 1024
_MOST_TEXTS: Final = 64
_MOST_TIME_NS: Final = 1 << 62
_NS_PER_DAY: Final = 86_400 * 10**9
_MOST_AHEAD_NS: Final = _NS_PER_DAY
_MOST_BEHIND_NS: Final = 366 * _NS_PER_DAY
OTHER: Final = "other"
"""All stages that the contract has no name for."""


def checked_id(text: str, whose: str) -> str:
    """TEXT, the id of an agent or of a session: WHOSE. Raises `ContractError` for what is no id."""
    if not text or len(text) > _MOST_ID or not is_printable(text):
        raise ContractError(f"the agent says that {whose} is {text[:_MOST_ID]!r}")
    return text


def short(text: str) -> str:
    """TEXT, cut off where it is too long."""
    return text[:_MOST_TEXT]


def few(texts: Mapping[str, str]) -> dict[str, str]:
    """The first of TEXTS, by name, each cut off where it is too long."""
    return {short(name): short(text) for name, text in islice(texts.items(), _MOST_TEXTS)}


def by_named_stage(counts: Mapping[str, int]) -> dict[str, int]:
    """COUNTS by stage, those of stages without a name as one: there can be any number of them."""
    found: Counter[str] = Counter()
    for stage, count in counts.items():
        found[stage if stage.isidentifier() else OTHER] += count
    return dict(found)


def started(time_ns: int | None) -> int:
    """When a session began, in Unix time; 0 where that is not known, or cannot be."""
    return time_ns if time_ns and 0 < time_ns < _MOST_TIME_NS else 0


def heard(time_ns: int, now_ns: int) -> int:
    """TIME_NS by an agent's clock; NOW_NS where there is none, or the clock is wrong by a day ahead
    or by a year behind."""
    is_right = now_ns - _MOST_BEHIND_NS <= time_ns <= now_ns + _MOST_AHEAD_NS
    return time_ns if is_right else now_ns
