"""HTTP requests of processes: their times, outcomes and sizes, by route. Source:
http_latency.bpf.c.

The programs send one record for each exchange that is over. Summaries are made from the records of
an interval, by array.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import numpy as np

from coral.bpf import Features, kernel_names
from coral.collectors.contract import EventRows, Summaries, Support
from coral.collectors.http_latency.events import RequestRows
from coral.collectors.http_latency.measures import HttpMeasures
from coral.collectors.http_latency.routes import Routes
from coral.collectors.http_latency.sockets import PROGRAMS, sockets
from coral.collectors.http_latency.summaries import summaries
from coral.collectors.hubs import Plan
from coral.collectors.kernel_collector import KernelCollector, KernelOptions
from coral.mesh.v1 import ebpf_pb2 as pb

_OBJECT: Final = "http_latency"
_END_PROGRAMS: Final = ("coral_state", "coral_destroy")
_TYPED: Final = "bpf_rdonly_cast"  # Linux 6.2


@dataclass(frozen=True)
class HttpLatencyOptions(KernelOptions):
    """The options of `http_latency`."""


@cache
def _has_typed_sockets() -> bool:
    return bool(kernel_names([_TYPED]))


class HttpLatencyCollector(KernelCollector[HttpLatencyOptions]):
    """Follows the HTTP requests of the watched processes."""

    kind = pb.EBPF_COLLECTOR_KIND_HTTP_LATENCY
    options_type = HttpLatencyOptions

    def _plan(self, features: Features) -> Plan:
        return Plan(
            _OBJECT,
            features,
            self._rung,
            programs=(*PROGRAMS[sockets(features, self._rung).taken], *_END_PROGRAMS),
            options={
                "typed_sockets": self._rung.hook.taken == "tp_btf" and _has_typed_sockets()
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
        if features.obstacle:
            return support
        step = sockets(features, cls.climb(features))
        if support.supported and not step.taken:
            support = replace(support, supported=False, reason=f"no {step.what} ({step.why_not})")
        return replace(support, steps=(*support.steps, step))

    @classmethod
    def measures(cls, max_series: int) -> HttpMeasures:
        return HttpMeasures(max_series)

    def _open_maps(self) -> None:
        self._session = np.zeros((), self._slot.object.map("http_sessions").value_dtype)
        self._session["since"] = self._slot.never
        self._write_session()
        self._open_records({"http_exchange": "ended_ns", "process_change": "time_ns"})
        self._routes = Routes()
        self._requests = RequestRows(self._targets, self._routes)

    def _on_followed(self) -> None:
        self._session["since"] = self._slot.since
        self._write_session()

    def _write_session(self) -> None:
        self._slot.own("http_sessions", self._session)

    def _read_events(self) -> EventRows:
        records = self._drain_records()
        return self._requests.rows(records["http_exchange"], records["process_change"])

    def _read_summaries(self) -> Summaries:
        return summaries(self._drain_records()["http_exchange"], self._routes)


COLLECTOR: Final = HttpLatencyCollector
