"""TCP connections of processes: what they carry, how they perform, how they end. Source:
tcp_metrics.bpf.c.

At each interval, a program reads every open connection with the kernel's present figures; a
connection that has ended comes through the ring, once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

from numpy.typing import NDArray

from coral.bpf import (
    BpfObject,
    ElementReader,
    Feature,
    Features,
    HashMap,
    RecordReader,
    Rung,
    Step,
    Walk,
    climb,
    kernel_names,
)
from coral.bpf.buffers.maps import sum_over_cpus
from coral.bpf.probing import capabilities as caps
from coral.collectors.contract import Batch, Collector, ServiceProcesses, Support
from coral.collectors.options import (
    Option,
    OptionError,
    choice,
    describe,
    duration,
    integer,
    option,
    parse_options,
    size,
)
from coral.collectors.targets import TargetOptions, Targets, refused_options
from coral.collectors.tcp_metrics.connections import Connections
from coral.collectors.tcp_metrics.diag import DiagConnections
from coral.collectors.tcp_metrics.events import event_rows
from coral.collectors.tcp_metrics.measures import TcpMeasures
from coral.collectors.tcp_metrics.peers import peer_rows
from coral.collectors.tcp_metrics.rows import connection_rows
from coral.mesh.v1 import ebpf_pb2 as pb

_RING_INTERVAL_S: Final = 0.018  # as syscall_stats has it
_RING_WAKEUP_SHARE: Final = 4
_MOST_PEERS: Final = 1000
_HOOKS: Final = ("tp_btf", "raw_tp", "tracepoint")  # best first
_PROGRAMS: Final = ("coral_fork", "coral_exec", "coral_gone", "coral_state", "coral_destroy")
# Optional programs, and the tracepoint of each.
_OPTIONAL: Final = {
    "coral_segment": "tcp_probe",
    "coral_received": "tcp_rcv_space_adjust",
    "coral_retransmit": "tcp_retransmit_skb",
    "coral_synack": "tcp_retransmit_synack",
    "coral_reset_out": "tcp_send_reset",
    "coral_reset_in": "tcp_receive_reset",
}
# Available since Linux 4.16, if the kernel has no BTF to read.
_OLD: Final = frozenset(_OPTIONAL.values())
_COOKIES: Final = "bpf_get_socket_ptr_cookie"  # Linux 5.12
# Linux 5.9, and 5.11.
_TYPED: Final = frozenset({"bpf_skc_to_tcp_sock", "bpf_sock_from_file"})
_FIND: Final = "coral_find_iter"
# Programs that read the figures of open connections, by the feature that each needs, best first.
_LIVE: Final = {"map_iterator": "coral_live_iter", "syscall_program": "coral_live_run"}
# Its format names no socket before Linux 6.10.
_NOT_PLAIN: Final = {"coral_segment"}
# After a scan of open sockets, wait 50 times as long as it took: scans use at most 2 % of a CPU.
_LOOK_REST: Final = 50


@dataclass(frozen=True)
class TcpMetricsOptions(TargetOptions):
    """The options of `tcp_metrics`."""

    interval: float = option(duration(0.1, 60), "1s", "how often figures are sent")
    by: str = option(
        choice("connection", "peer"),
        "connection",
        "rows for each connection, or for each remote address and port",
    )
    top: int = option(
        integer(0, 10240),
        "0",
        "rows an interval: those with most bytes, the rest added up in one row `other`; 0: all, "
        "but 1000 of peers",
    )
    prometheus: str = option(
        choice("service", "peer"),
        "service",
        "what Prometheus is told apart: services, or their peers' addresses and ports as well",
    )
    entries: int = option(
        integer(1, 262144),
        "10240",
        "connections that are followed at once; further ones are losses of MAP_FULL",
    )
    mode: str = option(
        choice("summaries", "events"),
        "summaries",
        "figures of each interval, or every change of state, retransmit and reset",
    )
    ring: int = option(
        size(64 << 10, 256 << 20),
        "4MiB",
        "the ring buffer for connections that have ended and for single events, a power of two",
    )

    @property
    def single_events(self) -> bool:
        """Whether every change is an event."""
        return self.mode == "events"


@cache
def _kernel_has() -> frozenset[str]:
    """The tracepoints and helpers above that this kernel has."""
    names = [f"btf_trace_{name}" for name in _OPTIONAL.values()]
    helpers = {_COOKIES, *_TYPED}
    found = kernel_names((*names, *helpers))
    tracepoints = {name.removeprefix("btf_trace_") for name in found - helpers}
    return frozenset((tracepoints or _OLD) | (found & helpers))


class TcpMetricsCollector(Collector):
    """Follows the TCP connections of the processes it was asked to watch."""

    kind = pb.EBPF_COLLECTOR_KIND_TCP_METRICS

    def __init__(
        self, options: TcpMetricsOptions, service: ServiceProcesses | None, features: Features
    ) -> None:
        self._options = options
        self._targets = Targets(options, service)
        self._rung = climb(features, _HOOKS, thread_state=False)
        refused = refused_options(features)
        if options.until_exit and refused.get("until_exit"):
            raise OptionError("until_exit", "true", refused["until_exit"])
        self._reads_by = _connections(features, self._rung).taken
        live = _LIVE.get(self._reads_by, "")
        self._walks = (_FIND, live) if live else ()
        self._asks = self._reads_by == "sock_diag"
        without_maps = {"found": not self._asks, "live": self._reads_by != "syscall_program"}
        self._object = self._rung.object(
            "tcp_metrics",
            programs=self._programs(),
            options={
                **self._targets.object_options,
                "active_at_exec": True,
                "single_events": options.single_events,
                "refresh_at_segments": not self._walks and not options.single_events,
                "take_over_found": self._asks,
                "make_cookies": self._rung.hook.taken == "tp_btf" and _COOKIES in _kernel_has(),
                "typed_sockets": self._rung.hook.taken == "tp_btf" and _kernel_has() >= _TYPED,
                "ring_wakeup_bytes": options.ring // _RING_WAKEUP_SHARE,
            },
            map_entries={"connections": options.entries, "found": options.entries},
            preallocated=("connections", "ports", "targets", "found"),
            records=options.ring,
            walks=self._walks,
            without_maps=[name for name, unused in without_maps.items() if unused],
        )
        self._records: RecordReader | None = None
        self._live: Walk | ElementReader | None = None
        self._find: Walk | None = None
        self._looks, self._look_after_ns = 0, 0
        self._diag: DiagConnections | None = None
        self._lost = {pb.Loss.STAGE_KERNEL_BUFFER: 0, pb.Loss.STAGE_MAP_FULL: 0}
        self._read_at_ns = 0

    def _programs(self) -> tuple[str, ...]:
        """The programs to attach here, named without the hook's suffix."""
        wanted = {name for name, hook in _OPTIONAL.items() if hook in _kernel_has()}
        if self._rung.hook.taken == "tracepoint":
            wanted -= _NOT_PLAIN
        if self._walks and self._options.single_events:
            wanted.discard("coral_segment")  # it reports no events
        elif self._walks and not self._options.cgroup:
            wanted.discard("coral_received")  # owners of sockets are looked up
        return (*_PROGRAMS, *sorted(wanted))

    @classmethod
    def options(cls) -> Sequence[Option]:
        return describe(TcpMetricsOptions)

    @classmethod
    def create(
        cls, config: Mapping[str, str], service: ServiceProcesses | None, features: Features
    ) -> TcpMetricsCollector:
        return cls(parse_options(TcpMetricsOptions, config), service, features)

    @classmethod
    def support(cls, features: Features) -> Support:
        if features.obstacle:
            return Support(False, reason=features.obstacle)
        rung = climb(features, _HOOKS, thread_state=False)
        support = Support.by(rung, refused_options(features))
        if not rung.buffer.taken:
            return replace(support, supported=False, reason=f"no buffer ({rung.buffer.why_not})")
        return replace(support, steps=(*support.steps, _connections(features, rung)))

    @classmethod
    def measures(cls, max_series: int) -> TcpMeasures:
        return TcpMeasures(max_series)

    @property
    def label(self) -> str:
        return self._targets.label

    @property
    def bpf_object(self) -> BpfObject:
        return self._object

    @property
    def interval_s(self) -> float:
        return _RING_INTERVAL_S if self._options.single_events else self._options.interval

    @property
    def records(self) -> RecordReader | None:
        return self._records

    @property
    def drains_on_loop(self) -> bool:
        return self._options.single_events

    def exit_fds(self) -> Sequence[int]:
        return self._targets.exit_fds

    def open(self) -> None:
        self._object.load()
        self._account = self._object.map("account")
        self._connections_map: HashMap = self._object.map("connections")
        single = self._options.single_events
        self._records = self._rung.reader(
            self._object,
            "tcp_event" if single else "tcp_connection",
            buffer_bytes=self._options.ring,
            wakeup_bytes=self._options.ring // _RING_WAKEUP_SHARE,
            order_by="time_ns" if single else "ended_ns",
        )
        self._connections = Connections()
        # Read once, so that a connection's start is the same in all its rows.
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._object.attach()
        self._targets.fill(self._object)
        # After the hooks and the targets, so that the hooks see every connection that opens later.
        self._find_earlier()
        self._read_at_ns = time.time_ns()

    def _find_earlier(self) -> None:
        if self._walks or self._asks:
            self._targets.fill_members()
        if self._walks:
            self._find = self._object.walk(_FIND, "tcp_connection")
            self._live = self._live_reader(*self._walks[1:])
            self._look()
        if self._asks:
            self._diag = DiagConnections(
                self._connections_map, self._object.map("found"), self._object.map("ports")
            )
            self._diag.find(self._targets.present())

    def _live_reader(self, program: str) -> Walk | ElementReader:
        record, of = "tcp_connection", "connections"
        if self._reads_by == "map_iterator":
            return self._object.walk(program, record, map_name=of)
        return self._object.element_reader(program, record, keys=of, records="live")

    def drain(self) -> Batch:
        if self._records is None:
            raise RuntimeError("not open")
        started_at_ns, self._read_at_ns = self._read_at_ns, time.time_ns()
        # Before the drain: a record refused in between is reported next time.
        losses = self._losses(self._records)
        if self._options.single_events:
            rows = event_rows(self._records)
            self._forget_ended()
            return Batch(rows, started_at_ns, self._read_at_ns, losses)
        live, ended = self._read(self._records)
        changes = self._connections.advance(
            live, ended, time.monotonic_ns(), everything=not self._object.attached
        )
        names = self._forget_ended()
        top = self._options.top
        summaries: Sequence[pb.TcpMetrics] | Sequence[pb.TcpPeerMetrics]
        if self._options.by == "peer":
            summaries = peer_rows(changes, top or _MOST_PEERS)
        else:
            summaries = connection_rows(changes, names, self._offset_ns, top)
        in_detail = self._options.prometheus == "peer"
        return Batch(summaries, started_at_ns, self._read_at_ns, losses, in_detail)

    def _look(self) -> None:
        """Looks up which process has which socket open, if enough time has passed."""
        began_ns = time.monotonic_ns()
        if self._find is None or began_ns < self._look_after_ns:
            return
        self._looks += 1
        self._object.write_variable("walk", self._looks & 0xFFFFFFFF)
        self._find.read()
        ended_ns = time.monotonic_ns()
        self._look_after_ns = ended_ns + _LOOK_REST * (ended_ns - began_ns)

    def _read(self, records: RecordReader) -> tuple[NDArray[Any], NDArray[Any]]:
        """The connections that are open, and those that have ended: struct tcp_connection."""
        # The map before the ring: a connection that ends in between is in both, not in neither.
        if self._live:
            self._look()
            return self._live.read(), records.drain()
        if self._diag:
            self._diag.read(now=not self._object.attached)
        live, ended = self._connections_map.read()[1], records.drain()
        if self._diag:
            live, ended = self._diag.merged(live, ended)
        live["read_ns"] = time.monotonic_ns()  # they are open, even if no segment arrives
        return live, ended

    def _forget_ended(self) -> Mapping[int, str]:
        """Removes ended processes from the map; returns command names by tgid."""
        names, ended = self._targets.read()
        if ended:
            self._targets.forget(ended)
        return names

    def _losses(self, records: RecordReader) -> dict[int, int]:
        _, account = self._account.read()
        full = int(sum_over_cpus(account, "map_full")[0])
        full += self._diag.unfollowed if self._diag else 0
        totals = {
            pb.Loss.STAGE_KERNEL_BUFFER: max(int(sum_over_cpus(account, "lost")[0]), records.lost),
            pb.Loss.STAGE_MAP_FULL: full + self._targets.unfollowed(self._object),
        }
        before, self._lost = self._lost, totals
        return {
            int(stage): total - before[stage]
            for stage, total in totals.items()
            if total > before[stage]
        }

    def close(self) -> None:
        self._records = self._live = self._find = self._diag = None
        self._targets.close()
        self._object.close()


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
