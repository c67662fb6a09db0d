"""Routes of paths: `/users/42/orders/9f1c2b…` belongs to `/users/{id}/orders/{hash}`.

A pattern that the user gave comes first. Otherwise each segment that looks like a number, a date or
another kind of identifier becomes the name of that kind, and a place in the tree of paths with too
many different segments becomes `{*}`. The same paths in the same order give the same routes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

ANY: Final = "{*}"  # a segment of which there were too many
REST: Final = "{**}"  # any number of segments
CUT: Final = "…"  # ends a path of which the rest is not known

_ALL_OF: Final = "**"
_KINDS: Final = (
    ("{id}", re.compile(r"[0-9]+")),
    ("{uuid}", re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")),
    ("{hash}", re.compile(r"[0-9a-fA-F]{16,}")),
    ("{date}", re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")),
)
_OPAQUE: Final = "{token}"
_NAMES: Final = frozenset({*(name for name, _ in _KINDS), _OPAQUE, ANY, REST})
_TOKEN_LENGTH: Final = 20
_ENCODED: Final = re.compile(r"[A-Za-z0-9_.~=+:%-]+")
# Words with hyphens between them are no token for a digit or two: `oauth2-authorization-server`.
_RUN: Final = re.compile(r"[A-Za-z0-9]{16,}")
_TOKEN_DIGITS: Final = 4
_LONGEST: Final = 64  # a longer segment is nobody's name for anything
_MOST_SEGMENTS: Final = 20
_MOST_PLACES: Final = 10_000

_PARAMETER: Final = re.compile(r"\{[^{}/]*\}")
PATTERN: Final = (
    "patterns of paths, comma-separated, such as /users/{id}/orders/{id}: `{name}` or `*` for one "
    "segment, `**` at the end for the rest"
)


def pattern(text: str) -> str:
    """TEXT, if it is a pattern of paths. Raises ValueError."""
    segments = text.split("/")
    if segments[0] or len(segments) == 1 or _ALL_OF in segments[:-1] or not text.isprintable():
        raise ValueError(PATTERN)
    for segment in segments:
        literal = not (segment in ("*", _ALL_OF) or _PARAMETER.fullmatch(segment))
        if literal and any(char in segment for char in "{}*?# "):
            raise ValueError(PATTERN)
    return text


def _regex(text: str) -> str:
    """The regular expression of a pattern, without groups."""
    parts = []
    for segment in text.split("/")[1:]:
        if segment == _ALL_OF:
            parts.append("(?:/.*)?")
        elif segment == "*" or _PARAMETER.fullmatch(segment):
            parts.append("/[^/]+")
        else:
            parts.append("/" + re.escape(segment))
    return "".join(parts)


class _Place:
    """A place in the tree: the segments that follow one another up to it."""

    __slots__ = ("children", "collapsed", "literals")

    def __init__(self) -> None:
        self.children: dict[str, _Place] = {}
        self.literals = 0  # children that are no kind of identifier
        self.collapsed = False

    def places(self) -> Iterator[_Place]:
        """All places below it."""
        waiting = [self]
        while waiting:
            below = waiting.pop().children.values()
            yield from below
            waiting += below


class Routes:
    """The routes of one session, whose number is bounded: by MAX_CHILDREN different segments at one
    place, and by a number of places in all."""

    def __init__(self, patterns: Sequence[str] = (), max_children: int = 100) -> None:
        self._patterns = tuple(patterns)
        self._pattern_texts = frozenset(patterns)
        self._regex = re.compile("|".join(f"({_regex(each)})" for each in patterns), re.DOTALL)
        self._max_children = max_children
        self._root = _Place()
        self._places = 0
        self.collapses = 0
        """How many places have become `{*}`: paths that were there had other routes before."""

    def route_of(self, path: str) -> str:
        """The route of PATH, which has no query; it may end with CUT."""
        if found := self._matched(path):
            return found
        if not path.startswith("/"):
            return path if path in ("", "*") else ANY
        return "/" + "/".join(self._segments(path))

    def _matched(self, path: str) -> str:
        """The first pattern that PATH matches, or ""."""
        if path in self._pattern_texts:
            return path
        if not self._patterns or not _NAMES.isdisjoint(path.split("/")):
            return ""  # a route that was made here stays the same
        match = self._regex.fullmatch(path)
        found = self._patterns[(match.lastindex or 1) - 1] if match else ""
        return "" if path.endswith(CUT) and not found.endswith(_ALL_OF) else found

    def _segments(self, path: str) -> Iterator[str]:
        segments = path.split("/")[1:]
        if path.endswith(CUT):
            segments[-1] = REST
        place = self._root
        for depth, segment in enumerate(segments):
            name = _name(segment)
            if name == REST or depth == _MOST_SEGMENTS:
                yield REST
                return
            if name not in _NAMES and self._is_full(place, name):
                name = ANY
            if name not in place.children:
                if self._places >= _MOST_PLACES:
                    yield REST
                    return
                place.children[name] = _Place()
                place.literals += name not in _NAMES
                self._places += 1
            yield name
            place = place.children[name]

    def _is_full(self, place: _Place, name: str) -> bool:
        """Whether PLACE has too many segments to keep NAME apart; it then keeps none."""
        if place.collapsed:
            return True
        if name in place.children or place.literals < self._max_children:
            return False
        before = sum(1 for _ in place.places())
        place.children = {key: it for key, it in place.children.items() if key in _NAMES}
        self._places -= before - sum(1 for _ in place.places())
        place.collapsed = True
        self.collapses += 1
        return True


def _name(segment: str) -> str:
    """The kind of identifier that SEGMENT is, or itself."""
    if segment in _NAMES:
        return segment
    for name, form in _KINDS:
        if form.fullmatch(segment):
            return name
    if len(segment) > _LONGEST or _is_token(segment):
        return _OPAQUE
    return segment


def _is_token(segment: str) -> bool:
    if len(segment) < _TOKEN_LENGTH or not _ENCODED.fullmatch(segment):
        return False
    digits = sum(char.isdigit() for char in segment)
    letters = any(char.isalpha() for char in segment)
    opaque = digits >= _TOKEN_DIGITS or any(
        not run.isalpha() and not run.isdigit() for run in _RUN.findall(segment)
    )
    return bool(digits) and letters and opaque
