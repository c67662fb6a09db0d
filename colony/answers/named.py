"""The named queries: which tables each reads, what it adds up, and by what.

To add one, write a `Named` here and a view in `coral.views.answers`; nothing else lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

PLACE: Final = ("service", "namespace", "workload", "pod", "container", "agent", "session")
"""Where rows are from: columns that all tables have."""
_MOST_SUM: Final = 1 << 60  # several of them still fit into BIGINT
TIME: Final = "time"
"""When, in parts of the window: what a query of groups has beside its columns."""


@dataclass(frozen=True, slots=True)
class Source:
    """A table that a query reads. `as_sql` has what its rows have for a column of the query, where
    that is no column of the same name. A column that neither has is NULL."""

    table: str
    as_sql: Mapping[str, str] = field(default_factory=dict)
    optional: Sequence[str] = ()
    """Columns that `as_sql` names and that the table may not have yet."""
    where: str = ""
    """Which rows of the table; all by default."""
    has_times: bool = True
    """Whether the table's histograms are the query's."""
    kind: str = ""
    """The kind of collector that fills it; by default as the table."""


@dataclass(frozen=True, slots=True)
class Value:
    """A figure of a group of rows: `sql`, an aggregate of the query's columns `of`."""

    name: str
    sql: str
    of: Sequence[str]


def summed(sums: str) -> str:
    """SUMS, sums in SQL, as BIGINT, with 0 for none. No sum is greater than `_MOST_SUM`: agents
    decide what is added up, and no row of theirs may make every answer fail."""
    return f"least(coalesce({sums}, 0), {_MOST_SUM})::BIGINT"


def total(name: str, of: str = "") -> Value:
    """The sum of a column, of the same name by default."""
    of = of or name
    return Value(name, summed(f"sum({of})"), (of,))


def greatest(name: str, of: str = "") -> Value:
    """The greatest of a column; NULL where there is none."""
    of = of or name
    return Value(name, f"max({of})::BIGINT", (of,))


def least(name: str) -> Value:
    """The least of a column, in which 0 is no value; NULL where there is none."""
    return Value(name, f"min(nullif({name}, 0))::BIGINT", (name,))


@dataclass(frozen=True, slots=True)
class Times:
    """A histogram of a query, of which quantiles are answered: as `<prefix>p50_<unit>` and so on,
    and its counts by slot as the list `<prefix>histogram`. `most` and `least` are the values with
    the extremes, where they are known."""

    histogram: str
    unit: str
    prefix: str = ""
    least: str = ""
    most: str = ""


