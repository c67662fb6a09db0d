"""Requests that cannot be answered, in words for people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Final

_MOST_NAMED: Final = 3
_MOST_LISTED: Final = 400  # characters of a list of all names that there are
_MOST_TEXT: Final = 256  # characters of a name that is looked for among those that there are
_MOST_KNOWN: Final = 5000  # names that are looked at: of services, agents decide how many there are


class RefusedError(Exception):
    """The request is wrong: it names what is not there, or is out of range."""


class NotFoundError(RefusedError):
    """The request names a service, an agent or a query that the colony does not know."""


class BusyError(RefusedError):
    """Too many requests of this kind are under way, or one took more than it may."""


def unknown(what: str, name: str, known: Iterable[str]) -> NotFoundError:
    """NAME is no WHAT: names the nearest of those that are, or all of them if these are few."""
    known = sorted(set(known))
    near = nearest(name, known)
    if near:
        hint = f"; did you mean {_listed(near)}?"
    elif known and sum(map(len, known)) + 2 * len(known) <= _MOST_LISTED:
        hint = f"; there {'is' if len(known) == 1 else 'are'} {', '.join(known)}"
    else:
        hint = ""
    return NotFoundError(f"no such {what}: {shortened(name)!r}{hint}")


def shortened(text: str) -> str:
    """TEXT, which a caller gave, as far as a refusal shows it."""
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Those of KNOWN that NAME may stand for, the nearest first; none where to look for them would
    take long."""
    if len(name) > _MOST_TEXT or len(known) > _MOST_KNOWN:
        return []
    lower = {each.lower(): each for each in reversed(known)}
    found = difflib.get_close_matches(name.lower(), lower, _MOST_NAMED, 0.6)
    within = [each for each in lower if name and name.lower() in each and each not in found]
    return [lower[each] for each in (*found, *within)][:_MOST_NAMED]


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
