"""HTTP requests of processes: their times, outcomes and sizes, by route. Source:
http_latency.bpf.c.

The programs send one record for each exchange that is over. Summaries are made from the records of
an interval, by array.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Final

import numpy as np

from coral.bpf import Features, Rung, Step, kernel_names
from coral.bpf.closing import close_all
from coral.collectors.contract import (
    Coverage,
    EventRows,
    ServiceProcesses,
    Summaries,
    Support,
    Unread,
)
from coral.collectors.http_latency.events import RequestRows
from coral.collectors.http_latency.measures import HttpMeasures
from coral.collectors.http_latency.paths import Paths
from coral.collectors.http_latency.routes import PATTERN, Routes, pattern
from coral.collectors.http_latency.sockets import PROGRAMS, sockets
from coral.collectors.http_latency.summaries import summaries
from coral.collectors.http_latency.tls import PROGRAMS as TLS_PROGRAMS
from coral.collectors.http_latency.tls import TlsHooks
from coral.collectors.http_latency.unread import UnreadCounts
from coral.collectors.hubs import Plan
from coral.collectors.kernel_collector import KernelCollector, KernelOptions
from coral.collectors.options import (
    OptionError,
    boolean,
    choice,
    duration,
    format_duration,
    integer,
    items,
    option,
    size,
)
from coral.mesh.v1 import ebpf_pb2 as pb

_OBJECT: Final = "http_latency"
_END_PROGRAMS: Final = ("coral_state", "coral_destroy")
_COARSE_CLOCK: Final = 6  # CLOCK_MONOTONIC_COARSE, which advances once a jiffy
_TYPED: Final = "bpf_rdonly_cast"  # Linux 6.2


@dataclass(frozen=True)
class HttpLatencyOptions(KernelOptions):
    """The options of `http_latency`."""

    mode: str = option(
        choice("summaries", "events"),
        "summaries",
        "`summaries`: histograms for each interval; `events`: every request",
    )
    ring: int = option(
        size(8 << 10, 256 << 20),
        "4MiB",
        "the size of the ring buffer for requests that are over, of which each takes about 0.4 KiB",
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
    top: int = option(
        integer(0, 10240),
        "0",
        "how many rows to send for each interval: those with most requests, then the row `other` "
        "of each role, which adds up the rest; 0: all rows",
    )
    min_duration: float = option(
        duration(0, 3600), "0s", "with mode=events: send only requests that took at least this long"
    )
    errors_only: bool = option(
        boolean(),
        "false",
        "with mode=events: send only requests with a status of 500 or more, and those that were "
        "aborted before a response",
    )

    tls: bool = option(
        boolean(),
        "true",
        "read what passes through OpenSSL, too; each of its functions becomes some microseconds "
        "slower for every process that uses the same file",
    )

    def check(self, service: ServiceProcesses | None) -> None:
        """Raises `OptionError`, too, for a filter of single events without single events."""
        super().check(service)
        for name, value in (
            ("min_duration", format_duration(self.min_duration) if self.min_duration else ""),
            ("errors_only", "true" if self.errors_only else ""),
        ):
            if value and not self.single_events:
                raise OptionError(name, value, "it with mode=events only")


@cache
def _has_typed_sockets() -> bool:
    return bool(kernel_names([_TYPED]))


class HttpLatencyCollector(KernelCollector[HttpLatencyOptions]):
    """Follows the HTTP requests of the watched processes."""

    kind = pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
    options_type = HttpLatencyOptions
    thread_state = True

    def _plan(self, features: Features) -> Plan:
        self._tls: TlsHooks | None = None
        return Plan(
            _OBJECT,
            features,
            self._rung,
            programs=(*PROGRAMS.get(sockets(features).taken, ()), *_END_PROGRAMS),
            walks=TLS_PROGRAMS,
            options={
                "typed_sockets": self._rung.hook.taken == "tp_btf" and _has_typed_sockets(),
                "ns_per_jiffy": round(time.clock_getres(_COARSE_CLOCK) * 1e9),
            },
            sizes=self._sizes,
        )

    @property
    def _own_maps(self) -> Mapping[str, int]:
        return {}

    @property
    def _has_records(self) -> bool:
        return True

    @classmethod
    def support(cls, features: Features) -> Support:
        support = super().support(features)
        if features.obstacle or not support.supported:
            return support
        rung, step = cls.climb(features), sockets(features)
        if reason := _obstacle(rung, step):
            return replace(support, supported=False, reason=reason)
        return replace(support, steps=(*support.steps, step))

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
        self._write_session()
        self._open_records({"http_exchange": "ended_ns", "process_change": "time_ns"})
        self._unread = UnreadCounts(self._slot.object.map("http_unreads"), self._slot.number)
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
        return self._requests.rows(records["http_exchange"], records["process_change"])

    def _read_summaries(self) -> Summaries:
        exchanges = self._drain_records()["http_exchange"]
        if len(ended := self._targets.read().ended):
            self._targets.forget(ended)
        return summaries(exchanges, self._paths, self._options.top)

    def _read_unread(self) -> Mapping[str, Unread]:
        return self._unread.read()

    def _events_in(self, rows: Summaries) -> int:
        return int(rows.columns["count"].sum())

    def close(self) -> None:
        tls, self._tls = self._tls, None
        close_all([*([partial(tls.leave, self._slot)] if tls is not None else []), super().close])


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
