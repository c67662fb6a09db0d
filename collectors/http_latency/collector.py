"""HTTP requests of processes: their times, outcomes and sizes, by route. Source:
http_latency.bpf.c.

The programs send one record for each exchange that is over. Summaries are made from the records of
an interval, by array.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import BpfObject, Features, Rung, Step, kernel_names
from coral.bpf.closing import close_all
from coral.collectors.contract import (
    Coverage,
    EventRows,
    Summaries,
    Support,
    Unread,
)
from coral.collectors.http_latency.details import Wants
from coral.collectors.http_latency.events import RequestRows
from coral.collectors.http_latency.exchanges import DETAILED, RECORDS, exchanges_of
from coral.collectors.http_latency.measures import HttpMeasures
from coral.collectors.http_latency.paths import Paths
from coral.collectors.http_latency.routes import PATTERN, Routes, pattern
from coral.collectors.http_latency.sockets import PROGRAMS, sockets
from coral.collectors.http_latency.summaries import summaries
from coral.collectors.http_latency.tls import PROGRAMS as TLS_PROGRAMS
from coral.collectors.http_latency.tls import TlsHooks, uprobes
from coral.collectors.http_latency.unfinished import Unfinished
from coral.collectors.http_latency.unread import IN_PROGRESS, UnreadCounts
from coral.collectors.hubs import Plan
from coral.collectors.kernel_collector import (
    EventCollector,
    KernelOptions,
    errors_only_option,
    min_duration_option,
    top_option,
)
from coral.collectors.options import (
    boolean,
    choice,
    integer,
    items,
    option,
    size,
)
from coral.mesh.v1 import ebpf_pb2 as pb

_OBJECT: Final = "http_latency"
_END_PROGRAMS: Final = ("coral_state", "coral_destroy")
_JOINING_PROGRAM: Final = "coral_join_iter"
_COARSE_CLOCK: Final = 6  # CLOCK_MONOTONIC_COARSE, which advances once a jiffy
_TYPED: Final = "bpf_rdonly_cast"  # Linux 6.2


@dataclass(frozen=True)
class HttpLatencyOptions(KernelOptions):
    """The options of `http_latency`."""

    selecting = ("min_duration", "errors_only", "include_query", "include_host", "traceparent")

    mode: str = option(
        choice("summaries", "events"),
        "summaries",
        "`summaries`: histograms for each interval; `events`: every request",
    )
    ring: int = option(
        size(8 << 10, 256 << 20),
        "4MiB",
        "the size of the ring buffer for requests that are over, of which each takes 0.2 KiB, "
        "or 0.4 KiB with a long path",
    )
    routes: tuple[str, ...] = option(
        items(pattern, PATTERN),
        "",
        "the routes of paths that match these patterns; the first that matches counts",
    )
    max_children: int = option(
        integer(1, 10_000),
        "100",
        "how many different segments to tell apart at one place of a path; more than these become "
        "`{*}`",
    )
    top: int = top_option("those with most requests", " of each role")
    min_duration: float = min_duration_option("requests")
    errors_only: bool = errors_only_option(
        "requests with a status of 500 or more, and those that were aborted before a response"
    )
    include_query: bool = option(
        boolean(),
        "false",
        "with mode=events: copy the query of requests, too, as far as the 256 bytes for the path "
        "have room for it; queries can have secrets in them",
    )
    include_host: bool = option(
        boolean(),
        "false",
        "with mode=events: copy 64 bytes of the host that requests are for, by their target or "
        "their `Host` header",
    )
    traceparent: bool = option(
        boolean(),
        "false",
        "with mode=events: copy the ids of the trace and of the parent span from valid "
        "`traceparent` headers of requests (W3C Trace Context)",
    )
    tls: bool = option(
        boolean(),
        "true",
        "read what passes through OpenSSL, too; each of its functions becomes some microseconds "
        "slower for every process that uses the same file",
    )

    @property
    def wants(self) -> Wants:
        """What is copied of requests besides their path."""
        wanted = Wants(0)
        if self.include_query:
            wanted |= Wants.QUERY
        if self.traceparent:
            wanted |= Wants.TRACE
        if self.include_host:
            wanted |= Wants.HOST
        return wanted


@cache
def _has_typed_sockets() -> bool:
    return bool(kernel_names([_TYPED]))


class HttpLatencyCollector(EventCollector[HttpLatencyOptions]):
    """Follows the HTTP requests of the watched processes."""

    kind = pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
    options_type = HttpLatencyOptions
    always_has_records = True
    thread_state = True

    def _plan(self, features: Features) -> Plan:
        self._tls: TlsHooks | None = None
        self._in_progress = Unread(0, 0)
        self._walks = (_JOINING_PROGRAM,) if features["iterator"].available else ()
        return Plan(
            _OBJECT,
            features,
            self._rung,
            programs=(*PROGRAMS.get(sockets(features).taken, ()), *_END_PROGRAMS),
            walks=self._walks,
            late=TLS_PROGRAMS if self._options.tls else (),
            many_places=uprobes(features).taken == "uprobe_multi",
            options={
                "typed_sockets": self._rung.hook.taken == "tp_btf" and _has_typed_sockets(),
                "ns_per_jiffy": round(time.clock_getres(_COARSE_CLOCK) * 1e9),
            },
            sizes=self._sizes,
        )

    @classmethod
    def support(cls, features: Features) -> Support:
        support = super().support(features)
        if features.obstacle or not support.supported:
            return support
        rung, step = cls.climb(features), sockets(features)
        if reason := _obstacle(rung, step):
            return replace(support, supported=False, reason=reason)
        return replace(support, steps=(*support.steps, step, uprobes(features)))

    @classmethod
    def measures(cls, max_series: int) -> HttpMeasures:
        return HttpMeasures(max_series)

    @property
    def coverage(self) -> Coverage:
        return min(super().coverage, Coverage.PART if self._options.top else Coverage.WHOLE)

    def _open_maps(self) -> None:
        options = self._options
        self._session = np.zeros((), self._slot.object.map("http_sessions").value_dtype)
        self._session["since"] = self._slot.never
        self._session["wants"] = int(options.wants)
        self._session["reads_tls"] = options.tls
        self._write_session()
        # There are only rings: nothing is sorted by time when it is read.
        kinds = (DETAILED,) if options.wants else RECORDS
        self._open_records({**dict.fromkeys(kinds), "process_change": "time_ns"})
        self._unread = UnreadCounts(self._slot.object.map("http_unreads"), self._slot.number)
        dtype = self._slot.object.btf.struct_dtype(DETAILED if options.wants else RECORDS[0])
        self._unfinished = Unfinished(dtype, options.wants)
        self._slot.before_detach = self._read_unfinished
        self._paths = Paths(Routes(options.routes, options.max_children))
        self._requests = RequestRows(
            self._targets,
            self._paths,
            int(options.min_duration * 1e9),
            errors_only=options.errors_only,
        )

    def _on_followed(self) -> None:
        self._session["since"] = self._slot.since
        self._write_session()

    def _on_filled(self) -> None:
        if self._walks and not self._options.from_exec:
            self._slot.common(_JoiningWalk).run()
        if self._options.tls:
            executing = self._options.pid if self._options.from_exec else ()
            self._tls = self._slot.common(TlsHooks)
            self._tls.join(self._slot, self._targets.present(), executing)

    @property
    def notes(self) -> Sequence[str]:
        return (*super().notes, *(self._tls.why_not(self._slot) if self._tls is not None else ()))

    def _write_session(self) -> None:
        self._slot.own("http_sessions", self._session)

    def _read_events(self) -> EventRows:
        records = self._drain_records()
        exchanges = self._with_untold(exchanges_of(records))
        if len(unfinished := self._left_unfinished(exchanges)):
            exchanges = np.concatenate([exchanges, unfinished])
        return self._requests.rows(exchanges, records["process_change"])

    def _read_summaries(self) -> Summaries:
        exchanges = self._with_untold(exchanges_of(self._drain_records()))
        self._left_unfinished(exchanges)  # which have no times to sum
        table, groups = self._targets.resource_table(), None
        if table:
            members = self._targets.read_with(exchanges["pid"], exchanges["born"])
            groups = self._targets.groups_of(members, exchanges["pid"], exchanges["born"])
        else:
            members = self._targets.read()
        if len(members.ended):
            self._targets.forget(members.ended)
        return summaries(exchanges, self._paths, self._options.top, groups, table)

    def _with_untold(self, exchanges: NDArray[Any]) -> NDArray[Any]:
        """EXCHANGES, and before them those of processes that have ended without telling."""
        if self._tls is None:
            return exchanges
        untold = [
            self._unfinished.records_of(waiting, waiting.last_ns, pb.HTTP_OUTCOME_UNKNOWN)
            for waiting in self._tls.untold(self._slot)
        ]
        return np.concatenate([*untold, exchanges]) if untold else exchanges

    def _read_unread(self) -> Mapping[str, Unread]:
        unread = self._unread.read()
        in_progress, self._in_progress = self._in_progress, Unread(0, 0)
        return {**unread, IN_PROGRESS: in_progress} if in_progress.count else unread

    def _read_unfinished(self) -> None:
        """Before programs forget which requests the session waits for."""
        slot, maps = self._slot, self._slot.object
        self._unfinished.read(
            maps.map("connections"),
            maps.map("spilled_requests"),
            slot.bit,
            slot.since,
            time.monotonic_ns(),
        )

    def _left_unfinished(self, exchanges: NDArray[Any]) -> NDArray[Any]:
        """With the last records of a session that has ended, EXCHANGES, its requests that have not;
        else none."""
        self._unfinished.forget(exchanges)
        if self._slot.attached or (self._records and self._records.pending_bytes):
            return exchanges[:0]
        records, self._in_progress = self._unfinished.take()
        return records

    def _events_in(self, rows: Summaries) -> int:
        return int(rows.columns["count"].sum())

    def close(self) -> None:
        tls, self._tls = self._tls, None
        close_all([*([partial(tls.leave, self._slot)] if tls is not None else []), super().close])


class _JoiningWalk:
    """Tells the programs of a hub who has spoken last on the connections that are there already."""

    def __init__(self, bpf_object: BpfObject) -> None:
        self._walk = bpf_object.walk(_JOINING_PROGRAM, RECORDS[0])
        self._lock = threading.Lock()

    def run(self) -> None:
        """Walks once. Safe to call from several threads. Raises `BpfError`."""
        with self._lock:
            self._walk.read()


COLLECTOR: Final = HttpLatencyCollector


def _obstacle(rung: Rung, step: Step) -> str:
    """Why the programs cannot run by RUNG and STEP, the way to sockets; empty if they can."""
    if rung.loader.taken != "core":
        return (
            "the programs need the kernel's BTF to find what sockets carry, and bcc does without it"
        )
    if rung.buffer.taken != "ring_buffer":
        why = rung.buffer.why_not or "this machine has none"
        return f"no ring buffer, which requests are sent through ({why})"
    return "" if step.taken else f"no way to {step.what} ({step.why_not})"
