"""Requests of the contract, as queries: moments become times, and what cannot be is refused in
words that begin with the field's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from google.protobuf.duration_pb2 import Duration

from coral.colony.answers.listings import LISTINGS, AskedListing
from coral.colony.answers.named import NAMED, TIME
from coral.colony.answers.query import Asked
from coral.colony.answers.refusals import NotFoundError, RefusedError, unknown
from coral.colony.answers.window import HOUR_NS, MINUTE_NS, SECOND_NS, Window
from coral.mesh.colony.v1 import colony_pb2 as pb

QUERIES: Final = (*NAMED, *LISTINGS)
DEFAULT_NS: Final = 15 * MINUTE_NS
_LONGEST_NS: Final = 10 * 366 * 24 * HOUR_NS
_SLACK_NS: Final = 5 * SECOND_NS  # clocks of machines differ
_MOST_VALUES: Final = 1000


def asked_of(request: pb.QueryRequest, now_ns: int) -> Asked | AskedListing:
    """A checked query, as of NOW_NS. Raises `RefusedError`."""
    name = request.query
    if name not in QUERIES:
        problem = unknown("query", name, QUERIES)
        raise NotFoundError(f"query: {problem}")
    if len(request.services) + len(request.where) > _MOST_VALUES:
        raise RefusedError(f"services: there are more than {_MOST_VALUES} names and values")
    window = window_of(request, now_ns)
    against_ns = 0
    if request.HasField("against"):
        against_ns = _nanoseconds(request.against, "against")
        if not against_ns:
            raise RefusedError("against: it is 0; give how much earlier, such as 1h")
    by, services, where = tuple(request.by), tuple(request.services), dict(request.where)
    if name in LISTINGS:
        listing = LISTINGS[name]
        return AskedListing(listing, window, by, request.top, services, where, against_ns).checked()
    return Asked(NAMED[name], window, by, request.top, services, where, against_ns).checked()


def window_of(request: pb.QueryRequest | pb.SqlRequest, now_ns: int) -> Window:
    """The window of a request; by default the last 15 minutes. Raises `RefusedError`."""
    until_ns = now_ns
    if request.HasField("until"):
        until_ns = min(_moment(request.until, now_ns, "until"), now_ns)
    since_ns = until_ns - DEFAULT_NS
    if request.HasField("since"):
        since_ns = _moment(request.since, now_ns, "since")
        if since_ns > now_ns + _SLACK_NS:
            raise RefusedError("since: it is in the future")
        since_ns = min(since_ns, now_ns - 1)
    if since_ns >= until_ns:
        raise RefusedError("since: it is not before the end of the window (until)")
    return Window(since_ns, until_ns)


def _moment(moment: pb.Moment, now_ns: int, field: str) -> int:
    which = moment.WhichOneof("at")
    if which == "ago":
        return now_ns - _nanoseconds(moment.ago, field)
    if which == "time":
        time_ns = moment.time.ToNanoseconds()
        if not 0 <= time_ns < 1 << 62:
            raise RefusedError(f"{field}: this time is out of range")
        return int(time_ns)
    raise RefusedError(f"{field}: it is empty; give a time, or how long ago")


def _nanoseconds(duration: Duration, field: str) -> int:
    span_ns: int = duration.seconds * SECOND_NS + duration.nanos
    if not 0 <= span_ns <= _LONGEST_NS:
        raise RefusedError(f"{field}: {span_ns / 1e9:g} s is out of range; give at most 10 years")
    return span_ns


def described(
    columns: Mapping[str, Mapping[str, str]], version: str, now_ns: int
) -> pb.DescribeResponse:
    """What can be asked; COLUMNS are the types of each table's, by their names."""
    response = pb.DescribeResponse(colony_version=version)
    response.now.FromNanoseconds(now_ns)
    for named in NAMED.values():
        response.queries.add(
            name=named.name,
            about=named.about,
            columns=(*named.columns, TIME),
            by=named.by,
            has_window=True,
            has_against=named.can_compare,
        )
    for listing in LISTINGS.values():
        response.queries.add(
            name=listing.name, about=listing.about, columns=listing.columns, has_window=True
        )
    for name, types in columns.items():
        table = response.tables.add(name=name)
        for column, kind in types.items():
            table.columns.add(name=column, type=kind)
    return response