@dataclass(frozen=True, slots=True)
class Named:
    """A query. Rows come by `by`, those with the greatest `order` first."""

    name: str
    about: str
    sources: Sequence[Source]
    columns: Sequence[str]
    """By what rows can be told apart, and chosen."""
    by: Sequence[str]
    values: Sequence[Value]
    order: str
    times: Sequence[Times] = ()
    raw_only: Sequence[str] = ()
    """Those of `columns` that rollups do not have."""
    always_by: Sequence[str] = ()
    """What rows are told apart by whatever is asked."""
    counted: tuple[str, str] = ("count", "errors")
    """The values whose share is compared: how many, and of these how many went wrong."""
    can_compare: bool = True

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of collectors that it needs."""
        return tuple(dict.fromkeys(source.kind or source.table for source in self.sources))


HTTP: Final = Named(
    name="http",
    about="HTTP requests: how many, how many failed, and how long they took, by route.",
    sources=(Source("http_latency"),),
    columns=(*PLACE, "role", "method", "route", "status", "version", "tls"),
    by=("service", "role", "method", "route"),
    values=(
        total("count"),
        total("errors"),
        Value(
            "status_4xx",
            summed('sum("count") FILTER (status BETWEEN 400 AND 499)'),
            ("count", "status"),
        ),
        Value(
            "status_5xx",
            summed('sum("count") FILTER (status >= 500)'),
            ("count", "status"),
        ),
        Value(
            "no_response",
            summed('sum("count") FILTER (status = 0)'),
            ("count", "status"),
        ),
        total("request_body_bytes"),
        total("response_body_bytes"),
        total("sum_ns"),
        greatest("max_ns"),
        least("min_ns"),
        greatest("first_byte_max_ns"),
        least("first_byte_min_ns"),
    ),
    order="count",
    times=(
        Times("duration", "ns", least="min_ns", most="max_ns"),
        Times(
            "first_byte",
            "ns",
            "first_byte_",
            least="first_byte_min_ns",
            most="first_byte_max_ns",
        ),
    ),
)

SYSCALLS: Final = Named(
    name="syscalls",
    about="System calls: how many, how many failed, and how long they took.",
    sources=(Source("syscall_stats"),),
    columns=(*PLACE, "syscall", "comm", "pid"),
    by=("service", "syscall"),
    values=(
        total("calls", "call_count"),
        total("errors", "error_count"),
        total("total_ns", "total_duration_ns"),
        greatest("max_ns", "max_duration_ns"),
    ),
    order="total_ns",
    times=(Times("latency", "ns", most="max_ns"),),
    raw_only=("pid",),
    counted=("calls", "errors"),
)

_COUNTERS: Final = (
    *("bytes_sent", "bytes_received", "segments_sent", "retransmits", "retransmits_timeout"),
    "listen_drops",
)
_END_COUNT: Final = 'CASE WHEN "end" IN ({}) THEN closed ELSE 0 END'

TCP: Final = Named(
    name="tcp",
    about="TCP by peer: connections, bytes, segments sent again, round trips.",
    sources=(
        Source(
            "tcp_peers",
            {
                "opened": "connections_opened",
                "established": "connections_established",
                "closed": "connections_closed",
                "failed": "connections_failed",
                "resets": " + ".join(
                    f"least(coalesce({end}, 0), {_MOST_SUM})"
                    for end in ("ends_reset_local", "ends_reset_remote")
                ),
                "refused": "ends_refused",
                "timeouts": "ends_timeout",
            },
            optional=("ends_reset_local", "ends_reset_remote", "ends_refused", "ends_timeout"),
            kind="tcp_metrics",
        ),
        Source(
            "tcp_metrics",
            {
                "port": "CASE WHEN role = 'client' THEN remote_port ELSE local_port END",
                "resets": _END_COUNT.format("'reset_local', 'reset_remote'"),
                "refused": _END_COUNT.format("'refused'"),
                "timeouts": _END_COUNT.format("'timeout'"),
            },
        ),
    ),
    columns=(*PLACE, "role", "remote_address", "port"),
    by=("service", "role", "remote_address", "port"),
    values=(
        *map(total, ("opened", "established", "closed", "failed", "resets", "refused", "timeouts")),
        *map(total, _COUNTERS),
    ),
    order="bytes_sent + bytes_received",
    times=(Times("rtt_us", "us", "rtt_"), Times("connect_us", "us", "connect_")),
    counted=("segments_sent", "retransmits"),
)

PROFILE: Final = Named(
    name="profile",
    about="CPU profiles: samples by stack, of any services and any time.",
    sources=(Source("cpu_profile"),),
    columns=(*PLACE, "process", "comm", "tgid"),
    by=("service",),
    always_by=("process", "end", "unwinding", "in_kernel", "stack_id"),
    values=tuple(
        map(total, ("count", "cpu_ns", "cycles", "samples_lost", "samples_truncated")),
    ),
    order="count",
    raw_only=("comm", "tgid"),
    counted=("count", ""),
)

SERVICES: Final = Named(
    name="services",
    about="Every service that was seen, with its requests, system calls, connections and CPU time.",
    sources=(
        Source(
            "http_latency",
            {"requests": '"count"', "served_max_ns": "max_ns"},
            where="role = 'server'",
        ),
        Source(
            "http_latency",
            {"requests_made": '"count"'},
            where="role = 'client'",
            has_times=False,
        ),
        Source("syscall_stats"),
        Source("cpu_profile"),
        Source(
            "tcp_peers",
            {"opened": "connections_opened", "failed": "connections_failed"},
            kind="tcp_metrics",
        ),
        Source("tcp_metrics"),
    ),
    columns=PLACE,
    by=("service", "namespace", "workload"),
    values=(
        Value("agents", "count(DISTINCT agent)::BIGINT", ("agent",)),
        total("requests"),
        total("requests_made"),
        total("errors"),
        total("calls", "call_count"),
        total("cpu_ns"),
        *map(total, ("opened", "failed", "bytes_sent", "bytes_received", "retransmits")),
        total("segments_sent"),
        Value("max_ns", "max(served_max_ns)", ("served_max_ns",)),
    ),
    order="requests + requests_made + calls",
    times=(Times("duration", "ns", most="max_ns"),),
    counted=("requests", "errors"),
)

NAMED: Final[Mapping[str, Named]] = {it.name: it for it in (HTTP, SYSCALLS, TCP, PROFILE, SERVICES)}
