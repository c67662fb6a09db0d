"""Single requests: rows made from the kernel's records by array, not by event."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.collectors.clock import CLOCK
from coral.collectors.columns import Strings
from coral.collectors.contract import EventRows
from coral.collectors.http_latency.details import details_of
from coral.collectors.http_latency.exchanges import first_byte_ns, has_failed, since_began_ns
from coral.collectors.http_latency.paths import Paths
from coral.collectors.process_names import ProcessNames
from coral.collectors.targets import Targets
from coral.mesh.v1 import ebpf_pb2 as pb

# Fields that the program's record has by the same name.
_COPIED: Final = (
    "request_body_bytes", "response_body_bytes", "local_port", "remote_port", "pid", "role",
    "method", "outcome", "status", "number", "version", "tls",
)  # fmt: skip
_ROW: Final = np.dtype(
    [
        ("time_ns", "<i8"),
        *(
            (name, "<u8")
            for name in (
                "duration_ns", "request_ns", "first_byte_ns", "connection_id",
                "request_body_bytes", "response_body_bytes",
                "local_high", "local_low", "remote_high", "remote_low",
            )
        ),
        *(
            (name, "<u4")
            for name in (
                "local_port", "remote_port", "pid", "comm", "role", "method", "outcome", "status",
                "path", "route", "number", "version", "tls", "network_namespace",
                "failed", "query", "host", "trace_id", "parent_span_id",
            )
        ),
    ]
)  # fmt: skip


_ROW_OF_PODS: Final = np.dtype([*_ROW.descr, ("resource", "<u4")])


class RequestRows:
    """Makes the rows of one session: of all requests, or of those that took MIN_DURATION_NS and, if
    ERRORS_ONLY, failed."""

    def __init__(
        self, targets: Targets, paths: Paths, min_duration_ns: int = 0, *, errors_only: bool = False
    ) -> None:
        self._processes = ProcessNames(targets)
        self._resources = targets.event_resources()
        self._paths = paths
        self._min_duration_ns = min_duration_ns
        self._errors_only = errors_only

    def rows(self, records: NDArray[Any], changes: NDArray[Any]) -> EventRows:
        """The rows of RECORDS, struct http_exchange or http_detailed of shape (n,): with Unix time,
        addresses as numbers, and names. CHANGES are the struct process_change of the same drain.
        """
        # Each batch has its own strings: most paths are in few batches.
        strings = Strings()
        self._processes.forget_indices()
        self._processes.learn(changes)
        wanted = self._wanted(records)
        resources = self._resources
        rows = np.zeros(len(wanted), _ROW_OF_PODS if resources else _ROW)
        if resources:
            resources.begin(changes)
            exchanges = _exchanges(wanted)
            rows["resource"] = resources.of_processes(exchanges["pid"], exchanges["born"])
        if len(wanted):
            self._fill(rows, _exchanges(wanted), strings)
            if _is_detailed(wanted):
                for name, indices in details_of(wanted, strings)._asdict().items():
                    rows[name] = indices
        self._processes.forget(changes)
        told = resources.resources if resources else ()
        return EventRows(pb.HttpRequest, rows, strings.table, resources=told)

    def _wanted(self, records: NDArray[Any]) -> NDArray[Any]:
        if not (self._min_duration_ns or self._errors_only):
            return records
        exchanges = _exchanges(records)
        wanted = since_began_ns(exchanges, "ended_ns") >= self._min_duration_ns
        if self._errors_only:
            wanted &= has_failed(exchanges)
        return records[wanted]

    def _fill(self, rows: NDArray[Any], records: NDArray[Any], strings: Strings) -> None:
        rows["time_ns"] = CLOCK.unix_ns(records["began_ns"])
        rows["duration_ns"] = np.where(
            records["outcome"] == pb.HTTP_OUTCOME_IN_PROGRESS,
            0,
            since_began_ns(records, "ended_ns"),
        )
        rows["request_ns"] = since_began_ns(records, "asked_ns")
        rows["first_byte_ns"] = first_byte_ns(records)
        rows["connection_id"] = records["connection"]
        rows["network_namespace"] = records["network"]
        rows["failed"] = has_failed(records)
        for name in _COPIED:
            rows[name] = records[name]
        for end in ("local", "remote"):
            halves = np.ascontiguousarray(records[end]).view(">u8")
            rows[f"{end}_high"], rows[f"{end}_low"] = halves[:, 0], halves[:, 1]
        rows["comm"] = self._processes.indices(records["pid"], records["born"], strings)
        paths, routes = self._paths.find(records)
        rows["path"] = strings.indices(paths, self._paths.texts.__getitem__)
        rows["route"] = strings.indices(routes, self._paths.routes.__getitem__)


def _is_detailed(records: NDArray[Any]) -> bool:
    return "exchange" in (records.dtype.names or ())


def _exchanges(records: NDArray[Any]) -> NDArray[Any]:
    """RECORDS as struct http_exchange."""
    return records["exchange"] if _is_detailed(records) else records
