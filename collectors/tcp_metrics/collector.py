"""TCP connections of processes: what they carry, how they perform, how they end. Source:
tcp_metrics.bpf.c.

At each interval a walk through the kernel's map reads every open connection with the figures that
the kernel keeps of it; connections that have ended come through the ring, each once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from coral.bpf import (
    Feature,
    Features,
    HashMap,
    Rung,
    Step,
    Walk,
    kernel_names,
)
from coral.bpf.probing import capabilities as caps
from coral.collectors.clock import CLOCK
from coral.collectors.contract import Coverage, EventRows, Summaries, Support
from coral.collectors.hubs import Plan, SlotReader
from coral.collectors.kernel_collector import (
    EventCollector,
    KernelOptions,
    top_option,
)
from coral.collectors.options import choice, integer, option, size
from coral.collectors.tcp_metrics.connections import LISTENER, Connections
from coral.collectors.tcp_metrics.diag import DiagConnections
from coral.collectors.tcp_metrics.events import event_rows
from coral.collectors.tcp_metrics.file_walk import FileWalk
from coral.collectors.tcp_metrics.measures import TcpMeasures
from coral.collectors.tcp_metrics.peers import peer_summaries
from coral.collectors.tcp_metrics.rows import connection_summaries
from coral.collectors.tcp_metrics.socket_hints import SocketHints
from coral.mesh.v1 import ebpf_pb2 as pb

_MOST_PEERS: Final = 1000
# Two programs on one hook: the kernel skips the same event for both only very rarely, and at most
# as often as it skips either.
_TWINS: Final = ("coral_state", "coral_state_twin")
_PROGRAMS: Final = (*_TWINS, "coral_destroy")
_SEGMENT, _RECEIVED = "coral_segment", "coral_received"
# Programs that a kernel may have no tracepoint for, and their tracepoints.
_OPTIONAL: Final = {
    _SEGMENT: "tcp_probe",
    _RECEIVED: "tcp_rcv_space_adjust",
    "coral_retransmit": "tcp_retransmit_skb",
    "coral_synack": "tcp_retransmit_synack",
    "coral_reset_out": "tcp_send_reset",
    "coral_reset_in": "tcp_receive_reset",
}
# They exist since Linux 4.16, which a kernel without BTF does not tell.
_OLD: Final = frozenset(_OPTIONAL.values())
_COOKIES: Final = "bpf_get_socket_ptr_cookie"  # Linux 5.12
_TYPED: Final = "bpf_rdonly_cast"  # Linux 6.2
# Programs that read the figures of open connections, by the feature that each needs, best first.
_LIVE: Final = {"map_iterator": "coral_live_iter", "syscall_program": "coral_live_run"}


# Of an element of `connections`: its memory may belong to another connection later.
_IDENTITY: Final = ["sk", "found_ns"]


@dataclass(frozen=True)
class TcpMetricsOptions(KernelOptions):
    """The options of `tcp_metrics`."""

    mode: str = option(
        choice("summaries", "events"),
        "summaries",
        "`summaries`: figures for each interval; `events`: every change of state, retransmit and "
        "reset",
    )
    ring: int = option(
        size(64 << 10, 256 << 20),
        "4MiB",
        "the size of the ring buffer for single events and for connections that have ended",
    )
    by: str = option(
        choice("connection", "peer"),
        "connection",
        "`connection`: a row for each connection; `peer`: a row for each remote address and port",
    )
    top: int = top_option(
        "those with most bytes", all_rows="all connections, but at most 1000 peers"
    )
    prometheus: str = option(
        choice("service", "peer"),
        "service",
        "how to split the Prometheus metrics: by service, or also by the address and port of each "
        "peer",
    )
    entries: int = option(
        integer(1, 262144),
        "10240",
        "how many connections to follow at once; further ones are lost at the stage MAP_FULL",
    )


@cache
def _kernel_has() -> frozenset[str]:
    """The tracepoints and helpers of those above that this kernel has."""
    names = [f"btf_trace_{name}" for name in _OPTIONAL.values()]
    helpers = {_COOKIES, _TYPED}
    found = kernel_names((*names, *helpers))
    tracepoints = {name.removeprefix("btf_trace_") for name in found - helpers}
    return frozenset((tracepoints or _OLD) | (found & helpers))


def _optional() -> set[str]:
    """The programs that this kernel has a tracepoint for."""
    return {name for name, hook in _OPTIONAL.items() if hook in _kernel_has()}


class TcpMetricsCollector(EventCollector[TcpMetricsOptions]):
    """Follows the TCP connections of the watched processes."""

    kind = pb.EBPF_COLLECTOR_KIND_TCP_METRICS
    options_type = TcpMetricsOptions
    always_has_records = True
    twins = _TWINS

    def _plan(self, features: Features) -> Plan:
        self._live: Walk | SlotReader | None = None
        self._files: FileWalk | None = None
        self._diag: DiagConnections | None = None
        self._reads_by = _connections(features, self._rung).taken
        live = _LIVE.get(self._reads_by, "")
        self._walks = (FileWalk.PROGRAM, live) if live else ()
        self._asks = self._reads_by == "sock_diag"
        self._wanted = self._optional_programs()
        typed = self._rung.hook.taken == "tp_btf"
        without_maps = {"found": not self._asks, "live": self._reads_by != "syscall_program"}
        return Plan(
            "tcp_metrics",
            features,
            self._rung,
            programs=_PROGRAMS,
            optional=tuple(sorted(_optional())),
            wanted=self._wanted,
            options={
                "agent": os.getpid(),
                "refresh_at_segments": not self._walks,
                "take_over_found": self._asks,
                "make_cookies": typed and _COOKIES in _kernel_has(),
                "typed_sockets": typed and _TYPED in _kernel_has(),
            },
            sizes=self._sizes,
            preallocated=("connections", "found"),
            walks=self._walks,
            without_maps=tuple(name for name, unused in without_maps.items() if unused),
            read_last=("connections",),
        )

    @property
    def _own_maps(self) -> Mapping[str, int]:
        names = ("connections", "found") if self._asks else ("connections",)
        return dict.fromkeys(names, self._options.entries)

    def _optional_programs(self) -> tuple[str, ...]:
        """The optional programs that this session wants."""
        wanted = _optional()
        if self._walks and self._options.single_events:
            wanted.discard(_SEGMENT)  # it sends no events
        elif self._walks and not self._targets.by_cgroup:
            wanted.discard(_RECEIVED)  # scans find the owners of sockets
        return tuple(sorted(wanted))

    @classmethod
    def support(cls, features: Features) -> Support:
        support = super().support(features)
        if features.obstacle:
            return support
        rung = cls.climb(features)
        if not rung.buffer.taken:
            return replace(support, supported=False, reason=f"no buffer ({rung.buffer.why_not})")
        return replace(support, steps=(*support.steps, _connections(features, rung)))

    @classmethod
    def measures(cls, max_series: int) -> TcpMeasures:
        return TcpMeasures(max_series)

    @property
    def coverage(self) -> Coverage:
        part = self._options.by == "peer" or self._options.top
        return min(super().coverage, Coverage.PART if part else Coverage.WHOLE)

    def _open_maps(self) -> None:
        self._connections_map: HashMap = self._slot.map("connections")
        self._session = np.zeros((), self._slot.object.map("tcp_sessions").value_dtype)
        self._session["single_events"] = self._options.single_events
        self._session["wants_use"] = _RECEIVED in self._wanted
        self._write_session()
        self._hints = self._slot.common(SocketHints)
        if self._options.single_events:
            self._open_records({"tcp_event": "time_ns", "process_change": "time_ns"})
        else:
            self._open_records({"tcp_ended": None})
        self._connections = Connections()

    def _write_session(self) -> None:
        self._slot.own("tcp_sessions", self._session)

    def _on_filled(self) -> None:
        if self._walks:
            self._files = self._slot.common(FileWalk)
            self._live = self._live_reader(*self._walks[1:])
            self._files.run(self._begin_with)
            self._session["walked"] = True
            self._write_session()
            if (self._live.read()["role"] == LISTENER).any():
                self._files.run()  # the first walk may have met those that share one too early
        if self._asks:
            self._diag = DiagConnections(self._connections_map, self._slot.map("found"))
            self._diag.find(self._targets.present(), self._targets.groups_present())

    def _begin_with(self, walk: int) -> None:
        self._session["first_walk"] = walk
        self._write_session()

    def _live_reader(self, program: str) -> Walk | SlotReader:
        record, of = "tcp_connection", "connections"
        if self._reads_by == "map_iterator":
            return self._slot.walk(program, record, map_name=of)
        return self._slot.element_reader(program, record, keys=of, records="live")

    def _read_events(self) -> EventRows:
        records = self._drain_records()
        events = records["tcp_event"]
        closed = events["new_state"] == pb.TCP_STATE_CLOSE
        self._hints.note_ended(int(closed.sum()), self._slot)
        return event_rows(events, self._targets.resource_table())

    def _read_summaries(self) -> Summaries:
        live, ended = self._read()
        changes = self._connections.advance(
            live, ended, time.monotonic_ns(), everything=not self._slot.attached
        )
        members = self._targets.read()
        self._targets.forget(members.ended)
        top, table = self._options.top, self._targets.resource_table()
        if self._options.by == "peer":
            return peer_summaries(changes, top or _MOST_PEERS, table)
        return connection_summaries(changes, members, CLOCK, top, table)

    @property
    def _in_detail(self) -> bool:
        return self._options.prometheus == "peer"

    def _uncounted(self) -> int:
        return self._diag.unfollowed if self._diag else 0

    def _read(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """The connections that are open, and those that have ended: struct tcp_connection."""
        # Read the map before the ring, so that what ends in between is in both.
        if self._live and self._files:
            if self._slot.attached:
                self._files.run_if_rested()
                return self._live.read(), self._drain_ended()
            return self._last(self._live.read()), self._drain_ended()
        if self._diag:
            self._diag.read(now=not self._slot.attached)
        live, ended = self._connections_map.read()[1], self._drain_ended()
        if self._diag:
            live, ended = self._diag.merged(live, ended)
        live["read_ns"] = time.monotonic_ns()  # they go on, even if no segment comes
        return live, ended

    def _last(self, live: NDArray[Any]) -> NDArray[Any]:
        """LIVE, and those that have gone on since the last program ran for them: the walk leaves
        them to a next one, or to the record of their end, and neither comes. They are as they were
        then."""
        kept = self._connections_map.read()[1]
        left = ~np.isin(kept[_IDENTITY], live[_IDENTITY])
        kept = kept[left & (kept["cookie"] != 0)]
        kept["read_ns"] = time.monotonic_ns()
        return np.concatenate([live, kept])

    def _drain_ended(self) -> NDArray[Any]:
        ended = self._drain_records()["tcp_ended"]["connection"]
        self._hints.note_ended(len(ended), self._slot)
        return ended[ended["ended_ns"].argsort(kind="stable")]

    def close(self) -> None:
        self._live = self._files = self._diag = None
        super().close()


COLLECTOR: Final = TcpMetricsCollector


def _connections(features: Features, rung: Rung) -> Step:
    """How open connections are read, and how those that were open before are found: by programs
    that walk to them, by asking the kernel for its list, or when they next carry a segment and are
    used."""
    what, walk = "connections", features["iterator"]
    if rung.loader.taken != "core":
        walk = Feature("iterator", False, "it needs BTF, which programs compiled by bcc lack")
    refused = [] if walk.available else [walk]
    for name in _LIVE if walk.available else ():
        if features[name].available:
            return Step(what, name, tuple(refused))
        refused.append(features[name])
    asked = features["sock_diag"]
    if not asked.available:
        return Step(what, "segments", (*refused, asked))
    return Step(what, "sock_diag", (*refused, *_hidden(features)))


def _hidden(features: Features) -> Iterator[Feature]:
    """The connections that the kernel's list does not show here."""
    if lacking := caps.lacking(caps.NAMESPACES, features.capabilities):
        yield Feature("other network namespaces", False, caps.missing(lacking))
    others = features["others_listeners"]
    if not others.available:
        yield Feature("other users' processes", False, others.reason)
