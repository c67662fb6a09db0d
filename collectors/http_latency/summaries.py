"""Summaries of requests: as columns, made from the records of an interval by array, and as row
messages for subscribers that want rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.columns import Strings, group, split_top
from coral.collectors.contract import Summaries
from coral.collectors.http_latency.exchanges import (
    first_byte_ns,
    has_failed,
    has_response,
    since_began_ns,
)
from coral.collectors.http_latency.paths import Paths
from coral.collectors.resources import ResourceTable, with_resources
from coral.mesh.v1 import ebpf_pb2 as pb
from coral.wire.http import BOUNDS_NS

OTHER: Final = "other"

BUCKETS: Final = len(BOUNDS_NS) + 1
_BOUNDS: Final = np.array(BOUNDS_NS, np.uint64)
OUTCOMES: Final = len(pb.HttpOutcome.values())
_NS_PER_MS: Final = 1e6

# What tells rows apart beside the route, and how many bits of a key each has.
_KEYS: Final = {"role": 2, "method": 5, "status": 10, "version": 2, "tls": 1, "outcome": 3}
_RESOURCE_BITS: Final = 17  # more containers than one session has cgroups
_NAMES: Final = ("role", "method", "status", "version", "tls")
# How the figures of several rows become those of one; all others are added.
_LEAST: Final = ("min_ns", "first_byte_min_ns")
_MOST: Final = ("max_ns", "first_byte_max_ns")
_NEVER: Final = np.uint64(2**64 - 1)  # the least of no values


def summaries(
    records: NDArray[Any],
    paths: Paths,
    top: int = 0,
    groups: NDArray[np.uint32] | None = None,
    table: ResourceTable | None = None,
) -> Summaries:
    """A row for each role, method, route, status and so on of RECORDS, struct http_exchange of
    shape (n,), those with most requests first. With TOP > 0 only the first TOP, then a row `other`
    for each role, which adds up the rest. With TABLE, a row for each container, too, whose groups
    are GROUPS, of shape (n,)."""
    strings = Strings()
    _, routes = paths.find(records)
    resource = table.indices(groups) if table and groups is not None else None
    first, of_record = group(_keys(records, routes, resource))
    figures = _figures(records, of_record, len(first))
    busiest, rest = split_top(figures["count"], top)
    names = {
        "route": strings.indices(routes[first], paths.routes.__getitem__)[busiest],
        **{name: records[name][first][busiest] for name in _NAMES},
    }
    columns: dict[str, NDArray[Any]] = {name: values[busiest] for name, values in figures.items()}
    if len(rest):
        roles, of_rest = np.unique(records["role"][first][rest], return_inverse=True)
        others = _joined({k: values[rest] for k, values in figures.items()}, of_rest, len(roles))
        columns = {name: np.concatenate([columns[name], others[name]]) for name in columns}
        names = {name: np.append(it, np.zeros(len(roles), it.dtype)) for name, it in names.items()}
        names["role"][-len(roles) :] = roles
        names["route"][-len(roles) :] = strings.index(OTHER)
    count = len(names["route"])
    for name in _LEAST:
        columns[name][columns[name] == _NEVER] = 0
    columns = {**names, **columns, "bounds_ns": _BOUNDS}
    made = Summaries(pb.HttpLatencyColumns, columns, strings.table, messages, count)
    shown = None if resource is None else resource[first][busiest]
    return with_resources(made, shown, table)


def _keys(
    records: NDArray[Any], routes: NDArray[np.intp], resource: NDArray[np.uint32] | None
) -> NDArray[np.uint64]:
    """One number for each record, which is the same for records of one row."""
    keys = routes.astype(np.uint64)
    if resource is not None:
        keys = (keys << np.uint64(_RESOURCE_BITS)) | resource.astype(np.uint64)
    for name, bits in _KEYS.items():
        values = records[name].astype(np.uint64)
        if name == "outcome":
            values[has_response(records)] = 0
        keys = (keys << np.uint64(bits)) | (values & np.uint64((1 << bits) - 1))
    return keys


def _figures(
    records: NDArray[Any], of_row: NDArray[np.intp], rows: int
) -> dict[str, NDArray[np.uint64]]:
    """The figures of ROWS rows, of shape (rows,) or (rows, width). OF_ROW is the row of each
    record."""
    total_ns, first_ns = since_began_ns(records, "ended_ns"), first_byte_ns(records)
    answered = has_response(records)
    joined = _joined(
        {
            "sum_ns": total_ns,
            "min_ns": total_ns,
            "max_ns": total_ns,
            "first_byte_sum_ns": first_ns,
            "first_byte_min_ns": np.where(answered, first_ns, _NEVER),
            "first_byte_max_ns": first_ns,
            "request_body_bytes": records["request_body_bytes"],
            "response_body_bytes": records["response_body_bytes"],
        },
        of_row,
        rows,
    )
    return {
        "count": _counted(of_row, rows),
        "errors": _counted(of_row[has_failed(records)], rows),
        "outcomes": _counted(of_row, rows, records["outcome"] % OUTCOMES, OUTCOMES),
        "counts": _counted(of_row, rows, _bucket(total_ns), BUCKETS),
        "first_byte_counts": _counted(of_row[answered], rows, _bucket(first_ns[answered]), BUCKETS),
        **joined,
    }


def _bucket(times_ns: NDArray[np.uint64]) -> NDArray[np.intp]:
    # "left": a value that equals a bound belongs to the bucket that ends there.
    return np.searchsorted(_BOUNDS, times_ns, side="left")


def _counted(
    of_row: NDArray[np.intp], rows: int, column: NDArray[Any] | None = None, width: int = 0
) -> NDArray[np.uint64]:
    """How many records each row has, of shape (rows,); or with the COLUMN of each record, how many
    each row has in each column, of shape (rows, WIDTH)."""
    if column is None:
        return np.bincount(of_row, minlength=rows).astype(np.uint64)
    counts = np.bincount(of_row * width + column, minlength=rows * width)
    return counts.astype(np.uint64).reshape(rows, width)


def _joined(
    figures: Mapping[str, NDArray[np.uint64]], of_row: NDArray[np.intp], rows: int
) -> dict[str, NDArray[np.uint64]]:
    """FIGURES, of shape (n, ...), of the members of each row, of shape (rows, ...). OF_ROW is the
    row of each member; no row is without one."""
    if not rows:
        return dict(figures)
    order = np.argsort(of_row, kind="stable")
    starts = np.searchsorted(of_row[order], np.arange(rows))
    joined = {}
    for name, values in figures.items():
        join = np.minimum if name in _LEAST else np.maximum if name in _MOST else np.add
        joined[name] = join.reduceat(values[order], starts, axis=0)
    return joined


def method_text(method: int) -> str:
    """`GET` and its like, in the words of OpenTelemetry; empty where requests of several methods
    were added up."""
    if method == pb.HTTP_METHOD_OTHER:
        return "_OTHER"
    return pb.HttpMethod.Name(method).removeprefix("HTTP_METHOD_") if method else ""


def role_text(role: int) -> str:
    """`server` or `client`."""
    return pb.HttpRole.Name(role).removeprefix("HTTP_ROLE_").lower()


def outcome_text(outcome: int) -> str:
    """`aborted_by_client` and its like."""
    return pb.HttpOutcome.Name(outcome).removeprefix("HTTP_OUTCOME_").lower()


def messages(
    columns: Mapping[str, NDArray[Any]], strings: Sequence[str]
) -> list[pb.HttpLatencyHistogram]:
    """The rows of COLUMNS, a pb.HttpLatencyColumns as arrays, as messages."""
    bounds_ms = [bound / _NS_PER_MS for bound in columns["bounds_ns"].tolist()]
    values = {name: columns[name].tolist() for name in columns if name != "bounds_ns"}
    rows = []
    for at, index in enumerate(values["route"]):
        route = strings[index]
        outcomes = _outcomes(values["outcomes"][at])
        row = pb.HttpLatencyHistogram(
            buckets=bounds_ms,
            unit="ms",
            route=route,
            tls=bool(values["tls"][at]),
            outcomes={name: n for name, n in outcomes.items() if name != _COMPLETE},
            **{name: values[name][at] for name in _SAME},
            **{name: values[f"{name}_ns"][at] / _NS_PER_MS for name in _TIMES},
        )
        row.labels.update(_labels(row, outcomes))
        rows.append(row)
    return rows


_SAME: Final = (
    "counts", "count", "first_byte_counts", "role", "method", "status", "errors",
    "request_body_bytes", "response_body_bytes", "version",
)  # fmt: skip
_TIMES: Final = ("sum", "min", "max", "first_byte_sum", "first_byte_min", "first_byte_max")
_COMPLETE: Final = outcome_text(pb.HTTP_OUTCOME_COMPLETE)


def _outcomes(counts: Sequence[int]) -> dict[str, int]:
    """How many requests ended how."""
    return {outcome_text(outcome): count for outcome, count in enumerate(counts) if count}


def _labels(row: pb.HttpLatencyHistogram, outcomes: Mapping[str, int]) -> dict[str, str]:
    labels = {"role": role_text(row.role), "route": row.route}
    if not row.method:
        return labels
    labels |= {
        "method": method_text(row.method),
        "version": f"1.{row.version}",
        "scheme": "https" if row.tls else "http",
    }
    if row.status:
        return labels | {"status": str(row.status), "status_class": f"{row.status // 100}xx"}
    return labels | {"status": "", "status_class": "", "outcome": next(iter(outcomes), "")}
